//! An open qcow2 image: its parts, its locks, and the [`BlockDevice`] it is.
//!
//! Opening is in `open`, reading in `read`, writing in `write` and `zero`, durability in `writeback`.

mod open;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    Backing, BlockDevice, ByteRange, CloneUnits, Error as BlockError, ErrorKind, Extent, Geometry,
    GroupCommit, HostRun, RangeLock, Result as BlockResult, Storage, Visit, WriteFlags, ZeroFlags, cancel,
};
use byteorder::{BigEndian, ByteOrder};

pub use open::{DEFAULT_CACHE_BYTES, OpenOptions};

use crate::bitmap_list::ImageBitmaps;
use crate::compressed::Decompressors;
use crate::compressors::Compressors;
use crate::context::ImageContext;
use crate::damage::Damage;
use crate::error::Result;
use crate::format::feature;
use crate::format::header::Header;
use crate::meta::Meta;
use crate::overlap_checks::OverlapChecks;
use crate::stop::{Cancellations, StopCheck};

/// Where the version 3 header holds the incompatible features, and the autoclear features.
const HEADER_INCOMPATIBLE: u64 = 72;
const HEADER_AUTOCLEAR: u64 = 88;

/// An open qcow2 image.
///
/// Metadata is written back by [`flush`](BlockDevice::flush), or when much of it has changed. An image that
/// is dropped without a flush loses what was not flushed, as a disk does when the power goes; it stays
/// consistent. Persistent bitmaps are stored by [`store_bitmaps`](Qcow2::store_bitmaps), and when the image
/// is dropped.
#[derive(Debug)]
pub struct Qcow2 {
    pub(crate) ctx: ImageContext,
    raw_data_file: bool,
    /// *Guards* the header as it is in memory. Leaf lock: held for a copy or a replacement.
    header: Mutex<Arc<Header>>,
    /// *Guards* the length and the backing file, for one change at a time. *Order*: before all others. *Not
    /// under it*: nothing; a change of length may take long.
    pub(crate) changing: Mutex<()>,
    /// A shrink has given the disk its length, and was not done with the rest. Changed under `changing`.
    pub(crate) shrink_unfinished: AtomicBool,
    geometry: Geometry,
    writable: bool,
    /// What [`OpenOptions::cache_bytes`] was.
    pub(crate) cache_bytes: usize,
    /// *Guards* the mapping and the refcounts. *Order*: the last one. *Not under it*: guest data, and
    /// anything that changes or flushes a storage. Slices of metadata are read under it, a bounded number in
    /// one hold: an entry and the refcounts that it depends on must be seen at one instant.
    pub(crate) meta: Mutex<Meta>,
    /// *Guards* the order of write-back: one at a time. *Order*: before `tables` and `meta`, after `ranges`.
    /// *Not under it*: guest data.
    pub(crate) write_back: Mutex<()>,
    /// *Guards* which clusters tables take: one L2 table, or run of refcount blocks, is made at a time.
    /// *Order*: after `write_back`, before `meta`. *Not under it*: a write-back, guest data.
    pub(crate) tables: Mutex<()>,
    group_commit: GroupCommit,
    /// *Guards* guest ranges in use: shared by reads and overwrites in place, exclusive where the mapping
    /// changes. *Order*: after `changing`, before `write_back`. *Not under it*: another range of the same
    /// image.
    pub(crate) ranges: RangeLock,
    /// The persistent bitmaps, which record what is written.
    pub(crate) bitmaps: ImageBitmaps,
    pub(crate) decompressors: Decompressors,
    pub(crate) compressors: Compressors,
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

    /// From now on writes are checked against these kinds of metadata.
    pub fn set_overlap_checks(&self, checks: OverlapChecks) {
        if let Some(refcounts) = &mut self.meta.lock().refcounts {
            refcounts.metadata.checks = checks;
        }
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

    /// Begins an operation that can be cancelled.
    pub(crate) fn stop_check(&self, operation: &'static str) -> StopCheck<'_> {
        StopCheck::new(&self.cancellations, &self.ctx, operation)
    }

    /// Clears the autoclear features that this writer does not know: it would make stale what they stand for.
    fn clear_unknown_autoclear(&self) -> Result<()> {
        let header = self.header();
        let kept = header.autoclear_when_written();
        if kept != header.autoclear {
            self.write_header_word(HEADER_AUTOCLEAR, kept)?;
        }
        Ok(())
    }

    /// Marks the image corrupt if an operation has met damage. The caller holds neither the write-back lock
    /// nor the metadata lock.
    pub(crate) fn note_damage<T>(&self, result: BlockResult<T>) -> BlockResult<T> {
        if let Err(error) = &result
            && Damage::of(error).is_some()
        {
            self.mark_corrupt(error);
        }
        result
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

    /// Marks the image corrupt, durably: its owner has found that it does not hold what it should, and no
    /// program writes to it before a check. Whether it has such a mark; version 2 has none.
    ///
    /// # Errors
    /// The image is read-only, or its header cannot be written.
    pub fn set_corrupt(&self) -> BlockResult<bool> {
        self.check_writable("mark corrupt")?;
        let _no_write_back = self.write_back.lock();
        let header = self.header();
        if header.version < 3 {
            return Ok(false);
        }
        let marked = header.incompatible | feature::INCOMPATIBLE_CORRUPT;
        self.write_header_word(HEADER_INCOMPATIBLE, marked)?;
        Ok(true)
    }

    pub(crate) fn write_header_word(&self, at: u64, value: u64) -> BlockResult<()> {
        let mut bytes = [0; 8];
        BigEndian::write_u64(&mut bytes, value);
        self.write_header(at, &bytes)
    }

    /// Writes part of the header, durably. All that it points at must be durable. If it fails the image is
    /// poisoned.
    pub(crate) fn write_header(&self, at: u64, bytes: &[u8]) -> BlockResult<()> {
        let _shield = cancel::shield();
        self.ctx.write_header(at, bytes).map_err(|failure| self.meta.lock().settle(failure))
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
        let _pin = self.ranges.lock_shared(range)?;
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
        self.group_commit.join(|| self.write_back())
    }

    fn cancel_in_flight(&self) {
        self.cancellations.cancel();
        self.ctx.storage.cancel_in_flight();
        if let Some(data_file) = &self.ctx.data_file {
            data_file.cancel_in_flight();
        }
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> BlockResult<()> {
        let range = self.bounds("map", Some(range), range.start(), range.len())?;
        self.visit_extents(range, visit)
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.units_of_clones(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> BlockResult<u64> {
        self.clone_clusters(offset, run, len)
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

#[cfg(test)]
mod tests;
