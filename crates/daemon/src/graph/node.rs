//! One node: an open image, file or filter. Made by a driver, owned by the graph.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_file::FileStorage;
use blockmirror_mirror::Tap;
use blockmirror_qcow2::Qcow2;
use blockmirror_qcow2::format::bitmaps::BitmapEntry;
use serde_json::Value;

use super::host_size_cell::HostSizeCell;
use super::node_device::NodeDevice;

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It holds bytes itself: a file, an export, nothing.
    Protocol,
    /// An image or a part of a file, which lives in the file below it.
    Format,
    /// It stands before a disk and shows what that holds.
    Filter,
}

/// What the graph has to know of a driver.
pub(crate) struct NodeDriver {
    /// Its name on the wire.
    pub(crate) name: &'static str,
    /// Whether its nodes write below when they are read.
    pub(crate) writes_on_read: bool,
    /// What a node of it is, that has a storage for formats or none.
    pub(crate) kind: fn(bool) -> Kind,
    /// Whether a node of it writes to a child past the tap of that, as formats do.
    pub(crate) writes_past_tap: fn(&Node) -> bool,
}

impl fmt::Debug for NodeDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// One node, as long as it is there: when it has gone, another one may get its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeId {
    pub(crate) name: String,
    pub(super) number: u64,
}

/// A node of the graph.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its name, unique.
    pub(crate) name: String,
    /// The driver.
    pub(crate) driver: &'static NodeDriver,
    /// What it is called in answers: a path, a URI.
    pub(crate) filename: String,
    /// The path of the host file, where there is one right below.
    pub(crate) path: Option<PathBuf>,
    /// What a format can live in, for nodes that are files or stand for one.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    /// The open file, for nodes that are files.
    pub(crate) file: Option<Arc<FileStorage>>,
    /// What the host said of the file when it was last asked.
    pub(crate) host_size: Arc<HostSizeCell>,
    /// What it was opened with, members of members by dotted names.
    pub(crate) options: BTreeMap<String, Value>,
    /// The format, where it is qcow2.
    pub(crate) qcow2: Option<Arc<Qcow2>>,
    /// What the image said of the bitmaps that it stores when it was opened.
    pub(crate) bitmaps_at_open: Vec<BitmapEntry>,
    /// The disk, with what its options ask for; below the tap.
    pub(crate) device: Arc<NodeDevice>,
    /// The disk as its users see it.
    pub(crate) tap: Arc<Tap>,
    /// Whether it accepts no writes.
    pub(crate) read_only: bool,
    /// Whether it goes past the host's page cache.
    pub(crate) direct: bool,
    /// Whether it was asked for by name, so that it stays without users.
    pub(crate) owned: bool,
    /// Order of appearance.
    pub(crate) number: u64,
}

impl Node {
    fn kind(&self) -> Kind {
        (self.driver.kind)(self.storage.is_some())
    }

    /// Whether it stands before a disk and shows what that holds.
    pub(crate) fn is_filter(&self) -> bool {
        self.kind() == Kind::Filter
    }

    /// Whether it shows a part of a file.
    pub(crate) fn is_part(&self) -> bool {
        self.is_format() && ["offset", "size"].iter().any(|option| self.options.contains_key(*option))
    }

    /// Whether it is a format, which lives in the file below it.
    pub(crate) fn is_format(&self) -> bool {
        self.kind() == Kind::Format
    }
}
