//! Brings changed metadata to disk in the one order that survives a crash at any instant.
//!
//! One write-back at a time takes a snapshot of everything dirty and writes it, with a flush of the storage
//! at each arrow:
//!
//! ```text
//! guest data, COW fill, length of the file, refcount slices -> refcount table -> L2 slices -> L1 sectors -> dropped references
//! ```
//!
//! Whatever an entry in the snapshot points at was written before the snapshot was taken, so the first flush
//! covers it. Refcounts therefore are never below the references on disk, and an entry never points at bytes
//! that are not there. A crash leaves leaks at most. References are dropped only when the entries that held
//! them are gone; until then their clusters are not reused.
//!
//! The write-back lock is held all the time, the metadata lock only to take the snapshot and to note that it
//! was written: nothing is written or flushed under it, here or elsewhere (`image::tests`).
//!
//! It writes what all callers have changed, so it comes to its end whatever becomes of the caller that
//! performs it ([`cancel::shield`]).
//!
//! A write that failed for want of space is put back and may be tried again, since nothing that depends on it
//! was written. Any other failure leaves the disk in doubt ([`Failure::Doubt`]): the image is poisoned, and
//! nothing is written any more. A flush that failed for want of space is such a failure, because what it was
//! to make durable may be lost; so is a write of the header, because what it points at, or pointed at, must
//! not be used for anything else as long as it may have reached the disk.

use std::ops::Range;

use blockmirror_block::{ByteRange, Error, ErrorKind, Result, StorageEvent, cancel};

use crate::cache::DirtySlice;
use crate::context::ImageContext;
use crate::failure::{Failure, may_come_late};
use crate::image::Qcow2;
use crate::meta::Meta;
use crate::offset::HostCluster;

/// A snapshot of everything that differs from the disk.
#[derive(Debug, Default)]
struct Batch {
    refcount_slices: Vec<DirtySlice>,
    refcount_table: Vec<(u64, Vec<u8>)>,
    refcount_table_at: u64,
    l2_slices: Vec<DirtySlice>,
    l1: Vec<(u64, Vec<u8>)>,
    l1_at: u64,
    dropped: Vec<Range<HostCluster>>,
    /// How long the file is to be for the counts.
    file_end: u64,
}

impl Batch {
    fn take(ctx: &ImageContext, meta: &mut Meta) -> Self {
        let mut batch = Self { l2_slices: meta.l2.take_dirty(), l1_at: meta.l1_at().0, ..Self::default() };
        let mut l1_dirty = std::mem::take(&mut meta.l1_dirty);
        batch.l1 = l1_dirty.take(|i| meta.l1().get(i).map(|e| e.0));
        if let Some(refcounts) = &mut meta.refcounts {
            batch.refcount_slices = refcounts.blocks.take_dirty();
            let mut table_dirty = std::mem::take(&mut refcounts.table_dirty);
            let (table, at) = refcounts.table();
            batch.refcount_table = table_dirty.take(|i| table.get(i).copied());
            batch.refcount_table_at = at.0;
            batch.dropped = refcounts.take_pending_unrefs();
            batch.file_end = refcounts.file_end(ctx);
        }
        batch
    }

    /// Writes everything but the dropped references, in order.
    fn write(&self, ctx: &ImageContext) -> Result<(), Failure> {
        if !self.refcount_slices.is_empty() || !self.refcount_table.is_empty() {
            reach(ctx, self.file_end)?;
            ctx.storage.announce(StorageEvent::RefblockUpdatePart);
        }
        for (at, data) in &self.refcount_slices {
            ctx.write_metadata(data, at.0)?;
        }
        if let Some(data_file) = &ctx.data_file {
            data_file.flush().map_err(Failure::Doubt)?;
        }
        ctx.barrier()?;
        if !self.refcount_table.is_empty() {
            ctx.storage.announce(StorageEvent::ReftableUpdate);
            for (at, data) in &self.refcount_table {
                ctx.write_metadata(data, self.refcount_table_at + at)?;
            }
            ctx.barrier()?;
        }
        if !self.l2_slices.is_empty() {
            ctx.storage.announce(StorageEvent::L2Update);
            for (at, data) in &self.l2_slices {
                ctx.write_metadata(data, at.0)?;
            }
            ctx.barrier()?;
        }
        if !self.l1.is_empty() {
            ctx.storage.announce(StorageEvent::L1Update);
            for (at, data) in &self.l1 {
                ctx.write_metadata(data, self.l1_at + at)?;
            }
            ctx.barrier()?;
        }
        Ok(())
    }

