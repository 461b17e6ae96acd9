//! Making the active disk what a snapshot shows.

use std::ops::Range;
use std::sync::atomic::Ordering;

use byteorder::{BigEndian, ByteOrder};

use super::references::L2Tables;
use crate::error::{Error, Result};
use crate::format::entry::L1Entry;
use crate::format::header::l1_entries_for;
use crate::format::snapshot::Snapshot;
use crate::image::Qcow2;
use crate::inactive::{disk_size, inactive_tables, read_l1};
use crate::offset::{ClusterRange, HostCluster};
use crate::overlap::MetadataKind;
use crate::snapshot_ref::SnapshotRef;
use crate::stop::StopCheck;

/// Where the header has the length of the disk (8 bytes), the method of encryption (4 bytes), and the entries
/// (4 bytes) and the offset (8 bytes) of the L1 table. All in one sector, so they change at once.
const HEADER_DISK: u64 = 24;

impl Qcow2 {
    /// Makes the disk what the snapshot that `wanted` means shows, and as long; what it held is lost. The
    /// snapshot stays. Its VM state is mapped past the end of the disk, too, where no guest reads. No guest
    /// reads or writes meanwhile.
    ///
    /// Whatever fails, the disk is what it was, or what the snapshot shows. If the write of the header fails
    /// the image is poisoned, and which of the two it is shows when it is opened anew.
    ///
    /// # Errors
    /// No such snapshot; a read-only or poisoned image; one with an external data file, or with bitmaps that
    /// are in use; a version 2 image whose length would change; damage; refcounts that cannot count one more
    /// reference; the storage fails; cancelled.
    pub fn apply_snapshot(&self, wanted: &SnapshotRef) -> Result<Snapshot> {
        let name = "apply snapshot";
        self.quiesced(name, |stop| {
            let snapshot = self.find_snapshot(wanted)?.snapshot;
            let header = self.header();
            let size = disk_size(&header, &snapshot)?;
            if header.bitmaps_valid() {
                return Err(
                    self.snapshot_refused(name, "the image has bitmaps, which would not say what it changes")
                );
            }
            if header.version < 3 && size != self.ctx.size() {
                return Err(
                    self.snapshot_refused(name, "the disk had another length, which version 2 cannot change")
                );
            }
            let mut l1 = read_l1(&self.ctx, &snapshot)?;
            let format = self.ctx.format;
            let needed = l1_entries_for(size, format.cluster.bits(), format.extended) as usize;
            // What lies behind is VM state, which stays mapped in the next snapshot, as with QEMU. The table
            // does not become shorter.
            let longest = l1.len().max(self.meta.lock().l1().len());
            l1.resize(needed.max(longest).max(1), L1Entry(0));
            l1.iter_mut().for_each(|entry| *entry = entry.cleaned().with_copied(false));
            let tables = L2Tables::of(&self.ctx, &l1)?;
            let at = self.prepare_l1(&l1, &tables, stop)?;
            self.use_l1(l1, &tables, at, size)?;
            Ok(snapshot)
        })
    }

    /// Writes `l1`, which holds a reference to each of `tables` from now on, to a new place, durably.
    fn prepare_l1(
        &self,
        l1: &[L1Entry],
        tables: &L2Tables,
        stop: &StopCheck<'_>,
    ) -> Result<Range<HostCluster>> {
        let cluster = self.ctx.cluster();
        self.clear_copied(tables, stop)?;
        // Before a count is raised no entry says that its cluster has one reference.
        self.write_back()?;
        self.add_references(tables, stop)?;
        // At most 32 MiB, and whole clusters.
        let mut bytes = vec![0; (cluster.count(l1.len() as u64 * 8) * cluster.bytes()) as usize];
        for (word, entry) in bytes.chunks_exact_mut(8).zip(l1) {
            BigEndian::write_u64(word, entry.0);
        }
        let written = self.write_table(&bytes, stop).and_then(|clusters| {
            self.write_back().inspect_err(|error| self.give_back_table(clusters.clone(), error))?;
            Ok(clusters)
        });
        written.map_err(|error| {
            if !self.is_poisoned() {
                // What fails here leaks.
                let _ = self.take_back_references(tables, u64::MAX).and_then(|()| self.write_back());
            }
            error.into()
        })
    }

    /// Makes `l1`, which lies in the clusters `new`, the active L1 table of a disk of `size` bytes, and drops
    /// what the old one held.
    fn use_l1(&self, l1: Vec<L1Entry>, tables: &L2Tables, new: Range<HostCluster>, size: u64) -> Result<()> {
        let ctx = &self.ctx;
        let cluster = ctx.cluster();
        let (old, old_at) = {
            let meta = self.meta.lock();
            (meta.l1().to_vec(), meta.l1_at())
        };
        let old_tables = L2Tables::of(ctx, &old)?;
        let inactive = inactive_tables(ctx, &self.header())?;
        let at = cluster.start(new.start);
        // At most 32 MiB of table: it fits.
        let entries = l1.len() as u32;
        let mut field = [0; 24];
        self.ctx.storage.read_at(&mut field, HEADER_DISK)?;
        BigEndian::write_u64(&mut field, size);
        BigEndian::write_u32(&mut field[12..], entries);
        BigEndian::write_u64(&mut field[16..], at.0);
        {
            let _only_one = self.write_back.lock();
            self.write_header_field(HEADER_DISK, &field, |header| {
                header.virtual_size = size;
                (header.l1_entries, header.l1_offset) = (entries, at.0);
            })?;
            ctx.size.store(size, Ordering::Release);
            // What a shrink has left goes with the old tables.
            self.shrink_unfinished.store(false, Ordering::Relaxed);
            ctx.known_data.forget();
            let mut meta = self.meta.lock();
            meta.replace_l1(l1, at);
            let refcounts = meta.refcounts(ctx)?;
            let metadata = &mut refcounts.metadata;
            old_tables.clusters(ctx).for_each(|table| metadata.remove(MetadataKind::ActiveL2, table));
            let old_l1 = cluster.touched(old_at, old.len() as u64 * 8);
            old_l1.each().for_each(|cluster| metadata.remove(MetadataKind::ActiveL1, cluster));
            tables.clusters(ctx).for_each(|table| {
                metadata.insert(MetadataKind::ActiveL2, table);
            });
            new.each().for_each(|cluster| {
                metadata.insert(MetadataKind::ActiveL1, cluster);
            });
            refcounts.defer_unref_table(ctx, old_l1);
            meta.snapshots_changed(ctx, inactive)?;
        }
        self.drop_references(&old_tables)?;
        self.write_back().map_err(Error::from)
    }
}
