//! Who uses a node, what for, and what others may do meanwhile. Called by the graph; pure.

use std::fmt;
use std::sync::Arc;

use blockmirror_image_lock::{Permission, Permissions};
use blockmirror_qmp::QmpError;

use super::backing_link::BackingLink;
use crate::Reply;

/// What a use needs or shares.
pub(crate) type Perms = Permissions;

/// Names a use for as long as it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AttachmentId(pub(crate) u64);

/// One use of a node.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) node: String,
    pub(crate) parent: Parent,
    pub(crate) perm: Perms,
    pub(crate) shared_perm: Perms,
    /// What its holder reads by it, if that moves with it.
    pub(crate) link: Option<Arc<BackingLink>>,
}

/// Who uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Another node stands on it.
    Node { name: String, role: &'static str },
    /// The filter `name` on it needs and shares this besides what its users do.
    Claim { name: String },
    /// It is exported.
    Export(String),
    /// A job works on it.
    Job { id: String, kind: &'static str, role: JobRole },
    /// A monitor's `qemu-io` command works on it.
    Monitor,
}

/// What a job does with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobRole {
    /// Its users go over to the target, if all goes well.
    Source,
    /// It takes the source's place then.
    Target,
    /// Neither: it is read, or written and stays where it is.
    Other,
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { name, role } => write!(f, "node '{name}' (as '{role}' child)"),
            Self::Claim { name } => write!(f, "node '{name}' (as 'image' child)"),
            Self::Export(id) => write!(f, "export '{id}'"),
            Self::Job { id, kind, .. } => write!(f, "block job '{id}': {kind}"),
            Self::Monitor => f.write_str("an unnamed block device"),
        }
    }
}

impl Parent {
    /// The node that uses another one, whichever way.
    pub(crate) fn node(&self) -> Option<&str> {
        match self {
            Self::Node { name, .. } | Self::Claim { name } => Some(name),
            Self::Export(_) | Self::Job { .. } | Self::Monitor => None,
        }
    }

    /// The job that uses the node.
    pub(crate) fn job(&self) -> Option<&str> {
        match self {
            Self::Job { id, .. } => Some(id),
            _ => None,
        }
    }
}

impl Attachment {
    /// Whether this is the link by which `parent` stands on the node.
    pub(crate) fn is_link_of(&self, parent: &str) -> bool {
        matches!(&self.parent, Parent::Node { name, .. } if name == parent)
    }

    /// Whether it is the link of an overlay to its backing file.
    pub(crate) fn is_backing(&self) -> bool {
        matches!(&self.parent, Parent::Node { role: "backing", .. })
    }

    /// Whether a job works on the node that may put it in another one's place, with that one's tap.
    pub(crate) fn may_pivot(&self) -> bool {
        matches!(self.parent, Parent::Job { role: JobRole::Target, .. })
    }

    /// The node that stands on this one by it.
    pub(crate) fn parent_node(&self) -> Option<&str> {
        match &self.parent {
            Parent::Node { name, .. } => Some(name),
            _ => None,
        }
    }

    /// Whether `new` can be beside this one.
    pub(crate) fn check_against(&self, new: &Attachment) -> Reply<()> {
        for (perm, unshares) in [(self, new), (new, self)] {
            let conflict: Vec<_> =
                perm.perm.iter().filter(|p| !unshares.shared_perm.contains(*p)).map(name_of).collect();
            if !conflict.is_empty() {
                let node = &self.node;
                return Err(QmpError::generic(format!(
                    "Permission conflict on node '{node}': permissions '{}' are both required by {} and \
                     unshared by {}.",
                    conflict.join(", "),
                    perm.described(),
                    unshares.described(),
                )));
            }
        }
        Ok(())
    }

    fn described(&self) -> String {
        let node = &self.node;
        match &self.parent {
            Parent::Node { name, role } => format!("node '{name}' (uses node '{node}' as '{role}' child)"),
            Parent::Claim { name } => format!("node '{name}' (uses node '{node}' as 'image' child)"),
            other => format!("{other} (uses node '{node}' as 'root' child)"),
        }
    }
}

fn name_of(permission: Permission) -> &'static str {
    match permission {
        Permission::ConsistentRead => "consistent read",
        Permission::Write => "write",
        Permission::WriteUnchanged => "write unchanged",
        Permission::Resize => "resize",
    }
}

/// Everything: what a use shares that does not mind.
pub(crate) const ALL: Perms = Perms::READ_WRITE.with(Permission::WriteUnchanged);
/// What a reader shares who wants the bytes to stay.
pub(crate) const NO_CHANGE: Perms = Perms::READ.with(Permission::WriteUnchanged);
/// What a writer of the disk's contents needs: not to resize.
pub(crate) const WRITE: Perms = Perms::READ.with(Permission::Write);
