//! An open qcow2 image: how it is opened, and the [`BlockDevice`] it is.
//!
//! Reading is in `read`, writing in `write` and `zero`, durability in `writeback`; this file ties them
//! together.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    Backing, BlockDevice, ByteRange, DiscardEffect, Error as BlockError, ErrorKind, Extent, Geometry,
    RangeLock, Result as BlockResult, Storage, Visit, WriteFlags, ZeroCost, ZeroFlags,
};
use byteorder::{BigEndian, ByteOrder};

use crate::cache::SliceCache;
use crate::compressed::Decompressors;
use crate::context::{BackingLayer, ImageContext};
use crate::error::{Error, Result};
use crate::format::bitmaps::Bitmaps;
use crate::format::entry::{EntryFormat, L1Entry};
use crate::format::feature;
use crate::format::header::Header;
use crate::format::refcount::RefcountWidth;
use crate::format::snapshot::Snapshots;
use crate::holes::KnownData;
use crate::meta::Meta;
use crate::offset::{ClusterSize, HostOffset};
use crate::overlap::MetadataMap;
use crate::refcounts::Refcounts;
use crate::stop::Cancellations;
use crate::writeback::FlushGate;

/// Bytes of metadata kept in memory unless [`OpenOptions::cache_bytes`] says otherwise.
pub const DEFAULT_CACHE_BYTES: usize = 32 << 20;

/// Where the version 3 header holds the incompatible features, and the autoclear features.
const HEADER_INCOMPATIBLE: u64 = 72;
const HEADER_AUTOCLEAR: u64 = 88;

/// How to open an image.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, testing::MemoryStorage};
/// use blockmirror_qcow2::{CreateOptions, OpenOptions};
///
/// let storage = Arc::new(MemoryStorage::new());
/// CreateOptions::new(1 << 20).create(&*storage, None)?;
/// let disk = OpenOptions::new().writable(true).open(storage)?;
/// disk.write_at(b"hello", 4096, Default::default())?;
/// disk.flush()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    writable: bool,
    backing: Option<Arc<dyn BlockDevice>>,
    data_file: Option<Arc<dyn Storage>>,
    cache_bytes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { writable: false, backing: None, data_file: None, cache_bytes: DEFAULT_CACHE_BYTES }
    }
}

