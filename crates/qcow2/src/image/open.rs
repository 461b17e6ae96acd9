//! Opening an image: header, L1 table and, for writing, the refcount table and the map of metadata.
//!
//! Every size that the header declares is checked against its cap and the file before anything is allocated.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    BlockDevice, DiscardEffect, Error as BlockError, ErrorKind, Geometry, GroupCommit, RangeLock, Storage,
    ZeroCost,
};
use byteorder::{BigEndian, ByteOrder};

use super::Qcow2;
use crate::bitmap_list::{ImageBitmaps, claim_bitmaps};
use crate::cache::SliceCache;
use crate::compressed::Decompressors;
use crate::compressors::Compressors;
use crate::context::{BackingLayer, ImageContext};
use crate::error::{Error, Result};
use crate::format::bitmaps::Bitmaps;
use crate::format::entry::{EntryFormat, L1Entry};
use crate::format::header::Header;
use crate::format::refcount::RefcountWidth;
use crate::format::snapshot::Snapshots;
use crate::inactive;
use crate::known_data::KnownData;
use crate::meta::Meta;
use crate::offset::{ClusterSize, HostOffset};
use crate::overlap::{MetadataKind, MetadataMap, OverlapChecks};
use crate::preallocated::is_preallocated;
use crate::refcounts::Refcounts;
use crate::repair::repair_dirty;
use crate::snapshot_ref::SnapshotRef;
use crate::stop::Cancellations;

/// Bytes of metadata kept in memory unless [`OpenOptions::cache_bytes`] says otherwise.
pub const DEFAULT_CACHE_BYTES: usize = 32 << 20;

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
    without_backing: bool,
    holes_if_preallocated: bool,
    whole_tables: bool,
    data_file: Option<Arc<dyn Storage>>,
    cache_bytes: usize,
    overlap_checks: OverlapChecks,
    snapshot: Option<SnapshotRef>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            writable: false,
            backing: None,
            without_backing: false,
            holes_if_preallocated: false,
            whole_tables: false,
            data_file: None,
            cache_bytes: DEFAULT_CACHE_BYTES,
            overlap_checks: OverlapChecks::default(),
            snapshot: None,
        }
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

    /// Opens the image as if its header named no backing file: what it does not hold is known to read as
    /// zeros. For reading: a write could not say what is to show once the backing file is back.
    #[must_use]
    pub fn without_backing(mut self) -> Self {
        self.without_backing = true;
        self
    }

    /// Looks for holes of the file below mapped clusters only if the image has more clusters in use than its
    /// file holds (it was preallocated), as QEMU does; elsewhere such a hole counts as data then. Not in an
    /// external data file. By default holes are looked for, so that a copy need not read them.
    #[must_use]
    pub fn holes_if_preallocated(mut self, only: bool) -> Self {
        self.holes_if_preallocated = only;
        self
    }

    /// Writes new L2 tables whole, so that the file takes the space that QEMU gives it. By default only what
    /// is touched of a table is written where the rest reads as zeros by itself.
    #[must_use]
    pub fn whole_tables(mut self, whole: bool) -> Self {
        self.whole_tables = whole;
        self
    }

    /// The external data file of an image that has one.
    #[must_use]
    pub fn data_file(mut self, storage: Arc<dyn Storage>) -> Self {
        self.data_file = Some(storage);
        self
    }

    /// Opens a snapshot in place of the active disk, for reading: the device shows what the disk held when
    /// the snapshot was taken, and is as long as the disk was then. [`Qcow2::header`] has its length and its
    /// L1 table.
    #[must_use]
    pub fn snapshot(mut self, snapshot: impl Into<Option<SnapshotRef>>) -> Self {
        self.snapshot = snapshot.into();
        self
    }

    /// How much metadata to keep in memory, in bytes, besides the L1 table and the refcount table. A few
    /// slices are always kept.
    #[must_use]
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.cache_bytes = bytes;
        self
    }

    /// Which kinds of metadata each write is checked against.
    #[must_use]
    pub fn overlap_checks(mut self, checks: OverlapChecks) -> Self {
        self.overlap_checks = checks;
        self
    }

    /// Opens the image in `storage`. One that is to be written and is marked dirty is repaired first, as by
    /// [`repair()`](crate::repair()) with [`Repair::All`](crate::Repair::All); it takes as long as that.
    ///
    /// # Errors
    /// Everything that [`Header::read`] refuses; an image that must not be written, if it is to be, or whose
    /// file was cut short then; a data file where there should be none, or none where there should be one; an
    /// L1 table that the file does not hold; no such snapshot, or one that is to be written.
    pub fn open(self, storage: Arc<dyn Storage>) -> Result<Qcow2> {
        let header = self.read_header(&storage)?;
        let header_field = |field, value| Error::HeaderField { field, value, allowed: "out of range".into() };
        let cluster = ClusterSize::from_bits(header.cluster_bits)
            .ok_or_else(|| header_field("cluster_bits", header.cluster_bits.into()))?;
        let width = RefcountWidth::from_order(header.refcount_order)
            .ok_or_else(|| header_field("refcount_order", header.refcount_order.into()))?;
        let looks_for_holes = !self.holes_if_preallocated || is_preallocated(&*storage)?;
        let ctx = ImageContext {
            looks_for_holes,
            whole_tables: self.whole_tables,
            format: EntryFormat {
                cluster,
                extended: header.extended_l2,
                has_zero: header.version >= 3,
                external_data: header.data_file.is_some(),
            },
            size: AtomicU64::new(header.virtual_size),
            progress: AtomicU64::new(0),
            name: storage.name().into(),
            storage,
            data_file: self.data_file,
            known_data: KnownData::default(),
            below: Mutex::new(BackingLayer {
                device: self.backing,
                named: (self.writable || !self.without_backing) && header.backing.is_some(),
            }),
        };
        let l1_at = HostOffset(header.l1_offset);
        let l1: Vec<L1Entry> = read_table(&ctx, "read L1 table", l1_at, header.l1_entries.into())?
            .into_iter()
            .map(L1Entry)
            .collect();
        // Three parts L2 to one part refcounts, which are touched far more locally.
        let blocks = SliceCache::new(ctx.slice_size(), self.cache_bytes / 4);
        let refcounts = match self.writable {
            true => Some(load_refcounts(&ctx, &header, width, &l1, blocks, self.overlap_checks)?),
            false => None,
        };
        let l2_bytes = if self.writable { self.cache_bytes - self.cache_bytes / 4 } else { self.cache_bytes };
        let l2 = SliceCache::new(ctx.slice_size(), l2_bytes);
        let bitmaps =
            if self.writable { ImageBitmaps::load(&ctx, &header)? } else { ImageBitmaps::default() };
        let image = Qcow2 {
            geometry: geometry(&ctx, self.writable, header.data_file.as_ref().is_some_and(|d| d.raw)),
            decompressors: Decompressors::new(header.compression, cluster),
            compressors: Compressors::new(header.compression),
            ctx,
            raw_data_file: header.data_file.as_ref().is_some_and(|d| d.raw),
            header: Mutex::new(Arc::new(header)),
            changing: Mutex::new(()),
            shrink_unfinished: AtomicBool::new(false),
            writable: self.writable,
            cache_bytes: self.cache_bytes,
            meta: Mutex::new(Meta::new(l1, l1_at, l2, refcounts)),
            write_back: Mutex::new(()),
            tables: Mutex::new(()),
            group_commit: GroupCommit::default(),
            ranges: RangeLock::new(),
            bitmaps,
            cancellations: Cancellations::default(),
        };
        if image.writable {
            image.check_whole()?;
            image.clear_unknown_autoclear()?;
        }
        Ok(image)
    }

    /// The header as it is to be used. An image that is to be written is repaired first if it is dirty.
    fn read_header(&self, storage: &Arc<dyn Storage>) -> Result<Header> {
        let (image, storage) = (storage, &**storage);
        let mut header = Header::read(storage)?;
        if let Some(wanted) = &self.snapshot {
            if self.writable {
                let error = BlockError::new(ErrorKind::ReadOnly, "open qcow2 image").in_file(storage.name());
                return Err(error.because("a snapshot is for reading").into());
            }
            header = inactive::as_snapshot(&header, storage, wanted)?;
        }
        if self.writable {
            header.check_writable()?;
        }
        self.check_data_file(&header, storage.name())?;
        if self.writable && header.is_dirty() {
            // A repair would lose snapshots of which the file has only a part.
            check_snapshots(&header, storage)?;
            Self::refuse_cut_short(image, &header)?;
            header = repair_dirty(storage)?;
        }
        check_directories(&header, storage)?;
        Ok(header)
    }

    /// A data file is given if and only if the image has one.
    fn check_data_file(&self, header: &Header, name: &str) -> Result<()> {
        let problem = match (&header.data_file, &self.data_file) {
            (Some(_), None) => "it keeps its data in an external file, which was not given",
            (None, Some(_)) => "an external data file was given, but the image has none",
            _ => return Ok(()),
        };
        let error = BlockError::new(ErrorKind::InvalidInput, "open qcow2 image").in_file(name);
        Err(Error::Storage(error.because(problem)))
    }
}

