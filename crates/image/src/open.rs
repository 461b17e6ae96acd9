//! Opening an image with everything below it.
//!
//! [`ChainOpener`] goes down the chain first: it opens each file, detects its format, reads its header, and
//! has the policy authorize the names in it; cycles and chains that are too deep are refused. Then each layer
//! becomes a device on the one below it, from the bottom up. No file is opened twice, and nothing recurses.

mod devices;
mod layer;
mod limits;
mod past_cache;
mod typed;

use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_file::{FileStorage, LockMode};
use blockmirror_filter::WriteThrough;
use blockmirror_qcow2::{Header, OverlapChecks, SnapshotRef};
use blockmirror_raw::Part;

use self::layer::Layer;
use crate::cache::CacheMode;
use crate::commit_base::CommitBase;
use crate::disk_image::{Image, LayerId, Note};
use crate::error::{Error, Result};
use crate::format::Format;
#[cfg(feature = "nbd")]
use crate::nbd::NbdOptions;
use crate::node_options::NodeOptions;
use crate::probe::probe;
use crate::protocol::{BackingTarget, read_rules};
use crate::protocol_id::ProtocolId;
use crate::protocol_layer::{Access, ProtocolLayer};
use crate::reference::{ReferenceError, ReferencePolicy, ReferenceRefusal, Resolved, Role, os_str};
use crate::storage_stamp::StorageStamp;

/// The deepest chain that is opened unless the caller sets another limit.
pub const MAX_CHAIN_DEPTH: u32 = 200;

/// The most bytes that the L1 tables of a chain may have together, 256 MiB: they stay in memory as long as
/// the chain is open. A table has 16 KiB for 1 TiB of disk with clusters of 64 KiB, and 4 MiB with clusters
/// of 4 KiB.
pub const MAX_CHAIN_L1_BYTES: u64 = 256 << 20;

/// How an image is to be opened.
///
/// The default: for reading, with the format detected and the files locked; no file that the image names is
/// opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    format: Option<Format>,
    writable: bool,
    lock: LockMode,
    claim: bool,
    cache: CacheMode,
    no_sync: bool,
    node: NodeOptions,
    snapshot: Option<SnapshotRef>,
    policy: ReferencePolicy,
    max_depth: u32,
    max_virtual_size: Option<u64>,
    with_backing: bool,
    past_cache: bool,
    read_back: bool,
    commit_base: Option<CommitBase>,
    compress: bool,
    holes_if_preallocated: bool,
    #[cfg(feature = "nbd")]
    nbd: NbdOptions,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            writable: false,
            lock: LockMode::Exclusive,
            claim: false,
            cache: CacheMode::default(),
            no_sync: false,
            node: NodeOptions::default(),
            snapshot: None,
            policy: ReferencePolicy::deny(),
            max_depth: MAX_CHAIN_DEPTH,
            max_virtual_size: None,
            with_backing: true,
            past_cache: false,
            read_back: false,
            commit_base: None,
            compress: false,
            holes_if_preallocated: false,
            #[cfg(feature = "nbd")]
            nbd: NbdOptions::new(),
        }
    }
}

impl OpenOptions {
    /// For reading, with the format detected, locked, without the files that the image names.
    pub fn new() -> Self {
        Self::default()
    }

    /// The format of the image itself; `None` detects it, and then a data file is not written to. (The
    /// layers below have theirs in the header above them.)
    #[must_use]
    pub fn format(mut self, format: impl Into<Option<Format>>) -> Self {
        self.format = format.into();
        self
    }