impl OpenOptions {
    /// Read-only, without a backing device.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the image may be written.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable;
        self
    }

    /// What shows through where the image holds nothing. Finding and opening it is the caller's matter: this
    /// crate opens no file. An image that names a backing file but is opened without one reads zeros there,
    /// and what is zeroed or discarded stays zero when the backing file comes back; a write of part of a
    /// cluster makes the rest zero.
    #[must_use]
    pub fn backing(mut self, device: Arc<dyn BlockDevice>) -> Self {
        self.backing = Some(device);
        self
    }

    /// The external data file of an image that has one.
    #[must_use]
    pub fn data_file(mut self, storage: Arc<dyn Storage>) -> Self {
        self.data_file = Some(storage);
        self
    }

    /// How much metadata to keep in memory, in bytes, besides the L1 table and the refcount table. A few
    /// slices are always kept.
    #[must_use]
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.cache_bytes = bytes;
        self
    }

    /// Opens the image in `storage`.
    ///
    /// # Errors
    /// Everything that [`Header::read`] refuses; an image that must not be written, if it is to be, or whose
    /// file was cut short then; a data file where there should be none, or none where there should be one; an
    /// L1 table that the file does not hold.
    pub fn open(self, storage: Arc<dyn Storage>) -> Result<Qcow2> {
        let header = Header::read(&*storage)?;
        if self.writable {
            header.check_writable()?;
        }
        match (&header.data_file, &self.data_file) {
            (Some(_), None) => {
                return Err(data_file_error(
                    storage.name(),
                    "it keeps its data in an external file, which was not given",
                ));
            }
            (None, Some(_)) => {
                return Err(data_file_error(
                    storage.name(),
                    "an external data file was given, but the image has none",
                ));
            }
            _ => {}
        }
        check_directories(&header, &*storage)?;
        let header_field = |field, value| Error::HeaderField { field, value, allowed: "out of range".into() };
        let cluster = ClusterSize::from_bits(header.cluster_bits)
            .ok_or_else(|| header_field("cluster_bits", header.cluster_bits.into()))?;
        let width = RefcountWidth::from_order(header.refcount_order)
            .ok_or_else(|| header_field("refcount_order", header.refcount_order.into()))?;
        let ctx = ImageContext {
            format: EntryFormat {
                cluster,
                extended: header.extended_l2,
                has_zero: header.version >= 3,
                external_data: header.data_file.is_some(),
            },
            size: AtomicU64::new(header.virtual_size),
            name: storage.name().into(),
            storage,
            data_file: self.data_file,
            known_data: KnownData::default(),
            below: Mutex::new(BackingLayer { device: self.backing, named: header.backing.is_some() }),
        };
        let l1_at = HostOffset(header.l1_offset);
        let l1: Vec<L1Entry> = read_table(&ctx, "read L1 table", l1_at, header.l1_entries.into())?
            .into_iter()
            .map(L1Entry)
            .collect();
        // Three parts L2 to one part refcounts, which are touched far more locally.
        let refcounts = if self.writable {
            let mut metadata = MetadataMap::default();
            metadata.claim(&ctx, "the header", ByteRange::new(0, cluster.bytes()))?;
            metadata.claim(&ctx, "the L1 table", ByteRange::at(l1_at.0, u64::from(header.l1_entries) * 8))?;
            metadata.claim_l2_tables(&ctx, &l1)?;
            let table_at = HostOffset(header.refcount_table_offset);
            let entries = u64::from(header.refcount_table_clusters) << (cluster.bits() - 3);
            let table = read_table(&ctx, "read refcount table", table_at, entries)?;
            let blocks = SliceCache::new(ctx.slice_size(), self.cache_bytes / 4);
            Some(Refcounts::new(&ctx, width, table_at, table, blocks, metadata)?)
        } else {
            None
        };
        let l2_bytes = if self.writable { self.cache_bytes - self.cache_bytes / 4 } else { self.cache_bytes };
        let l2 = SliceCache::new(ctx.slice_size(), l2_bytes);
        let image = Qcow2 {
            geometry: geometry(&ctx, self.writable, header.data_file.as_ref().is_some_and(|d| d.raw)),
            decompressors: Decompressors::new(header.compression, cluster),
            ctx,
            raw_data_file: header.data_file.as_ref().is_some_and(|d| d.raw),
            header: Mutex::new(Arc::new(header)),
            changing: Mutex::new(()),
            writable: self.writable,
            cache_bytes: self.cache_bytes,
            meta: Mutex::new(Meta::new(l1, l1_at, l2, refcounts)),
            write_back: Mutex::new(()),
            gate: FlushGate::default(),
            ranges: RangeLock::new(),
            cancellations: Cancellations::default(),
        };
        if image.writable {
            image.check_whole()?;
            image.clear_unknown_autoclear()?;
        }
        Ok(image)
    }
}

/// Damage in the snapshot table or in the directory of valid bitmaps says that the rest is not to be trusted
/// either.
fn check_directories(header: &Header, storage: &dyn Storage) -> Result<()> {
    for snapshot in Snapshots::new(storage, header)? {
        snapshot?;
    }
    if let Some(extension) = header.bitmaps.as_ref().filter(|_| header.bitmaps_valid()) {
        for bitmap in Bitmaps::new(storage, extension)? {
            bitmap?;
        }
    }
    Ok(())
}

fn data_file_error(name: &str, problem: &str) -> Error {
    Error::Storage(
        BlockError::new(ErrorKind::InvalidInput, "open qcow2 image").in_file(name).because(problem),
    )
}

