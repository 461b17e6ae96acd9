//! Which commands run beside each other. Called for each command that changes something.
//!
//! Such a command locks the nodes that its arguments name, with all that they are connected to: what they
//! stand on, what stands on them, and what the same job works on. So the commands about one chain run one
//! after the other, as if there were no others, and a file that hangs keeps only those commands waiting that
//! are about its own nodes. Commands about exports lock the exports too, of which there is one list.
//!
//! A command that puts a node on another names both, so nothing joins a locked node to another but opening a
//! node on it, which locks nothing. The name of a node that the command itself opens is locked before the
//! node is there: no other command uses the node before this one is done with it.

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
        let mut opened = Vec::new();
        new_names(args, &mut opened);
        let mut locked = self.locked.lock();
        loop {
            let nodes = graph.lock().connected(&named);
            let mut own: BTreeSet<_> = nodes.into_iter().map(Locked::Node).collect();
            own.extend(opened.iter().map(|name| Locked::Node((*name).to_owned())));
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

/// Members by which commands name the nodes that they open.
const NEW_NAMES: [&str; 2] = ["snapshot-node-name", "node-name"];

/// The values of [`NEW_NAMES`], in actions of a transaction too.
fn new_names<'a>(members: &'a Map<String, Value>, found: &mut Vec<&'a str>) {
    for (key, value) in members {
        match value {
            Value::String(name) if NEW_NAMES.contains(&key.as_str()) => found.push(name),
            Value::Object(inner) => new_names(inner, found),
            Value::Array(values) => {
                values.iter().filter_map(Value::as_object).for_each(|inner| new_names(inner, found));
            }
            _ => {}
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Another command joined a mirror to the overlay of a snapshot that was not done: the mirror's tap was
    /// replaced, and what guests wrote since did not reach its target.
    #[test]
    fn a_node_that_a_command_opens_is_locked_before_it_is_there() {
        let locks = CommandLocks::default();
        let graph = Mutex::new(Graph::default());
        let args = json!({"actions": [
            {"type": "blockdev-snapshot-sync", "data": {"node-name": "n", "snapshot-node-name": "s"}},
        ]});
        let locked = locks.lock(&graph, args.as_object().unwrap(), false);
        let names: Vec<_> = locked.own.iter().collect();
        assert_eq!(names, [&Locked::Node("n".into()), &Locked::Node("s".into())]);
        drop(locked);
        assert!(locks.locked.lock().is_empty());
    }
}
