//! Opening nodes: from the options of `blockdev-add` to nodes in the graph.
//!
//! Options have passed the schema. A node's children are opened first, then its own driver puts a disk on
//! them; if anything fails, what was opened on the way is closed again. Files are opened without the graph
//! being locked.
//!
//! What must hold: a file that an image names is opened only if the context's policy allows it.

mod drivers;
mod reopen;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_file::{FileId, FileStorage, PathHandle};
use blockmirror_image::{MAX_CHAIN_L1_BYTES, Resolved};
use blockmirror_image_lock::Permission;
use blockmirror_mirror::Tap;
use blockmirror_nbd::NbdUri;
use blockmirror_qmp::QmpError;
use serde_json::{Map, Value};
use tracing::info;

pub(crate) use drivers::{
    BLOCKDEV_OPTIONS, Below, CommonOptions, DriverEntry, DriverName, NodeOptions, NodeRef, OpenNode,
    OpenedAgain, Rebased, all_children, backing_in_header, is_locked, overlap_checks, probe_format,
};
use drivers::{DetectZeroes, Discard};
pub(crate) use reopen::Reopened;

use crate::Reply;
use crate::arguments::Arguments;
use crate::context::Context;
use crate::errors::qmp_error;
use crate::graph::{
    ALL_PERMS, BackingLink, ChildLink, DeviceOptions, NO_CHANGE, Node, NodeDevice, NodeId, Parent, Perms,
    Released,
};

/// How deep nodes may stand on each other in one `blockdev-add`, backing files included.
const MAX_DEPTH: usize = 200;

/// What a node hands down to children that do not say otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Inherited {
    pub(crate) read_only: Option<bool>,
    pub(crate) force_share: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    /// Discards come from a node above, which has its own say about them.
    pub(crate) unmap: bool,
    pub(crate) depth: usize,
    /// Bytes of the L1 tables of the qcow2 nodes above that open this one.
    pub(crate) l1_bytes: u64,
}

/// The options that all drivers have, with what was inherited.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    pub(crate) read_only: bool,
    pub(crate) auto_read_only: bool,
    pub(crate) force_share: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    unmap: bool,
    detect_zeroes: bool,
    detect_unmap: bool,
    depth: usize,
    l1_bytes: u64,
}

/// What a driver has made of its options.
pub(crate) struct Opened {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) file: Option<Arc<FileStorage>>,
    pub(crate) qcow2: Option<Arc<blockmirror_qcow2::Qcow2>>,
    pub(crate) filename: String,
    pub(crate) path: Option<PathBuf>,
    /// Set by drivers that fall back to reading only.
    pub(crate) read_only: bool,
    pub(crate) children: Vec<ChildLink>,
}

impl Opened {
    /// A disk without children.
    pub(crate) fn leaf(device: Arc<dyn BlockDevice>, filename: String) -> Self {
        Self {
            device,
            storage: None,
            file: None,
            qcow2: None,
            filename,
            path: None,
            read_only: false,
            children: Vec::new(),
        }
    }
}