/// Reads a table of `entries` words. The header's caps bound the count; that the file is long enough is
/// checked before anything is allocated for it.
fn read_table(ctx: &ImageContext, operation: &'static str, at: HostOffset, entries: u64) -> Result<Vec<u64>> {
    let len = ctx.storage.len()?;
    let bytes = entries * 8;
    if entries > 0 && at.0.checked_add(bytes).is_none_or(|end| end > len) {
        let why = format!("the table of {bytes} bytes reaches past the end of the file at {len}");
        return Err(ctx.corrupt(operation, at.0, why).into());
    }
    // At most 32 MiB, by the caps on the header.
    let mut raw = vec![0; bytes as usize];
    ctx.storage.read_at(&mut raw, at.0)?;
    let mut table = vec![0; entries as usize];
    BigEndian::read_u64_into(&raw, &mut table);
    Ok(table)
}

fn geometry(ctx: &ImageContext, writable: bool, raw_data_file: bool) -> Geometry {
    let mut geometry = Geometry::plain();
    geometry.cluster_size = Some(ctx.cluster().bytes());
    geometry.subcluster_size = ctx.format.extended.then(|| ctx.format.subcluster_size());
    geometry.request_alignment = ctx.data().info().request_alignment;
    let backed = ctx.backing().is_some() || ctx.hidden_backing();
    // A raw data file must hold the zeros itself.
    let by_metadata = (ctx.format.has_zero || !backed) && !raw_data_file;
    geometry.zero_cost = if by_metadata { ZeroCost::Metadata } else { ZeroCost::Data };
    geometry.discard =
        if ctx.format.has_zero || !backed { DiscardEffect::Frees } else { DiscardEffect::Ignored };
    geometry.writable = writable;
    geometry.can_flush = ctx.storage.info().can_flush && ctx.data().info().can_flush;
    geometry
}

/// An open qcow2 image.
///
/// Metadata is written back by [`flush`](BlockDevice::flush), or when much of it has changed. An image that
/// is dropped without a flush loses what was not flushed, as a disk does when the power goes; it stays
/// consistent.
#[derive(Debug)]
pub struct Qcow2 {
    pub(crate) ctx: ImageContext,
    raw_data_file: bool,
    /// Held for a look, and to put another in its place.
    header: Mutex<Arc<Header>>,
    /// Held during changes of length or backing file. Taken before all others.
    pub(crate) changing: Mutex<()>,
    geometry: Geometry,
    writable: bool,
    /// What [`OpenOptions::cache_bytes`] was.
    pub(crate) cache_bytes: usize,
    /// Mapping and refcounts. Held for look-ups and metadata I/O, never while guest data moves. Taken after
    /// `write_back`, if both.
    pub(crate) meta: Mutex<Meta>,
    /// Held while metadata is written back.
    pub(crate) write_back: Mutex<()>,
    gate: FlushGate,
    /// Guest ranges in use: shared by reads and overwrites in place, exclusive where the mapping changes.
    /// Taken before the other two.
    pub(crate) ranges: RangeLock,
    pub(crate) decompressors: Decompressors,
    pub(crate) cancellations: Cancellations,
}

impl Qcow2 {
    /// The header. Later changes of length and backing file are not seen in it; the refcount table may move.
    pub fn header(&self) -> Arc<Header> {
        Arc::clone(&self.header.lock())
    }

    pub(crate) fn set_header(&self, header: Header) {
        *self.header.lock() = Arc::new(header);
    }

