//! What a driver says of a child of the node that it opens. Made by drivers; an attachment is made of it when
//! the node is put in the graph.

use std::sync::Arc;

use blockmirror_block::Storage;

use super::{BackingLink, Perms};

/// A child that a node comes to stand on, as its driver says.
pub(crate) struct ChildLink {
    pub(crate) node: String,
    pub(crate) role: &'static str,
    pub(crate) perm: Perms,
    pub(crate) shared_perm: Perms,
    /// What the driver's device reads by it, if that moves with it.
    pub(crate) link: Option<Arc<BackingLink>>,
    /// The child's length when its user looked at it.
    pub(crate) len: u64,
    /// What the format lives in.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    /// It is what a filter needs and shares besides what its users do.
    pub(crate) claim: bool,
}
