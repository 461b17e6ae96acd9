//! How a caller says which internal snapshot is meant. Pure.

use std::fmt;

/// Which snapshot is meant. Names need not be unique: the first in the table counts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotRef {
    /// The one with this identifier.
    Id(String),
    /// The first with this name.
    Name(String),
    /// The one with this identifier, if it has this name.
    IdAndName {
        /// The identifier.
        id: String,
        /// The name.
        name: String,
    },
    /// The one with this identifier, or else the first with this name.
    IdOrName(String),
}

impl SnapshotRef {
    /// How well a snapshot with `its_id` and `its_name` fits, the lowest best; `None` if it is not meant.
    pub(crate) fn rank(&self, its_id: &str, its_name: &str) -> Option<u8> {
        match self {
            Self::Id(id) => (its_id == id).then_some(0),
            Self::Name(name) => (its_name == name).then_some(0),
            Self::IdAndName { id, name } => (its_id == id && its_name == name).then_some(0),
            Self::IdOrName(text) if its_id == text => Some(0),
            Self::IdOrName(text) => (its_name == text).then_some(1),
        }
    }
}

impl fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "with the id \"{id}\""),
            Self::Name(name) => write!(f, "with the name \"{name}\""),
            Self::IdAndName { id, name } => write!(f, "with the id \"{id}\" and the name \"{name}\""),
            Self::IdOrName(text) => write!(f, "with the id or name \"{text}\""),
        }
    }
}