/// Reads the refcount table of a writable image and finds out where all of its metadata lies.
fn load_refcounts(
    ctx: &ImageContext,
    header: &Header,
    width: RefcountWidth,
    l1: &[L1Entry],
    blocks: SliceCache,
    checks: OverlapChecks,
) -> Result<Refcounts> {
    let cluster = ctx.cluster();
    let mut metadata = MetadataMap::new(checks);
    metadata.claim(ctx, MetadataKind::MainHeader, HostOffset(0), cluster.bytes())?;
    let l1_bytes = u64::from(header.l1_entries) * 8;
    metadata.claim(ctx, MetadataKind::ActiveL1, HostOffset(header.l1_offset), l1_bytes)?;
    metadata.claim_l2_tables(ctx, l1)?;
    claim_bitmaps(ctx, header, &mut metadata)?;
    inactive::claim(ctx, header, &mut metadata)?;
    let table_at = HostOffset(header.refcount_table_offset);
    let entries = u64::from(header.refcount_table_clusters) << (cluster.bits() - 3);
    let table = read_table(ctx, "read refcount table", table_at, entries)?;
    Ok(Refcounts::new(ctx, width, table_at, table, blocks, metadata)?)
}

fn check_snapshots(header: &Header, storage: &dyn Storage) -> Result<()> {
    Snapshots::new(storage, header)?.try_for_each(|snapshot| snapshot.map(drop))
}

/// Damage in the snapshot table or in the directory of valid bitmaps says that the rest is not to be trusted
/// either.
fn check_directories(header: &Header, storage: &dyn Storage) -> Result<()> {
    check_snapshots(header, storage)?;
    if let Some(extension) = header.bitmaps.as_ref().filter(|_| header.bitmaps_valid()) {
        for bitmap in Bitmaps::new(storage, extension)? {
            bitmap?;
        }
    }
    Ok(())
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
