//! What a driver is, and the table of all drivers: a driver is one file below, and one line in the table.
//! CONTRIBUTING.md, "How to add", has the rest.
//!
//! The schema's names and options, the nodes that the graph treats as filters or formats, what
//! `blockdev-reopen` may change and how a node becomes writable all follow from the table.

mod blkdebug;
mod blkverify;
mod copy_on_read;
mod file;
mod nbd;
mod null_co;
mod qcow2;
mod raw;
mod schema;
mod throttle;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_file::FileStorage;
use blockmirror_qcow2::Qcow2;
use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::{Object, Type, Variant};
use serde_json::{Map, Value};

pub(crate) use file::is_locked;
pub(crate) use qcow2::{backing_in_header, overlap_checks, probe_format};
pub(crate) use schema::{
    BLOCKDEV_OPTIONS, CommonOptions, DetectZeroes, Discard, DriverName, NodeOptions, NodeRef,
};

use super::{Opened, Opening};
use crate::Reply;
use crate::arguments::{Argument, Arguments, variant};
use crate::errors::cannot_change;
use crate::graph::{BackingLink, Kind, Node, NodeDriver};
use crate::object::Objects;

/// The options of an open node by dotted names, children left out.
pub(crate) type FlatOptions = BTreeMap<String, Value>;

/// A driver: how nodes of one kind are opened and changed.
pub(crate) trait Driver {
    /// Its name on the wire, and what the reference says of it.
    const NAME: &'static str;
    const DOC: &'static str;
    /// Whether `blockdev-reopen` takes nodes of it.
    const REOPENS: bool = true;
    /// Whether it writes below when it is read.
    const WRITES_ON_READ: bool = false;
    /// Its options, besides those that all drivers have.
    type Options: Argument + Arguments;

    /// What a node of it is, that has a storage for formats or none.
    fn kind(has_storage: bool) -> Kind;

    /// Opens a node: children first, then the disk on them.
    fn open(opening: &mut Opening<'_>, options: Self::Options) -> Reply<Opened>;

    /// Whether other options need another device on the same child. A driver with options of its own that are
    /// marked `reopen` says so here: otherwise their change has no effect.
    fn needs_rebase(_old: &FlatOptions, _new: &Self::Options) -> bool {
        false
    }

    /// The device on another child.
    fn rebase(_objects: &Objects, _options: &Self::Options, _below: Below) -> Reply<Rebased> {
        Err(cannot_change("driver"))
    }

    /// The device for writing, if the one that was opened for reading cannot be used for that.
    fn reopen_rw(_node: &OpenNode) -> Reply<Option<OpenedAgain>> {
        Ok(None)
    }

    /// The image that the node has, opened in the node's storage, which it does not live in yet.
    fn reopen_on(_node: &OpenNode) -> Reply<OpenedAgain> {
        Err(cannot_change("file"))
    }

    /// Whether a node of it writes to `child` past the tap of that, as formats do.
    fn writes_past_tap(_child: &Node) -> bool {
        false
    }
}

/// What a device comes to stand on.
pub(crate) struct Below {
    pub(crate) link: Arc<BackingLink>,
    /// The child's storage, where that is a host file.
    pub(crate) file: Option<Arc<dyn Storage>>,
}

/// A device on another child.
pub(crate) struct Rebased {
    pub(crate) device: Arc<dyn BlockDevice>,
    /// What the node makes of the child's storage for formats that live in it, if anything.
    pub(crate) wrap: Option<WrapStorage>,
}

/// Makes a node's storage out of its child's.
pub(crate) type WrapStorage = Box<dyn FnOnce(Arc<dyn Storage>) -> Arc<dyn Storage>>;

/// A node whose device is to be opened a second time.
pub(crate) struct OpenNode {
    pub(crate) filename: String,
    pub(crate) options: FlatOptions,
    pub(crate) file: Option<Arc<FileStorage>>,
    /// Its storage, where that is, or lies in, a host file.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) image: Option<Arc<Qcow2>>,
    /// The storage of its data file.
    pub(crate) data: Option<Arc<dyn Storage>>,
}

/// A device that takes the place of the one that a node has.
pub(crate) struct OpenedAgain {
    pub(crate) device: Arc<dyn BlockDevice>,
    /// The image that it is.
    pub(crate) image: Option<Arc<Qcow2>>,
}

/// A driver in the table.
pub(crate) struct DriverEntry {
    /// What the graph knows of it.
    pub(crate) node: NodeDriver,
    pub(crate) doc: &'static str,
    pub(crate) reopens: bool,
    options: &'static Object,
    changeable: &'static [(&'static str, bool)],
    pub(crate) open: fn(&mut Opening<'_>, &Map<String, Value>) -> Reply<Opened>,
    pub(crate) needs_rebase: fn(&FlatOptions, &Map<String, Value>) -> Reply<bool>,
    pub(crate) rebase: fn(&Objects, &Map<String, Value>, Below) -> Reply<Rebased>,
    pub(crate) reopen_rw: fn(&OpenNode) -> Reply<Option<OpenedAgain>>,
    pub(crate) reopen_on: fn(&OpenNode) -> Reply<OpenedAgain>,
}