    /// Opens the image, and its data file if it has one, for writing. Layers below are only read, but for a
    /// [commit's base](Self::commit_base).
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable;
        self
    }

    /// How the files are locked. Without [`LockMode::Exclusive`] others may use them at the same time; what
    /// is read may then be inconsistent.
    #[must_use]
    pub fn lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// Which files named in images are opened.
    #[must_use]
    pub fn policy(mut self, policy: ReferencePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Opens for reading what the header of `image` names, or will name, as its backing file, if the policy
    /// allows it.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_backing_of(&self, image: &Path, name: &OsStr) -> Result<Image> {
        let target = BackingTarget::authorize(&self.policy, image, name)?;
        let protocol = self.open_backing(&target, false)?;
        self.for_opened(target.path(), &protocol).open_on(&protocol, target.path(), None)
    }

    /// Whether the backing file that the image names is opened; by default it is. Without it, what the image
    /// does not hold reads as zeros, and its extents say that it is not known.
    #[must_use]
    pub fn with_backing(mut self, open: bool) -> Self {
        self.with_backing = open;
        self
    }

    /// Opens a layer below the image for writing, too: [`Image::commit_base`]. That there is none is no
    /// error. By default none is.
    #[must_use]
    pub fn commit_base(mut self, base: impl Into<Option<CommitBase>>) -> Self {
        self.commit_base = base.into();
        self
    }

    /// Claims block devices that are written, and the image's own for reading too: opening fails while one is
    /// mounted or held, or a regular file below a loop device that is
    /// ([`blockmirror_file::FileOptions::claim`]). What lies below the image is never claimed.
    #[must_use]
    pub fn claim(mut self, claim: bool) -> Self {
        self.claim = claim;
        self
    }

    /// How the files of the whole chain use the host's page cache, and whether each write to the image is
    /// durable when it returns. Exports of NBD servers have no page cache here.
    #[must_use]
    pub fn cache(mut self, mode: CacheMode) -> Self {
        self.cache = mode;
        self
    }

    /// Flushes of the chain's files do nothing: nothing is durable before the system writes it back, and a
    /// crash of the host may leave any part of it. What is open says so
    /// ([`can_flush`](blockmirror_block::Geometry::can_flush)). Exports of NBD servers are flushed.
    #[must_use]
    pub fn no_sync(mut self, no_sync: bool) -> Self {
        self.no_sync = no_sync;
        self
    }

    /// Which kinds of metadata each write to a qcow2 image is checked against.
    #[must_use]
    pub fn overlap_checks(mut self, checks: OverlapChecks) -> Self {
        self.node.overlap_checks = checks;
        self
    }

    /// The image lies in this part of its file only. Layers below it lie in all of theirs.
    #[must_use]
    pub fn part(mut self, part: Part) -> Self {
        self.node.part = part;
        self
    }

    /// What the image's name says besides its path and format: in place of what
    /// [`part`](Self::part) and [`overlap_checks`](Self::overlap_checks) have said.
    #[must_use]
    pub fn node(mut self, node: NodeOptions) -> Self {
        self.node = node;
        self
    }

    /// Opens an internal snapshot of the image in place of its disk, for reading. Layers below it are opened
    /// as they are.
    #[must_use]
    pub fn snapshot(mut self, snapshot: impl Into<Option<SnapshotRef>>) -> Self {
        self.snapshot = snapshot.into();
        self
    }

    /// Stores whole clusters that are written compressed. A raw image, or one with a data file, is refused.
    #[must_use]
    pub fn compress(mut self, compress: bool) -> Self {
        self.compress = compress;
        self
    }

    /// Looks for holes below mapped clusters as QEMU does
    /// ([`blockmirror_qcow2::OpenOptions::holes_if_preallocated`]), in all images of the chain.
    #[must_use]
    pub fn holes_if_preallocated(mut self, only: bool) -> Self {
        self.holes_if_preallocated = only;
        self
    }

    /// How an NBD server is connected to, if the path is a URI.
    #[cfg(feature = "nbd")]
    #[must_use]
    pub fn nbd(mut self, options: NbdOptions) -> Self {
        self.nbd = options;
        self
    }

    /// Opens `path` and what it stands on.
    ///
    /// # Errors
    /// [`Error`], naming the file of the chain that could not be opened.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Image> {
        let path = path.as_ref();
        let protocol = self.open_named(path, self.access(self.writable, self.claim))?;
        self.for_opened(path, &protocol).open_on(&protocol, path, None)
    }

    /// Opens the image in a file that is open already, and what it stands on. `path` is what messages call
    /// it, and what the names in it are relative to. Whether it is written, locked or cached is the file's
    /// own affair; these options say it of what the image stands on.
    ///
    /// ```
    /// use std::fs::File;
    /// use std::sync::Arc;
    /// use blockmirror_file::FileOptions;
    /// use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
    ///
    /// let dir = tempfile::tempdir()?;
    /// let path = dir.path().join("disk.qcow2");
    /// let spec = CreateSpec::new(Format::Qcow2, 1 << 30, CreateSettings::default());
    /// NewImage::create(&path, &spec)?.persist()?;
    /// let descriptor = File::open(&path)?;
    ///
    /// let file = FileOptions::new().from_fd(descriptor.into(), &path)?;
    /// let image = OpenOptions::new().open_storage(Arc::new(file), &path)?;
    /// assert!(image.qcow2().is_some() && image.device().len() == 1 << 30);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_storage(&self, file: Arc<FileStorage>, path: impl AsRef<Path>) -> Result<Image> {
        let path = path.as_ref();
        let protocol = ProtocolLayer::File(file);
        self.for_opened(path, &protocol).open_on(&protocol, path, None)
    }

    /// Opens the image in `protocol`, which has the name `path`, and what it stands on; `data` is where its
    /// data lies if that is open already. What is written to depends on how `protocol` was opened.
    pub(crate) fn open_on(
        &self,
        protocol: &ProtocolLayer,
        path: &Path,
        data: Option<&ProtocolLayer>,
    ) -> Result<Image> {
        let mut opener = ChainOpener::new(self, protocol);
        opener.files.extend(data.iter().map(|data| data.id()));
        let data = data.map(ProtocolLayer::storage);
        let name = path.to_owned();
        let (mut top, below) =
            opener.layer(protocol, self.node.part, path.to_owned(), name, self.format, data)?;
        top.snapshot.clone_from(&self.snapshot);
        let own_files = opener.files.len();
        let reads_as_its_path = self.node.reads_as_its_path() && self.snapshot.is_none();
        opener.layers.push(reads_as_its_path.then(|| (protocol.id(), top.format)));
        let typed = opener.open_typed_backing(path)?;
        let lower = opener.open_lower_layers(below)?;
        let image = opener.build(top, lower, typed, own_files)?;
        // A snapshot may be longer than the disk.
        self.check_virtual_size(image.device.len(), path)?;
        Ok(image)
    }

    /// Opens the files of the qcow2 image `path` and of what it stands on, for a change of the image that
    /// opens it itself: its storage, and how it is opened. `None` if it has another format.
    pub(crate) fn open_files(&self, path: &Path) -> Result<Option<OpenFiles>> {
        let protocol = self.open_named(path, self.access(self.writable, self.claim))?;
        let options = self.for_opened(path, &protocol);
        let mut opener = ChainOpener::new(&options, &protocol);
        let name = path.to_owned();
        let (top, below) =
            opener.layer(&protocol, self.node.part, path.to_owned(), name, self.format, None)?;
        if top.format != Format::Qcow2 {
            return Ok(None);
        }
        let typed = opener.open_typed_backing(path)?;
        let lower = opener.open_lower_layers(below)?;
        let below = opener.lower_devices(lower, typed)?;
        let open = top.qcow2_options(below.device, self);
        Ok(Some(OpenFiles { storage: top.storage, open, notes: opener.notes }))
    }

    pub(crate) fn given_format(&self) -> Option<Format> {
        self.format
    }

    pub(crate) fn given_node(&self) -> &NodeOptions {
        &self.node
    }

    /// With the policy for the image that is open in `protocol` by the name `path`.
    pub(crate) fn for_opened(&self, path: &Path, protocol: &ProtocolLayer) -> Self {
        Self { policy: self.policy.for_opened(path, &protocol.id()), ..self.clone() }
    }

    /// Opens what the caller names `path`.
    pub(crate) fn open_protocol(&self, path: &Path, writable: bool) -> Result<ProtocolLayer> {
        self.open_named(path, self.access(writable, writable && self.claim))
    }

    /// Opens the file or export `path`, or what the image's name has in its place.
    fn open_named(&self, path: &Path, access: Access) -> Result<ProtocolLayer> {
        let protocol = match self.node.null {
            Some(null) => ProtocolLayer::zeros(null.disk()),
            None => ProtocolLayer::open(path, access)?,
        };
        #[cfg(feature = "nbd")]
        self.refuse_context(path)?;
        match &self.node.file_rules {
            Some(rules) => ProtocolLayer::failing(protocol, rules.read()?),
            None => Ok(protocol),
        }
    }

    fn open_backing(&self, target: &BackingTarget, writable: bool) -> Result<ProtocolLayer> {
        match target {
            BackingTarget::File(file) => self.open_resolved(file, writable),
            BackingTarget::Null => Ok(ProtocolLayer::null()),
            BackingTarget::Blkdebug { rules, image } => {
                let rules = rules.as_deref().map(read_rules).transpose()?.unwrap_or_default();
                ProtocolLayer::failing(self.open_resolved(image, writable)?, rules)
            }
        }
    }

    fn open_resolved(&self, file: &Resolved, writable: bool) -> Result<ProtocolLayer> {
        ProtocolLayer::open_handle(&file.handle, &file.path, self.access(writable, writable && self.claim))
    }

    /// `device`, each write of which is durable if the cache mode says so.
    fn written_through(&self, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        match self.cache.writes_through() && device.geometry().writable {
            true => Arc::new(WriteThrough::new(device)),
            false => device,
        }
    }

    pub(crate) fn access(&self, writable: bool, claim: bool) -> Access {
        Access {
            writable,
            lock: self.lock,
            claim,
            direct: self.cache.is_direct() || self.node.direct,
            past_cache: self.past_cache,
            no_sync: self.no_sync,
            #[cfg(feature = "nbd")]
            nbd: self.nbd,
        }
    }
}

