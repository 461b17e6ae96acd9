//! Which commands run beside each other. Called for each command that changes something.
//!
//! Such a command locks the nodes that its arguments name, with all that they are connected to: what they
//! stand on, what stands on them, and what the same job works on. So the commands about one chain run one
//! after the other, as if there were no others, and a file that hangs keeps only those commands waiting that
//! are about its own nodes. Commands about exports lock the exports too, of which there is one list.
//!
//! A command that puts a node on another names both, so nothing joins a locked node to another but opening a
//! node on it, which locks nothing.

use std::collections::BTreeSet;

use blockmirror_block::sync::{Condvar, Mutex};
use serde_json::{Map, Value};

use crate::graph::Graph;

/// What commands lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Locked {
    Node(String),
    Exports,
}

/// The locks of all commands that run.
///
/// *Guards*: which command may change which nodes. *Order*: before the graph. *Not under its mutex*: anything
/// but a look at the graph; I/O goes on while nodes are locked.
#[derive(Debug, Default)]
pub(crate) struct CommandLocks {
    locked: Mutex<BTreeSet<Locked>>,
    changed: Condvar,
}

/// Nodes that a command has locked, until this is dropped.
#[derive(Debug)]
#[must_use = "the nodes are free as soon as this is dropped"]
pub(crate) struct LockedNodes<'a> {
    locks: &'a CommandLocks,
    own: BTreeSet<Locked>,
}

impl CommandLocks {
    /// Locks the nodes that `args` name, with what they are connected to, and if asked for the exports;
    /// waits until no other command has locked any of them.
    pub(crate) fn lock(
        &self,
        graph: &Mutex<Graph>,
        args: &Map<String, Value>,
        exports: bool,
    ) -> LockedNodes<'_> {
        let mut named = Vec::new();
        args.values().for_each(|value| strings(value, &mut named));
        let mut locked = self.locked.lock();
        loop {
            let nodes = graph.lock().connected(&named);
            let mut own: BTreeSet<_> = nodes.into_iter().map(Locked::Node).collect();
            own.extend(exports.then_some(Locked::Exports));
            if own.is_disjoint(&locked) {
                locked.extend(own.iter().cloned());
                return LockedNodes { locks: self, own };
            }
            locked = self.changed.wait(locked);
        }
    }

    /// Nodes may not be connected any more: commands that wait look again.
    pub(crate) fn look_again(&self) {
        let _locked = self.locked.lock();
        self.changed.notify_all();
    }
}

impl Drop for LockedNodes<'_> {
    fn drop(&mut self) {
        let mut locked = self.locks.locked.lock();
        locked.retain(|one| !self.own.contains(one));
        self.locks.changed.notify_all();
    }
}

/// All strings in `value`: any may name a node.
fn strings<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => found.push(text),
        Value::Array(values) => values.iter().for_each(|value| strings(value, found)),
        Value::Object(members) => members.values().for_each(|value| strings(value, found)),
        _ => {}
    }
}