impl Common {
    /// What the options of a node say, with what it inherits.
    pub(crate) fn new(options: &CommonOptions, inherited: Inherited) -> Reply<Self> {
        let cache = options.cache.as_ref();
        let detect = options.detect_zeroes.unwrap_or(DetectZeroes::Off);
        let unmap = options.discard.map_or(inherited.unmap, |discard| discard == Discard::Unmap);
        if detect == DetectZeroes::Unmap && !unmap {
            return Err(QmpError::generic(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        let common = Self {
            read_only: options.read_only.or(inherited.read_only).unwrap_or(false),
            auto_read_only: options.auto_read_only.unwrap_or(inherited.read_only.is_some()),
            force_share: options.force_share.unwrap_or(inherited.force_share),
            direct: cache.and_then(|cache| cache.direct).unwrap_or(inherited.direct),
            no_flush: cache.and_then(|cache| cache.no_flush).unwrap_or(inherited.no_flush),
            unmap,
            detect_zeroes: detect != DetectZeroes::Off,
            detect_unmap: detect == DetectZeroes::Unmap,
            depth: inherited.depth,
            l1_bytes: inherited.l1_bytes,
        };
        if common.force_share && !common.read_only {
            return Err(QmpError::generic("force-share=on can only be used with read-only images"));
        }
        Ok(common)
    }

    /// What the node's device does.
    pub(crate) fn device_options(&self, read_only: bool) -> DeviceOptions {
        DeviceOptions {
            read_only,
            unmap: self.unmap,
            no_flush: self.no_flush,
            detect_zeroes: self.detect_zeroes,
            detect_unmap: self.detect_unmap,
        }
    }

    /// What a child that is this node's file gets.
    pub(crate) fn for_file(&self) -> Inherited {
        Inherited {
            read_only: Some(self.read_only),
            force_share: self.force_share,
            direct: self.direct,
            no_flush: self.no_flush,
            unmap: true,
            depth: self.depth + 1,
            l1_bytes: self.l1_bytes,
        }
    }

    /// Counts the L1 table of this node, called `filename`, which stays in memory; nothing has been allocated
    /// for it yet.
    pub(crate) fn count_l1(&mut self, entries: u32, filename: &str) -> Reply<()> {
        self.l1_bytes = self.l1_bytes.saturating_add(u64::from(entries) * 8);
        if self.l1_bytes <= MAX_CHAIN_L1_BYTES {
            return Ok(());
        }
        let (path, bytes) = (filename.into(), self.l1_bytes);
        Err(qmp_error(blockmirror_image::Error::ChainTables { path, bytes, limit: MAX_CHAIN_L1_BYTES }))
    }

    /// What a child that is this node's backing file gets.
    pub(crate) fn for_backing(&self) -> Inherited {
        Inherited { read_only: Some(true), ..self.for_file() }
    }
}

/// A child that is open, with what its user needs of it.
pub(crate) struct Child {
    pub(crate) name: String,
    /// The disk as users of a disk hold it.
    pub(crate) tap: Arc<Tap>,
    /// The disk below the tap, for those that do not move with a pivot.
    pub(crate) device: Arc<NodeDevice>,
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) filename: String,
    pub(crate) path: Option<PathBuf>,
    /// The host file that `path` led to.
    pub(crate) file: Option<FileId>,
    pub(crate) read_only: bool,
    /// Its length at this moment.
    len: u64,
}

impl Child {
    /// The node `name`.
    pub(crate) fn named(context: &Context, name: String) -> Reply<Self> {
        let graph = context.graph.lock();
        let node = graph.find(&name)?;
        Ok(Self {
            tap: Arc::clone(&node.tap),
            device: Arc::clone(&node.device),
            storage: node.storage.clone(),
            filename: node.filename.clone(),
            path: node.path.clone(),
            file: graph.file_below(&node.name),
            read_only: node.read_only,
            len: node.device.len(),
            name,
        })
    }

    /// What a format can live in.
    pub(crate) fn storage(&self) -> Reply<Arc<dyn Storage>> {
        self.storage.clone().ok_or_else(|| {
            QmpError::generic(format!(
                "Node '{}' cannot hold an image: only files and filters on files can",
                self.name
            ))
        })
    }

    /// The link of a format to the file it lives in.
    pub(crate) fn file_link(&self, role: &'static str, read_only: bool, shared: bool) -> ChildLink {
        let perm = if read_only { Perms::READ } else { Perms::READ_WRITE };
        let shared_perm = if shared { ALL_PERMS } else { NO_CHANGE };
        ChildLink {
            node: self.name.clone(),
            role,
            perm,
            shared_perm,
            link: None,
            len: self.len,
            storage: self.storage.clone(),
            claim: false,
        }
    }

    /// What a filter on the disk reads and writes by.
    pub(crate) fn below_filter(&self) -> Arc<BackingLink> {
        BackingLink::for_filter(Arc::clone(&self.tap) as _)
    }

    /// The child of a filter, by the `link` that its device holds: others may use the disk as the filter's
    /// own
    /// users do.
    pub(crate) fn filter_link(
        &self,
        role: &'static str,
        read_only: bool,
        link: &Arc<BackingLink>,
    ) -> ChildLink {
        let write = if read_only { Perms::READ } else { Perms::READ.with(Permission::Write) };
        ChildLink {
            node: self.name.clone(),
            role,
            perm: write,
            shared_perm: ALL_PERMS,
            link: Some(Arc::clone(link)),
            len: self.len,
            storage: None,
            claim: false,
        }
    }

    /// The link of an overlay to its backing file. As in QEMU, others may write it: those who do know what
    /// they do.
    pub(crate) fn backing_link(&self, link: Arc<BackingLink>) -> ChildLink {
        ChildLink {
            node: self.name.clone(),
            role: "backing",
            perm: Perms::READ,
            shared_perm: ALL_PERMS,
            link: Some(link),
            len: self.len,
            storage: None,
            claim: false,
        }
    }
}

impl Context {
    /// Opens a node that was asked for by name (`blockdev-add`).
    pub(crate) fn add_node(&self, options: &Map<String, Value>) -> Reply<()> {
        let name = CommonOptions::parse(options)?.node_name;
        let name =
            name.ok_or_else(|| QmpError::generic("'node-name' must be specified for the root node"))?;
        // Owned from the start: a user that goes would take it along.
        self.open(options, Inherited::default(), None, true)?;
        info!(name, "node added");
        Ok(())
    }

    /// Opens a node and what it stands on. It has no owner.
    pub(crate) fn open_node(&self, options: &Map<String, Value>, inherited: Inherited) -> Reply<NodeId> {
        self.open_node_on(options, inherited, None)
    }

    /// The same for a `file` node, where it is decided already which file that is.
    pub(crate) fn open_node_on(
        &self,
        options: &Map<String, Value>,
        inherited: Inherited,
        found: Option<Found>,
    ) -> Reply<NodeId> {
        self.open(options, inherited, found, false)
    }

    fn open(
        &self,
        options: &Map<String, Value>,
        inherited: Inherited,
        found: Option<Found>,
        owned: bool,
    ) -> Reply<NodeId> {
        if inherited.depth > MAX_DEPTH {
            return Err(QmpError::generic(format!("More than {MAX_DEPTH} nodes on each other")));
        }
        let given = CommonOptions::parse(options)?;
        if given.active == Some(false) {
            return Err(QmpError::generic("Inactive nodes are not supported"));
        }
        let common = Common::new(&given, inherited)?;
        let name = match given.node_name {
            Some(name) => {
                self.graph.lock().check_name(&name)?;
                name
            }
            None => self.graph.lock().name_for_unnamed(),
        };
        let driver = given.driver.0;
        let mut opening = Opening { context: self, common, found, children: Vec::new() };
        let result = (driver.open)(&mut opening, options)
            .and_then(|opened| self.put_in(&name, driver, options, common, opened, owned));
        if result.is_err() {
            opening.children.iter().for_each(|child| self.undo_node(child));
        }
        result
    }

    fn put_in(
        &self,
        name: &str,
        driver: &'static DriverEntry,
        options: &Map<String, Value>,
        common: Common,
        opened: Opened,
        owned: bool,
    ) -> Reply<NodeId> {
        let read_only = common.read_only || opened.read_only;
        let device = NodeDevice::new(opened.device, common.device_options(read_only));
        let mut node = Node {
            name: name.to_owned(),
            driver: &driver.node,
            filename: opened.filename,
            path: opened.path,
            storage: opened.storage,
            file: opened.file,
            host_size: Arc::default(),
            options: flattened(options),
            qcow2: opened.qcow2,
            bitmaps_at_open: Vec::new(),
            tap: Tap::named(Arc::clone(&device) as _, name),
            device,
            read_only,
            direct: common.direct,
            owned,
            number: 0,
        };
        node.load_bitmaps();
        let mut graph = self.graph.lock();
        if graph.get(name).is_some() {
            // Another client was faster: nodes are opened beside each other.
            drop(graph);
            self.close(Released { gone: vec![node], stale: Vec::new() });
            return Err(QmpError::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        let id = graph.insert(node);
        let linked = opened.children.iter().try_for_each(|child| {
            graph.check_not_blocked(&child.node)?;
            graph.check_holds(child)?;
            let parent = match child.claim {
                true => Parent::Claim { name: name.to_owned() },
                false => Parent::Node { name: name.to_owned(), role: child.role },
            };
            let attachment = graph.attach(&child.node, parent, child.perm, child.shared_perm)?;
            if let Some(link) = &child.link {
                graph.hold_link(attachment, link);
            }
            Ok(())
        });
        let hides = linked.and_then(|()| graph.check_hides_nothing(name));
        let released = if hides.is_err() { graph.undo(&id) } else { Released::default() };
        drop(graph);
        self.close(released);
        hides.map(|()| id)
    }
}

/// The file of a node whose name does not decide it.
#[derive(Debug)]
pub(crate) enum Found {
    /// A file that an image names, which has been judged.
    Handle(PathHandle),
    /// A file that a command has created, open for writing and locked.
    Created(Arc<FileStorage>),
    /// An export that a client names as an image.
    Export(NbdUri),
}

/// A node being opened: its options, and the children opened for it so far.
pub(crate) struct Opening<'a> {
    pub(crate) context: &'a Context,
    pub(crate) common: Common,
    /// The file that the node is to be, if that is not for its name to say.
    found: Option<Found>,
    /// Nodes that go again if the node does not come about.
    children: Vec<NodeId>,
}

impl Opening<'_> {
    /// The child that `reference` names, or that is opened with the options it holds.
    pub(crate) fn child(&mut self, reference: &NodeRef, inherited: Inherited) -> Reply<Child> {
        let name = match reference {
            NodeRef::Name(name) => name.clone(),
            NodeRef::Options(options) => {
                let child = self.context.open_node(options, inherited)?;
                let name = child.name.clone();
                self.children.push(child);
                name
            }
        };
        Child::named(self.context, name)
    }

    /// A child of the driver `file` on a file that an image names.
    fn child_on(&mut self, found: Resolved, inherited: Inherited) -> Reply<Child> {
        let mut options = Map::new();
        options.insert("driver".to_owned(), "file".into());
        options.insert("filename".to_owned(), shown(&found.path).into());
        let child = self.context.open_node_on(&options, inherited, Some(Found::Handle(found.handle)))?;
        let name = child.name.clone();
        self.children.push(child);
        Child::named(self.context, name)
    }
}

/// Options by dotted names, members of members too; what opens children is left out.
pub(crate) fn flattened(options: &Map<String, Value>) -> BTreeMap<String, Value> {
    let mut flat = BTreeMap::new();
    let mut open: Vec<_> = options.iter().map(|(name, value)| (name.clone(), value)).collect();
    while let Some((name, value)) = open.pop() {
        match value {
            _ if all_children().any(|child| child == name) => {}
            Value::Object(members) => {
                open.extend(members.iter().map(|(member, value)| (format!("{name}.{member}"), value)));
            }
            value => {
                flat.insert(name, value.clone());
            }
        }
    }
    flat
}

/// A path for people.
pub(crate) fn shown(path: &Path) -> String {
    path.display().to_string()
}
