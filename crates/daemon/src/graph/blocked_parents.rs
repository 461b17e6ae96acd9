//! Nodes that a command changes under no lock of the graph: no other node is put on them meanwhile, as under
//! one of QEMU's op blockers.
//!
//! Called by commands that do I/O between their checks and the change (`block_resize`, `blockdev-reopen`).
//! Other commands about these nodes wait for the command's own locks; opening a node takes none, and is
//! refused.

use blockmirror_block::sync::Mutex;
use blockmirror_qmp::QmpError;

use super::Graph;
use crate::Reply;

/// Nodes on which no node is put until this is dropped, which takes the graph's lock.
#[derive(Debug)]
#[must_use = "nodes can be put on them as soon as this is dropped"]
pub(crate) struct BlockedParents<'a> {
    graph: &'a Mutex<Graph>,
    names: Vec<String>,
}

impl<'a> BlockedParents<'a> {
    /// Blocks the nodes `names` of `graph`, which `owner` guards. To be called under the lock under which
    /// they were checked.
    pub(crate) fn new(owner: &'a Mutex<Graph>, graph: &mut Graph, names: Vec<String>) -> Self {
        graph.blocked.extend(names.iter().cloned());
        Self { graph: owner, names }
    }
}

impl Drop for BlockedParents<'_> {
    fn drop(&mut self) {
        self.graph.lock().blocked.retain(|name| !self.names.contains(name));
    }
}

impl Graph {
    /// Refuses to put a node that is opened on `name` while a command changes that.
    pub(crate) fn check_not_blocked(&self, name: &str) -> Reply<()> {
        if self.blocked.contains(name) {
            return Err(QmpError::generic(format!("Node '{name}' is busy: a command is changing it")));
        }
        Ok(())
    }
}
