//! The options inside of options that `blockdev-reopen` gets: each object that describes a child is a change
//! of that child, which was opened with its parent. Called by [`super::reopen`].
//!
//! What must hold: nothing that is given is left out. An object for a child that is a node of its own, or
//! that is not there, is refused.

use blockmirror_qmp::QmpError;
use serde_json::{Map, Value};

use crate::Reply;
use crate::arguments::Arguments;
use crate::driver::{Common, CommonOptions, Inherited};
use crate::errors::cannot_change;
use crate::graph::Graph;

/// What a node is to become.
pub(super) struct ReopenRequest {
    /// The node.
    pub(super) node: String,
    pub(super) options: Map<String, Value>,
    /// What it gets from the node whose options describe it; `None` for one that is named itself.
    pub(super) inherited: Option<Inherited>,
    /// The nodes whose options describe it, from the top.
    pub(super) above: Vec<String>,
}

/// Adds what `options` say, of their node and of the children they describe.
pub(super) fn collect(graph: &Graph, options: Map<String, Value>, all: &mut Vec<ReopenRequest>) -> Reply<()> {
    let name = CommonOptions::parse(&options)?.node_name;
    let node = name.ok_or_else(|| QmpError::generic("node-name not specified"))?;
    let root = ReopenRequest { node, options, inherited: None, above: Vec::new() };
    let mut open = vec![root];
    while let Some(wanted) = open.pop() {
        let given = CommonOptions::parse(&wanted.options)?;
        let node = graph.get(&wanted.node).ok_or_else(|| {
            QmpError::generic(format!("Failed to find node with node-name='{}'", wanted.node))
        })?;
        let inherited = wanted.inherited.unwrap_or_else(|| super::inherited(graph, node));
        let common = Common::new(&given, inherited)?;
        for role in given.driver.0.children() {
            let Some(Value::Object(inner)) = wanted.options.get(role) else { continue };
            let child = graph.children(&node.name).find(|(r, child)| *r == role && !child.owned);
            let Some((_, child)) = child else { return Err(cannot_change(&format!("{role}.driver"))) };
            if CommonOptions::parse(inner)?.node_name.is_some_and(|given| given != child.name) {
                return Err(cannot_change("node-name"));
            }
            let mut above = wanted.above.clone();
            above.push(node.name.clone());
            open.push(ReopenRequest {
                node: child.name.clone(),
                options: inner.clone(),
                inherited: Some(if role == "backing" { common.for_backing() } else { common.for_file() }),
                above,
            });
        }
        all.push(wanted);
    }
    Ok(())
}
