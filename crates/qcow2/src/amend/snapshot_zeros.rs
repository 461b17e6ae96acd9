//! Version 2 for internal snapshots: what is marked as zero in their L2 tables becomes unallocated where
//! nothing lies below the image, and else clusters of zeros. Called before the header says version 2, when
//! the active tables have no such entries any more.
//!
//! What must hold: in version 3 a snapshot reads the same after each write. A new cluster of zeros is durable
//! before an entry maps it, and what an entry mapped loses its references after the entry has changed. Each
//! table is read once; of a cluster no more references are dropped than it has.

use std::collections::BTreeMap;

use blockmirror_block::{Error as BlockError, ErrorKind, Result as BlockResult};
use byteorder::{BigEndian, ByteOrder};

use super::Meter;
use crate::error::Result;
use crate::format::entry::{Entry, L1Entry, PlainEntry};
use crate::format::snapshot::Snapshots;
use crate::image::Qcow2;
use crate::inactive::read_l1;
use crate::meta::{decode_at, references};
use crate::offset::{ClusterRange, GuestCluster, HostCluster, HostOffset};

/// An L2 table, and how many entries of L1 tables name it.
type Tables = BTreeMap<HostOffset, u64>;

impl Qcow2 {
    /// Unmarks zeros in the L2 tables of all snapshots.
    pub(super) fn unmark_zeros_of_snapshots(&self, meter: &mut Meter<'_>) -> Result<()> {
        let tables = self.tables_of_snapshots()?;
        // usize to u64 is exact here.
        meter.expect(tables.len() as u64 * self.ctx.cluster().bytes());
        for (table, references) in tables {
            for at in (0..self.ctx.cluster().bytes()).step_by(self.ctx.slice_size()) {
                meter.step(&*self.ctx.storage, self.ctx.slice_size() as u64)?;
                self.maybe_write_back()?;
                self.unmark_in_inactive(table.plus(at), references)?;
            }
        }
        Ok(())
    }

    /// At most one for each cluster of the file.
    fn tables_of_snapshots(&self) -> Result<Tables> {
        let mut tables = Tables::new();
        let mut add = |l1: &[L1Entry]| {
            for table in l1.iter().filter_map(|entry| entry.table()) {
                *tables.entry(table).or_default() += 1;
            }
        };
        for snapshot in Snapshots::new(&*self.ctx.storage, &self.header())? {
            add(&read_l1(&self.ctx, &snapshot?)?);
        }
        // What the active disk shares has nothing that is marked.
        Ok(tables)
    }

    /// Unmarks what is marked in the slice of a table that so many L1 entries name.
    fn unmark_in_inactive(&self, slice: HostOffset, table_references: u64) -> BlockResult<()> {
        let ctx = &self.ctx;
        let marked = self.marked_in(slice)?;
        if marked.is_empty() {
            return Ok(());
        }
        let zeros = if ctx.backed() { self.zero_clusters(marked.len())? } else { Vec::new() };
        let mut meta = self.meta.lock();
        let refcounts = meta.refcounts(ctx)?;
        for cluster in &zeros {
            // The table has as many, and its refcount is as wide.
            refcounts.set(ctx, *cluster, table_references.min(refcounts.max()))?;
        }
        // It is not in the cache any more if much was written back meanwhile.
        meta.load(ctx, slice)?;
        let cached = meta.l2.edit(slice);
        let data = cached.ok_or_else(|| BlockError::new(ErrorKind::Io, "change L2 table"))?;
        let mut zeros = zeros.into_iter();
        for (at, _) in &marked {
            let host = zeros.next().map(|cluster| ctx.cluster().start(cluster));
            let allocated = if host.is_some() { ctx.format.all() } else { 0 };
            let (word, _) = ctx.format.encode(PlainEntry { host, allocated, ..PlainEntry::default() });
            BigEndian::write_u64(&mut data[*at..], word);
        }
        let refcounts = meta.refcounts(ctx)?;
        for cluster in marked.iter().flat_map(|(_, entry)| references(ctx, entry).each()) {
            let count = refcounts.get(ctx, cluster)?.min(table_references);
            (0..count).for_each(|_| refcounts.defer_unref(ctx, cluster..cluster.plus(1)));
        }
        Ok(())
    }

    /// The entries in `slice` that are marked as zero, and where they lie in it.
    fn marked_in(&self, slice: HostOffset) -> BlockResult<Vec<(usize, Entry)>> {
        let ctx = &self.ctx;
        let step = ctx.format.entry_size() as usize;
        let mut marked = Vec::new();
        let mut meta = self.meta.lock();
        let data = meta.load(ctx, slice)?;
        for at in (0..data.len()).step_by(step) {
            // Which guest cluster it is shows in an error only.
            let entry = decode_at(ctx, data, at, GuestCluster((at / step) as u64), slice)?;
            if matches!(&entry, Entry::Plain(plain) if plain.zero != 0) {
                marked.push((at, entry));
            }
        }
        Ok(marked)
    }

    /// So many new clusters of zeros, with one reference each. If this fails they are given back.
    fn zero_clusters(&self, count: usize) -> BlockResult<Vec<HostCluster>> {
        // At most 2 MiB.
        let zeros = vec![0; self.ctx.cluster().bytes() as usize];
        let stop = self.stop_check("amend");
        let mut clusters = Vec::with_capacity(count);
        for _ in 0..count {
            let new = self.write_table(&zeros, &stop).inspect_err(|error| {
                for cluster in clusters.drain(..) {
                    self.give_back_table(cluster..cluster.plus(1), error);
                }
            })?;
            clusters.push(new.start);
        }
        Ok(clusters)
    }
}