impl DriverEntry {
    const fn of<D: Driver>() -> Self {
        Self {
            node: NodeDriver {
                name: D::NAME,
                writes_on_read: D::WRITES_ON_READ,
                kind: D::kind,
                writes_past_tap: D::writes_past_tap,
            },
            doc: D::DOC,
            reopens: D::REOPENS,
            options: variant::<D::Options>(D::NAME).object,
            changeable: D::Options::CHANGEABLE,
            open: |opening, options| D::open(opening, D::Options::parse(options)?),
            needs_rebase: |old, new| Ok(D::needs_rebase(old, &D::Options::parse(new)?)),
            rebase: |objects, options, below| D::rebase(objects, &D::Options::parse(options)?, below),
            reopen_rw: D::reopen_rw,
            reopen_on: D::reopen_on,
        }
    }

    /// Its name.
    pub(crate) const fn name(&self) -> &'static str {
        self.node.name
    }

    /// The driver of `node`.
    ///
    /// # Errors
    /// It is not in the table, which is a fault of the program.
    pub(crate) fn of_node(node: &Node) -> Reply<&'static Self> {
        let name = node.driver.name;
        driver_named(name).ok_or_else(|| QmpError::generic(format!("Internal error: no driver '{name}'")))
    }

    /// The options for the schema, which come with the driver's name.
    pub(crate) const fn variant(&self) -> Variant {
        blockmirror_qmp::schema::case(self.name(), self.options)
    }

    /// Whether `blockdev-reopen` may change its own option `name`.
    pub(crate) fn may_change(&self, name: &str) -> bool {
        self.changeable.iter().any(|(option, changeable)| *option == name && *changeable)
    }

    /// Its options that are children.
    pub(crate) fn children(&self) -> impl Iterator<Item = &'static str> {
        let is_child = |ty| match ty {
            Type::Later(ty) => matches!(ty(), Type::Alternate(of) if of.name.starts_with("BlockdevRef")),
            _ => false,
        };
        self.options.members.iter().filter(move |member| is_child(member.ty)).map(|member| member.name)
    }
}

impl fmt::Debug for DriverEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many drivers there are.
pub(crate) const DRIVER_COUNT: usize = DRIVER_TABLE.len();

/// All drivers, in the order of their names.
pub(crate) const DRIVER_TABLE: &[DriverEntry] = &[
    DriverEntry::of::<blkdebug::Blkdebug>(),
    DriverEntry::of::<blkverify::BlkverifyDriver>(),
    DriverEntry::of::<copy_on_read::CopyOnReadDriver>(),
    DriverEntry::of::<file::File>(),
    DriverEntry::of::<file::HostDevice>(),
    DriverEntry::of::<nbd::Nbd>(),
    DriverEntry::of::<null_co::NullCo>(),
    DriverEntry::of::<qcow2::Qcow2Driver>(),
    DriverEntry::of::<raw::RawDriver>(),
    DriverEntry::of::<throttle::ThrottleDriver>(),
];

static DRIVERS: &[DriverEntry] = DRIVER_TABLE;

/// The driver `name`.
pub(crate) fn driver_named(name: &str) -> Option<&'static DriverEntry> {
    DRIVERS.iter().find(|driver| driver.name() == name)
}

/// Options that are children, of any driver.
pub(crate) fn all_children() -> impl Iterator<Item = &'static str> {
    DRIVERS.iter().flat_map(DriverEntry::children)
}
