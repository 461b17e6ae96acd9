//! Opening an image anew after a failed flush, or a failed write of metadata, has poisoned it.
//!
//! Called by the owner of the device: the daemon reopens the target of a job before the job goes on. What the
//! last good flush covered is there. Of what came later any part may be lost, as after a crash, so nothing
//! that the old image held in memory counts; the caller writes it again.
//!
//! What must hold: the old image is not used any more, for a late write of it could hit clusters that have a
//! new owner. Clusters that only lost changes used are free again once a flush has succeeded: no entry on
//! disk leads to them. If it fails they stay unused.

use blockmirror_block::{ByteRange, Result};

use crate::cluster_set::ClusterSet;
use crate::context::ImageContext;
use crate::holes::HoleCursor;
use crate::image::{OpenOptions, Qcow2};
use crate::meta::{Meta, decode_at, references};
use crate::offset::{ClusterRange, GuestCluster, HostOffset};
use crate::stop::StopCheck;

impl Qcow2 {
    /// Whether a failed flush, or a failed write of metadata, has ended all writing: it goes on after a
    /// [`reopen`](Self::reopen) only.
    pub fn is_poisoned(&self) -> bool {
        self.meta.lock().poisoned.is_some()
    }

    /// Opens the image anew, in the same storages, on the same backing device.
    ///
    /// # Errors
    /// As [`OpenOptions::open`]: the image may have been marked corrupt. An L2 table that cannot be read, or
    /// that maps a cluster which has no refcount. Cancelling this image ends it.
    pub fn reopen(&self) -> crate::error::Result<Self> {
        let mut options = OpenOptions::new().writable(self.is_writable()).cache_bytes(self.cache_bytes);
        options = options.whole_tables(self.ctx.whole_tables);
        if let Some(refcounts) = &self.meta.lock().refcounts {
            options = options.overlap_checks(refcounts.metadata.checks);
        }
        if let Some(data_file) = &self.ctx.data_file {
            options = options.data_file(data_file.clone());
        }
        if let Some(backing) = self.backing() {
            options = options.backing(backing);
        }
        let image = options.open(self.storage().clone())?;
        image.bitmaps.take_over(&self.bitmaps, image.ctx.size());
        // What stale bitmaps and unknown extensions use is not known here.
        let header = image.header();
        let stale_bitmaps = header.bitmaps.is_some() && !header.bitmaps_valid();
        let all_known = !stale_bitmaps && header.unknown_extensions.is_empty();
        // A write of the header may have failed and be in the file all the same: until it is durable a crash
        // may bring back what the old one points at.
        if image.is_writable() && all_known && image.ctx.barrier().is_ok() {
            let stop = self.stop_check("reopen");
            let freed = image.meta.lock().free_unused(&image.ctx, &stop);
            image.note_damage(freed)?;
        }
        Ok(image)
    }
}

impl Meta {
    /// Frees every cluster that has a refcount and that nothing in the image uses.
    fn free_unused(&mut self, ctx: &ImageContext, stop: &StopCheck<'_>) -> Result<()> {
        let mut used = ClusterSet::default();
        let tables: Vec<_> =
            self.l1().iter().enumerate().filter_map(|(i, e)| Some((i, e.table()?))).collect();
        let mut holes = HoleCursor::default();
        for (index, table) in tables {
            stop.check()?;
            // usize to u64 is exact here.
            let first = GuestCluster(index as u64 * ctx.l2_entries());
            self.note_used(ctx, table, first, &mut used, &mut holes)?;
        }
        for table in self.refcounts(ctx)?.metadata.only_inactive_l2() {
            stop.check()?;
            used.insert(table);
            // What it maps is not known here; it matters for messages only.
            self.note_used(ctx, ctx.cluster().start(table), GuestCluster(0), &mut used, &mut holes)?;
        }
        self.refcounts(ctx)?.free_unused(ctx, &used, stop)
    }

    /// Adds the clusters that `table` maps, for the guest clusters from `first` on.
    fn note_used(
        &mut self,
        ctx: &ImageContext,
        table: HostOffset,
        first: GuestCluster,
        used: &mut ClusterSet,
        holes: &mut HoleCursor,
    ) -> Result<()> {
        let slice_size = self.l2.slice_size();
        let step = ctx.format.entry_size() as usize;
        for at in (0..ctx.cluster().bytes()).step_by(slice_size) {
            let slice = table.plus(at);
            // Entries of zeros map nothing.
            if holes.is_hole(ctx, ByteRange::at(slice.0, slice_size as u64)) {
                continue;
            }
            let first = first.plus(at / ctx.format.entry_size());
            let data = ctx.read_slice("read L2 table", slice)?;
            self.check_entries(ctx, &data, first, slice)?;
            if ctx.format.external_data {
                continue;
            }
            for (at, guest) in (0..data.len()).step_by(step).zip((first.0..).map(GuestCluster)) {
                references(ctx, &decode_at(ctx, &data, at, guest, slice)?).each().for_each(|cluster| {
                    used.insert(cluster);
                });
            }
        }
        Ok(())
    }
}