/// The files of an image that is not open yet.
pub(crate) struct OpenFiles {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) open: blockmirror_qcow2::OpenOptions,
    pub(crate) notes: Vec<Note>,
}

/// The backing file that a header names: authorized, not yet opened.
pub(crate) struct BackingRef {
    /// The image that names it.
    above: PathBuf,
    name: PathBuf,
    pub(crate) target: BackingTarget,
    pub(crate) format: Option<Format>,
}

impl BackingRef {
    /// What `header`, of the image `above`, names as its backing file, if the policy of `options` allows it.
    pub(crate) fn authorize(options: &OpenOptions, above: &Path, header: &Header) -> Result<Option<Self>> {
        let Some(backing) = &header.backing else { return Ok(None) };
        let format = match backing.format.as_deref() {
            None | Some("") => None,
            Some(format) => {
                let known = Format::in_header(format);
                Some(known.map_err(|cause| Error::BackingFormat { path: above.to_owned(), cause })?)
            }
        };
        Ok(Some(Self {
            above: above.to_owned(),
            name: backing.name.as_path().to_owned(),
            target: BackingTarget::authorize(&options.policy, above, os_str(&backing.name))?,
            format,
        }))
    }

    /// Opens the file, `depth` images below the top, unless it is among `files` already: for reading, or if
    /// it is the [commit's base](OpenOptions::commit_base) for writing.
    pub(crate) fn open(
        &self,
        options: &OpenOptions,
        depth: usize,
        files: &mut Vec<ProtocolId>,
        writable: bool,
    ) -> Result<ProtocolLayer> {
        let refused = |reason| refuse(&self.above, Role::Backing, &self.name, reason);
        if depth >= options.max_depth as usize {
            return Err(refused(ReferenceRefusal::TooDeep(options.max_depth)));
        }
        // Before it is opened: a lock of our own would be in the way.
        if let BackingTarget::File(file) = &self.target
            && file.handle.id().is_some_and(|id| files.contains(&ProtocolId::File(id)))
        {
            return Err(refused(ReferenceRefusal::Cycle));
        }
        let file = match writable {
            true => {
                let policy = options.policy.for_writing();
                let target = BackingTarget::authorize(&policy, &self.above, self.name.as_os_str())?;
                options.open_backing(&target, true)?
            }
            false => options.open_backing(&self.target, false)?,
        };
        if files.contains(&file.id()) {
            return Err(refused(ReferenceRefusal::Cycle));
        }
        files.push(file.id());
        Ok(file)
    }
}

