//! The snapshot table of an open image: found in it, and replaced as a whole.
//!
//! Entries are kept with whatever extra data other programs gave them, and get what they lack of it. A new
//! table never lies where the old one does: the header changes from one to the other in one write.

use std::ops::Range;

use blockmirror_block::Result as BlockResult;

use crate::error::{Error, Result};
use crate::format::snapshot::{Snapshot, Snapshots, completed};
use crate::image::Qcow2;
use crate::limits::MAX_SNAPSHOT_TABLE_BYTES;
use crate::offset::{ClusterRange, HostCluster, HostOffset};
use crate::overlap::MetadataKind;
use crate::snapshot_ref::SnapshotRef;
use crate::stop::StopCheck;

/// Where the header has the number of snapshots (4 bytes), and after it the offset of their table (8 bytes).
const HEADER_SNAPSHOTS: u64 = 60;

/// A snapshot, and where in the file its entry lies.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) snapshot: Snapshot,
    pub(super) entry: Range<u64>,
    rank: u8,
}

/// A new snapshot table in its place, which the header does not name yet.
#[derive(Debug)]
pub(super) struct NewTable {
    at: HostOffset,
    clusters: Range<HostCluster>,
    count: u32,
}

impl Qcow2 {
    /// Visits the snapshots with the places of their entries; returns where the table ends.
    pub(super) fn each_snapshot(&self, visit: &mut dyn FnMut(Snapshot, Range<u64>)) -> Result<u64> {
        let header = self.header();
        let mut snapshots = Snapshots::new(&*self.ctx.storage, &header)?;
        loop {
            let start = snapshots.end();
            let Some(snapshot) = snapshots.next() else { return Ok(start) };
            visit(snapshot?, start..snapshots.end());
        }
    }

    /// The snapshot that `wanted` means.
    pub(super) fn find_snapshot(&self, wanted: &SnapshotRef) -> Result<Found> {
        let mut found: Option<Found> = None;
        self.each_snapshot(&mut |snapshot, entry| {
            if let Some(rank) = wanted.rank(&snapshot.id, &snapshot.name)
                && found.as_ref().is_none_or(|best| rank < best.rank)
            {
                found = Some(Found { snapshot, entry, rank });
            }
        })?;
        found.ok_or_else(|| Error::NoSnapshot { wanted: wanted.clone() })
    }

    /// The snapshot table as it is to be written anew, without the entry at `without`: entries are complete,
    /// unless they would be more than a table may have. And the length of the present one.
    pub(super) fn snapshot_table(&self, without: Option<&Range<u64>>) -> Result<(Vec<u8>, u64)> {
        let header = self.header();
        let start = header.snapshots_offset;
        let mut entries = Vec::new();
        let end = self.each_snapshot(&mut |_, entry| {
            if without != Some(&entry) {
                entries.push((entry.start - start) as usize..(entry.end - start) as usize);
            }
        })?;
        // At most 64 MiB, by the cap on the table.
        let mut old = vec![0; (end - start) as usize];
        self.ctx.storage.read_at(&mut old, start)?;
        let mut table = Vec::new();
        for entry in &entries {
            table.extend(completed(&old[entry.clone()], header.virtual_size));
            if table.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
                table = entries.iter().flat_map(|entry| &old[entry.clone()]).copied().collect();
                break;
            }
        }
        Ok((table, end - start))
    }

    /// Writes the snapshot table anew if an entry lacks what version 3 wants.
    ///
    /// # Errors
    /// It would be longer than a table may be; as for [`create_snapshot`](Self::create_snapshot).
    pub(crate) fn complete_snapshots(&self) -> Result<()> {
        let mut is_complete = true;
        self.each_snapshot(&mut |snapshot, _| is_complete &= snapshot.disk_size.is_some())?;
        if is_complete {
            return Ok(());
        }
        self.quiesced("complete snapshots", |stop| {
            let (table, old_len) = self.snapshot_table(None)?;
            if table.len() as u64 == old_len {
                // It has no room for more.
                let what = "the snapshot table, in bytes,";
                let limit = MAX_SNAPSHOT_TABLE_BYTES;
                return Err(Error::LimitExceeded { what, value: limit + 1, limit });
            }
            let new = self.write_snapshot_table(table, self.header().snapshot_count, stop)?;
            self.write_back().inspect_err(|error| self.give_back_snapshot_table(&new, error))?;
            self.use_snapshot_table(new, old_len)?;
            Ok(self.write_back()?)
        })
    }

    /// Writes `table`, of `count` entries, to a place of its own.
    pub(super) fn write_snapshot_table(
        &self,
        mut table: Vec<u8>,
        count: u32,
        stop: &StopCheck<'_>,
    ) -> Result<NewTable> {
        let cluster = self.ctx.cluster();
        let len = table.len() as u64;
        if len > MAX_SNAPSHOT_TABLE_BYTES {
            let what = "the snapshot table, in bytes,";
            return Err(Error::LimitExceeded { what, value: len, limit: MAX_SNAPSHOT_TABLE_BYTES });
        }
        let clusters = cluster.count(len);
        if clusters == 0 {
            return Ok(NewTable { at: HostOffset(0), clusters: Range::default(), count });
        }
        table.resize((clusters * cluster.bytes()) as usize, 0);
        let clusters = self.write_table(&table, stop)?;
        Ok(NewTable { at: cluster.start(clusters.start), clusters, count })
    }

    /// Gives the place of a table back that the header does not name, after `error`.
    pub(super) fn give_back_snapshot_table(&self, table: &NewTable, error: &blockmirror_block::Error) {
        self.give_back_table(table.clusters.clone(), error);
    }

    /// Makes the header name `table`, which is durable, and gives the place of the old one back. If it fails
    /// the image is poisoned.
    pub(super) fn use_snapshot_table(&self, table: NewTable, old_len: u64) -> BlockResult<()> {
        let ctx = &self.ctx;
        let _only_one = self.write_back.lock();
        let old = ctx.cluster().touched(HostOffset(self.header().snapshots_offset), old_len);
        let mut field = [0; 12];
        field[..4].copy_from_slice(&table.count.to_be_bytes());
        field[4..].copy_from_slice(&table.at.0.to_be_bytes());
        self.write_header_field(HEADER_SNAPSHOTS, &field, |header| {
            header.snapshot_count = table.count;
            header.snapshots_offset = table.at.0;
        })?;
        let mut meta = self.meta.lock();
        let refcounts = meta.refcounts(ctx)?;
        table.clusters.each().for_each(|cluster| {
            refcounts.metadata.insert(MetadataKind::SnapshotTable, cluster);
        });
        if old_len > 0 {
            old.each().for_each(|cluster| refcounts.metadata.remove(MetadataKind::SnapshotTable, cluster));
            refcounts.defer_unref_table(ctx, old);
        }
        Ok(())
    }
}