    /// The storage the image lies in.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.ctx.storage
    }

    /// The backing device, if one is attached.
    pub fn backing(&self) -> Option<Arc<dyn BlockDevice>> {
        self.ctx.backing()
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether the external data file is to be a valid raw image by itself.
    pub(crate) fn raw_data_file(&self) -> bool {
        self.raw_data_file
    }

    /// Checks a request against the disk's bounds.
    pub(crate) fn bounds(
        &self,
        operation: &'static str,
        range: Option<ByteRange>,
        offset: u64,
        len: u64,
    ) -> BlockResult<ByteRange> {
        match range {
            Some(range) if range.end() <= self.ctx.size() => Ok(range),
            _ => Err(BlockError::out_of_bounds(operation, offset, len, self.ctx.size())
                .in_file(self.ctx.name.clone())),
        }
    }

    pub(crate) fn check_writable(&self, operation: &'static str) -> BlockResult<()> {
        if self.writable {
            return Ok(());
        }
        Err(BlockError::new(ErrorKind::ReadOnly, operation)
            .in_file(self.ctx.name.clone())
            .because("the image was opened read-only"))
    }

    /// Autoclear features speak of things that a writer who does not know them makes stale.
    fn clear_unknown_autoclear(&self) -> Result<()> {
        let header = self.header();
        let kept = header.autoclear_when_written();
        if kept != header.autoclear {
            self.write_header_word(HEADER_AUTOCLEAR, kept)?;
        }
        Ok(())
    }

    /// Marks the image corrupt, on disk and here, after an operation has met damage.
    pub(crate) fn mark_corrupt(&self, why: &BlockError) {
        self.meta.lock().poisoned.get_or_insert_with(|| why.to_string());
        // No other thread writes the first sector of the header meanwhile.
        let _no_write_back = self.write_back.lock();
        let header = self.header();
        if header.version >= 3 {
            // If this fails too there is nothing left to try: the image is poisoned already.
            let _ = self
                .write_header_word(HEADER_INCOMPATIBLE, header.incompatible | feature::INCOMPATIBLE_CORRUPT);
        }
    }

    fn write_header_word(&self, at: u64, value: u64) -> BlockResult<()> {
        let mut bytes = [0; 8];
        BigEndian::write_u64(&mut bytes, value);
        self.write_header(at, &bytes)
    }

    /// Writes part of the header, durably. All that it points at must be durable. If it fails the image is
    /// poisoned.
    pub(crate) fn write_header(&self, at: u64, bytes: &[u8]) -> BlockResult<()> {
        self.ctx.write_header(at, bytes).map_err(|failure| failure.settle(&mut self.meta.lock()))
    }
}

impl BlockDevice for Qcow2 {
    fn len(&self) -> u64 {
        self.ctx.size()
    }

    fn name(&self) -> &str {
        &self.ctx.name
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.geometry;
        geometry.backing = if self.raw_data_file() { Backing::None } else { self.ctx.backing_state() };
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        let range = self.bounds("read", ByteRange::checked(offset, buf.len()), offset, buf.len() as u64)?;
        let _pin = self.is_writable().then(|| self.ranges.shared(range));
        self.read_mapped(buf, range)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> BlockResult<()> {
        let range = self.bounds("write", ByteRange::checked(offset, buf.len()), offset, buf.len() as u64)?;
        self.write_mapped(buf, range, flags)?;
        if flags.contains(WriteFlags::FUA) { self.flush() } else { Ok(()) }
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> BlockResult<()> {
        let range = self.bounds("write zeroes", Some(range), range.start(), range.len())?;
        self.zero(range, flags)?;
        if flags.contains(ZeroFlags::FUA) { self.flush() } else { Ok(()) }
    }

    fn discard(&self, range: ByteRange) -> BlockResult<()> {
        let range = self.bounds("discard", Some(range), range.start(), range.len())?;
        self.discard_mapped(range)
    }

    fn flush(&self) -> BlockResult<()> {
        if !self.writable {
            return Ok(());
        }
        self.gate.join(|| self.write_back())
    }

    fn cancel_in_flight(&self) {
        self.cancellations.cancel();
        self.ctx.storage.cancel_in_flight();
        if let Some(data_file) = &self.ctx.data_file {
            data_file.cancel_in_flight();
        }
        if let Some(backing) = self.ctx.backing() {
            backing.cancel_in_flight();
        }
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> BlockResult<()> {
        let range = self.bounds("map", Some(range), range.start(), range.len())?;
        self.visit_extents(range, visit)
    }

    fn preallocate(&self, range: ByteRange) -> BlockResult<()> {
        let range = self.bounds("preallocate", Some(range), range.start(), range.len())?;
        self.map_ahead(range)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> BlockResult<()> {
        self.resize_to(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> BlockResult<u64> {
        let range = self.bounds("copy up", Some(range), range.start(), range.len())?;
        self.copy_up_range(range, max_depth)
    }
}