/// Opens the layers of one chain.
struct ChainOpener<'a> {
    options: &'a OpenOptions,
    files: Vec<ProtocolId>,
    layers: Vec<LayerId>,
    stamps: Vec<Option<StorageStamp>>,
    notes: Vec<Note>,
    /// Of the layers so far.
    l1_bytes: u64,
    /// Which of the lower layers is the commit's base, and which of `files` are its own.
    base: Option<(usize, Range<usize>)>,
}

impl<'a> ChainOpener<'a> {
    /// For the image in `protocol`.
    fn new(options: &'a OpenOptions, protocol: &ProtocolLayer) -> Self {
        let files = vec![protocol.id()];
        Self { options, files, layers: vec![], stamps: vec![], notes: vec![], l1_bytes: 0, base: None }
    }

    /// Follows the backing files from `below` to the end of the chain.
    fn open_lower_layers(&mut self, mut below: Option<BackingRef>) -> Result<Vec<Layer>> {
        let mut layers = Vec::new();
        while let Some(next) = below {
            // The top image is not in `layers`.
            let depth = layers.len() + 1;
            let wanted = self.options.commit_base.as_ref().filter(|_| self.base.is_none());
            let is_base = wanted.is_some_and(|base| base.is(&next.above, &next.name, &next.target, depth));
            let first_file = self.files.len();
            let protocol = next.open(self.options, depth, &mut self.files, is_base)?;
            let BackingRef { above, name, target, format } = next;
            let path = target.path().to_owned();
            let (layer, its_below) = self.layer(&protocol, Part::default(), path, name, format, None)?;
            self.layers.push(Some((protocol.id(), layer.format)));
            if is_base {
                self.base = Some((layers.len(), first_file..self.files.len()));
            }
            if layer.guessed {
                self.notes.push(Note::BackingFormatGuessed { image: above, format: layer.format });
            }
            layers.push(layer);
            below = its_below;
        }
        Ok(layers)
    }

