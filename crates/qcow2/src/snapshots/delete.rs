//! Deleting a snapshot.

use blockmirror_block::{Result as BlockResult, StorageEvent};

use super::references::L2Tables;
use crate::error::{Error, Result};
use crate::format::entry::L1Entry;
use crate::format::snapshot::Snapshot;
use crate::image::Qcow2;
use crate::inactive::{inactive_tables, read_l1};
use crate::offset::{ClusterRange, HostOffset};
use crate::overlap::MetadataKind;
use crate::snapshot_ref::SnapshotRef;

impl Qcow2 {
    /// Deletes the snapshot that `wanted` means, and frees what it alone used. No guest reads or writes
    /// meanwhile.
    ///
    /// Until the header is written nothing is lost, whatever fails; if that write fails the image is
    /// poisoned, and the snapshot is listed and whole, or gone, when it is opened anew. After that it is
    /// gone, and of what fails then clusters leak.
    ///
    /// # Errors
    /// No such snapshot; a read-only or poisoned image; damage in its tables or those of the active disk; the
    /// storage fails; cancelled. [`Error::SnapshotLeaks`] if it is gone.
    pub fn delete_snapshot(&self, wanted: &SnapshotRef) -> Result<Snapshot> {
        self.quiesced("delete snapshot", |stop| {
            let ctx = &self.ctx;
            let found = self.find_snapshot(wanted)?;
            let l1 = read_l1(ctx, &found.snapshot)?;
            let tables = L2Tables::of(ctx, &l1)?;
            self.check_references(&tables, stop)?;
            let active = L2Tables::of(ctx, self.meta.lock().l1())?;

            let (table, old_len) = self.snapshot_table(Some(&found.entry))?;
            let new = self.write_snapshot_table(table, self.header().snapshot_count - 1, stop)?;
            self.write_back().inspect_err(|error| self.give_back_snapshot_table(&new, error))?;
            self.use_snapshot_table(new, old_len)?;

            let freed = self.free_snapshot(&found.snapshot, &l1, &tables, &active);
            freed.map_err(|cause| Error::SnapshotLeaks { cause })?;
            Ok(found.snapshot)
        })
    }
    /// Frees what only `snapshot` used, which the header does not list any more: its table `l1`, and
    /// `tables` with what they map. Entries of the `active` tables that are alone then get COPIED.
    fn free_snapshot(
        &self,
        snapshot: &Snapshot,
        l1: &[L1Entry],
        tables: &L2Tables,
        active: &L2Tables,
    ) -> BlockResult<()> {
        let ctx = &self.ctx;
        ctx.storage.announce(StorageEvent::ClusterFree);
        let inactive = inactive_tables(ctx, &self.header())?;
        {
            let mut meta = self.meta.lock();
            meta.snapshots_changed(ctx, inactive)?;
            let refcounts = meta.refcounts(ctx)?;
            let l1 = ctx.cluster().touched(HostOffset(snapshot.l1_offset), l1.len() as u64 * 8);
            l1.each().for_each(|cluster| refcounts.metadata.remove(MetadataKind::InactiveL1, cluster));
            refcounts.defer_unref_table(ctx, l1);
        }
        self.drop_references(tables)?;
        // The lowered counts are on their way to the disk before a flag is.
        self.write_back()?;
        self.set_copied(active)?;
        self.write_back()
    }
}