    /// The snapshot did not reach the disk: everything in it is dirty again.
    fn put_back(self, meta: &mut Meta) {
        meta.l2.not_written();
        meta.l1_dirty.put_back(&self.l1);
        if let Some(refcounts) = &mut meta.refcounts {
            refcounts.blocks.not_written();
            refcounts.table_dirty.put_back(&self.refcount_table);
            refcounts.put_back(self.dropped);
        }
    }
}

impl Qcow2 {
    /// Makes everything that was completed before the call durable.
    pub(crate) fn write_back(&self) -> Result<()> {
        let _only_one = self.write_back.lock();
        let _shield = cancel::shield();
        let batch = {
            let mut meta = self.meta.lock();
            meta.check_poison(&self.ctx, "flush")?;
            Batch::take(&self.ctx, &mut meta)
        };
        if let Err(failure) = batch.write(&self.ctx) {
            let mut meta = self.meta.lock();
            if failure.may_be_tried_again() {
                batch.put_back(&mut meta);
            }
            return Err(meta.settle(failure));
        }
        {
            let mut meta = self.meta.lock();
            meta.l2.written();
            if let Some(refcounts) = &mut meta.refcounts {
                refcounts.blocks.written();
            }
        }
        if batch.dropped.is_empty() { Ok(()) } else { self.unref(&batch.dropped) }
    }

    /// Gives dropped references back and brings the lowered refcounts to disk, so that a process that ends
    /// after a flush leaves no leaks.
    fn unref(&self, dropped: &[Range<HostCluster>]) -> Result<()> {
        let ctx = &self.ctx;
        ctx.storage.announce(StorageEvent::ClusterFree);
        let free = self.meta.lock().refcounts(ctx)?.last_references(ctx, dropped)?;
        // The refcounts are still one, so these clusters are not handed out while the host frees their space.
        let may_be_used = |clusters: &Range<HostCluster>| {
            let range = ctx.cluster().byte_range(clusters.clone());
            // A hint: a host that cannot is no failure.
            let is_late = |e: &Error| e.kind() != ErrorKind::Unsupported && may_come_late(e);
            !ctx.storage.discard(range).is_err_and(|error| is_late(&error))
        };
        let unusable: Vec<_> = free.into_iter().filter(|clusters| !may_be_used(clusters)).collect();
        let (slices, file_end) = {
            let mut meta = self.meta.lock();
            let refcounts = meta.refcounts(ctx)?;
            let lowered = refcounts.unref(ctx, dropped);
            unusable.into_iter().for_each(|clusters| refcounts.leave_unused(clusters));
            lowered?;
            (refcounts.blocks.take_dirty(), refcounts.file_end(ctx))
        };
        let written = reach(ctx, file_end)
            .and_then(|()| slices.iter().try_for_each(|(at, data)| ctx.write_metadata(data, at.0)));
        let mut meta = self.meta.lock();
        match &written {
            Ok(()) => meta.refcounts(ctx)?.blocks.written(),
            Err(error) if error.kind() == ErrorKind::NoSpace => meta.refcounts(ctx)?.blocks.not_written(),
            Err(error) => meta.poison(error),
        }
        written
    }
}

/// Makes the file at least `end` bytes long, before counts of clusters below it are written.
///
/// A write that has its clusters, but not its data yet, may be the only user of the last ones. Counts past
/// the end would be the mark of a file that was cut short, should the process end there.
fn reach(ctx: &ImageContext, end: u64) -> Result<()> {
    if end > 0 && ctx.storage.len()? < end {
        // Not by setting the length: another thread may be writing past it. A hint: opening finds out what
        // counts past the end stand for.
        let _ = ctx.storage.allocate(ByteRange::new(end.saturating_sub(512), end));
    }
    Ok(())
}