    /// Reads the header of one image, opens its data file unless that is open already, and has
    /// the name of its backing file authorized.
    fn layer(
        &mut self,
        protocol: &ProtocolLayer,
        part: Part,
        path: PathBuf,
        name: PathBuf,
        given: Option<Format>,
        data: Option<Arc<dyn Storage>>,
    ) -> Result<(Layer, Option<BackingRef>)> {
        self.stamps.push(protocol.stamp()?);
        let mut storage = part.of(protocol.storage())?;
        let format = match given {
            Some(format) => format,
            None => probe(&*storage, &path)?,
        };
        if format == Format::Raw {
            storage = part.of(protocol.plain_storage())?;
            self.options.check_virtual_size(storage.len()?, &path)?;
        }
        let guessed = given.is_none();
        let mut layer = Layer { path, storage, format, guessed, data, name, snapshot: None };
        let mut below = None;
        if format == Format::Qcow2 {
            let header =
                Header::read(&*layer.storage).map_err(|e| e.in_file(&layer.storage.name().into()))?;
            self.options.check_virtual_size(header.virtual_size, &layer.path)?;
            self.count_l1(&layer, &header)?;
            if layer.data.is_none() {
                layer.data = self.open_data_file(&layer, &header)?;
            }
            let from_header = !self.options.node.no_backing && self.options.node.backing.is_none();
            if self.options.with_backing && from_header {
                below = BackingRef::authorize(self.options, &layer.path, &header)?;
            }
        }
        Ok((layer, below))
    }

    /// Counts the L1 table of `layer`, which stays in memory; nothing has been allocated for it yet.
    fn count_l1(&mut self, layer: &Layer, header: &Header) -> Result<()> {
        self.l1_bytes = self.l1_bytes.saturating_add(u64::from(header.l1_entries) * 8);
        if self.l1_bytes <= MAX_CHAIN_L1_BYTES {
            return Ok(());
        }
        Err(Error::ChainTables { path: layer.path.clone(), bytes: self.l1_bytes, limit: MAX_CHAIN_L1_BYTES })
    }

    fn open_data_file(&mut self, layer: &Layer, header: &Header) -> Result<Option<Arc<dyn Storage>>> {
        let (image, writable) = (&*layer.path, layer.storage.info().writable);
        let Some(data) = &header.data_file else { return Ok(None) };
        let Some(name) = &data.name else { return Err(Error::NoDataFile { path: image.to_owned() }) };
        if writable && layer.guessed && !self.options.policy.allows_all() {
            return Err(refuse(image, Role::Data, name.as_path(), ReferenceRefusal::Guessed));
        }
        let policy = &self.options.policy;
        let found = match writable {
            true => policy.for_writing().resolve(image, Role::Data, os_str(name))?,
            false => policy.resolve(image, Role::Data, os_str(name))?,
        };
        let file = self.options.open_resolved(&found, writable)?;
        if self.files.contains(&file.id()) {
            return Err(refuse(image, Role::Data, name.as_path(), ReferenceRefusal::Cycle));
        }
        self.files.push(file.id());
        self.stamps.push(file.stamp()?);
        Ok(Some(file.storage()))
    }
}

fn refuse(image: &Path, role: Role, name: &Path, reason: ReferenceRefusal) -> Error {
    ReferenceError { image: image.to_owned(), role, name: name.to_owned(), reason }.into()
}
