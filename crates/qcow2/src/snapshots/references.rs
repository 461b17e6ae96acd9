//! The references that an L1 table holds, to its L2 tables and to what they map: taken, dropped, and the
//! COPIED flags that go with them.
//!
//! The caller holds all guest clusters, and has written back before, so that the disk has the tables as they
//! are. Each slice of a table is read once and in order of the file.

use blockmirror_block::{Error as BlockError, ErrorKind, Result, cancel};
use byteorder::{BigEndian, ByteOrder};

use crate::context::ImageContext;
use crate::damage::Damage;
use crate::format::entry::L1Entry;
use crate::image::Qcow2;
use crate::meta::{decode_at, references};
use crate::offset::{ClusterRange, GuestCluster, HostCluster, HostOffset};
use crate::refcounts::Refcounts;
use crate::stop::StopCheck;

/// L1 entries that are looked at under one hold of the metadata lock.
const L1_PIECE: usize = 512;

/// The L2 tables of one L1 table, in order of the file, with the first guest cluster that each maps.
#[derive(Debug)]
pub(super) struct L2Tables(Vec<(HostOffset, GuestCluster)>);

impl L2Tables {
    /// # Errors
    /// A table is misaligned, or named twice: it would be read as often.
    pub(super) fn of(ctx: &ImageContext, l1: &[L1Entry]) -> Result<Self> {
        let mut tables = Vec::new();
        for (table, index) in l1.iter().zip(0..).filter_map(|(entry, index)| Some((entry.table()?, index))) {
            ctx.check_table("read L1 table", table, index)?;
            tables.push((table, GuestCluster(index * ctx.l2_entries())));
        }
        tables.sort_unstable();
        match tables.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(ctx.corrupt("read L1 table", pair[0].0.0, "two L1 entries name this L2 table")),
            None => Ok(Self(tables)),
        }
    }

    /// The clusters of the tables.
    pub(super) fn clusters(&self, ctx: &ImageContext) -> impl Iterator<Item = HostCluster> {
        let size = ctx.cluster();
        self.0.iter().map(move |(at, _)| size.index(*at))
    }
}

/// One reference to a host cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reference {
    cluster: HostCluster,
    /// The first guest cluster that it maps.
    guest: GuestCluster,
    is_table: bool,
}

impl Reference {
    /// The refcount of its cluster.
    ///
    /// # Errors
    /// It is zero.
    fn refcount(&self, ctx: &ImageContext, refcounts: &mut Refcounts) -> Result<u64> {
        let count = refcounts.get(ctx, self.cluster)?;
        if count > 0 {
            return Ok(count);
        }
        let damage = match self.is_table {
            true => Damage::TableUncounted(self.guest),
            false => Damage::MappedUncounted(self.guest),
        };
        Err(damage.met(ctx, ctx.cluster().start(self.cluster)))
    }
}

type Visitor<'a> = dyn FnMut(&ImageContext, &mut Refcounts, Reference) -> Result<()> + 'a;

impl Qcow2 {
    /// Visits every reference that `tables` hold, with room for others between slices: those of each table,
    /// then the one to it.
    fn each_reference(
        &self,
        tables: &L2Tables,
        stop: Option<&StopCheck<'_>>,
        visit: &mut Visitor<'_>,
    ) -> Result<()> {
        let ctx = &self.ctx;
        let cluster = ctx.cluster();
        let step = ctx.format.entry_size() as usize;
        for (table, first) in &tables.0 {
            for at in (0..cluster.bytes()).step_by(ctx.slice_size()) {
                stop.map_or(Ok(()), StopCheck::check)?;
                self.maybe_write_back()?;
                let mut meta = self.meta.lock();
                let data = meta.load(ctx, table.plus(at))?.to_vec();
                let first = first.plus(at / ctx.format.entry_size());
                let refcounts = meta.refcounts(ctx)?;
                for (at, guest) in (0..data.len()).step_by(step).zip((first.0..).map(GuestCluster)) {
                    let entry = decode_at(ctx, &data, at, guest, *table)?;
                    for cluster in references(ctx, &entry).each() {
                        visit(ctx, refcounts, Reference { cluster, guest, is_table: false })?;
                    }
                }
            }
            // Last: where references are dropped, a write-back may free the table, and what it maps is lost.
            let mut meta = self.meta.lock();
            let reference = Reference { cluster: cluster.index(*table), guest: *first, is_table: true };
            visit(ctx, meta.refcounts(ctx)?, reference)?;
        }
        Ok(())
    }

    /// Fails if a cluster that `tables` refer to has no refcount, or a table cannot be read.
    pub(super) fn check_references(&self, tables: &L2Tables, stop: &StopCheck<'_>) -> Result<()> {
        self.each_reference(tables, Some(stop), &mut |ctx, refcounts, reference| {
            reference.refcount(ctx, refcounts).map(drop)
        })
    }

    /// Adds a reference to each cluster that `tables` refer to, in memory. If that fails none is added, but
    /// for those that cannot be taken back: they leak.
    pub(super) fn add_references(&self, tables: &L2Tables, stop: &StopCheck<'_>) -> Result<()> {
        let mut added = 0_u64;
        let result = self.each_reference(tables, Some(stop), &mut |ctx, refcounts, reference| {
            let count = reference.refcount(ctx, refcounts)?;
            if count == refcounts.max() {
                let at = ctx.cluster().start(reference.cluster).0;
                let error =
                    BlockError::new(ErrorKind::LimitExceeded, "add reference").in_file(ctx.name.clone());
                return Err(error.at(at).because(format!(
                    "the cluster has {count} references already, as many as a refcount of this image can say"
                )));
            }
            refcounts.set(ctx, reference.cluster, count + 1)?;
            added += 1;
            Ok(())
        });
        result.inspect_err(|_| {
            let _ = self.take_back_references(tables, added);
        })
    }

    /// Takes back the first `count` references that were added, none of which is in use.
    pub(super) fn take_back_references(&self, tables: &L2Tables, mut count: u64) -> Result<()> {
        let _shield = cancel::shield();
        self.each_reference(tables, None, &mut |ctx, refcounts, reference| {
            if count > 0 {
                count -= 1;
                let old = reference.refcount(ctx, refcounts)?;
                refcounts.set(ctx, reference.cluster, old - 1)?;
            }
            Ok(())
        })
    }

    /// Drops the references that `tables` hold. Nothing on disk leads to them any more.
    pub(super) fn drop_references(&self, tables: &L2Tables) -> Result<()> {
        self.each_reference(tables, None, &mut |ctx, refcounts, reference| {
            let cluster = reference.cluster;
            if !reference.is_table {
                refcounts.defer_unref(ctx, cluster..cluster.plus(1));
                return Ok(());
            }
            match reference.refcount(ctx, refcounts)? {
                1 if refcounts.metadata.contains(cluster) => {}
                1 => refcounts.defer_unref_table(ctx, cluster..cluster.plus(1)),
                count => refcounts.set(ctx, cluster, count - 1)?,
            }
            Ok(())
        })
    }

    /// Clears COPIED in every entry of `tables`, in memory.
    pub(super) fn clear_copied(&self, tables: &L2Tables, stop: &StopCheck<'_>) -> Result<()> {
        for table in &tables.0 {
            self.set_copied_in(*table, Some(stop), &mut |_, _, _| Ok(false))?;
        }
        Ok(())
    }

    /// Clears COPIED in the active L1 table, in memory.
    pub(super) fn clear_copied_l1(&self) {
        let mut meta = self.meta.lock();
        for index in 0..meta.l1().len() {
            meta.set_l1_copied(index, false);
        }
    }

    /// Sets COPIED in the active entries of clusters with one reference, in memory. The counts that became
    /// one are at least as far on their way to the disk.
    pub(super) fn set_copied(&self, tables: &L2Tables) -> Result<()> {
        let ctx = &self.ctx;
        for table in &tables.0 {
            let is_owned = {
                let mut meta = self.meta.lock();
                meta.refcounts(ctx)?.get(ctx, ctx.cluster().index(table.0))? == 1
            };
            // What a shared table maps is shared.
            if is_owned {
                self.set_copied_in(*table, None, &mut |ctx, refcounts, cluster| {
                    Ok(refcounts.get(ctx, cluster)? == 1)
                })?;
            }
        }
        let entries = self.meta.lock().l1().len();
        for start in (0..entries).step_by(L1_PIECE) {
            let mut meta = self.meta.lock();
            for index in start..(start + L1_PIECE).min(entries) {
                let Some(table) = meta.l1()[index].table() else { continue };
                let is_owned = meta.refcounts(ctx)?.get(ctx, ctx.cluster().index(table))? == 1;
                meta.set_l1_copied(index, is_owned);
            }
        }
        Ok(())
    }

    /// Sets or clears COPIED in the entries of one table that map a cluster, as `is_owned` says.
    fn set_copied_in(
        &self,
        (table, _): (HostOffset, GuestCluster),
        stop: Option<&StopCheck<'_>>,
        is_owned: &mut dyn FnMut(&ImageContext, &mut Refcounts, HostCluster) -> Result<bool>,
    ) -> Result<()> {
        let ctx = &self.ctx;
        let step = ctx.format.entry_size() as usize;
        for at in (0..ctx.cluster().bytes()).step_by(ctx.slice_size()) {
            stop.map_or(Ok(()), StopCheck::check)?;
            self.maybe_write_back()?;
            let mut meta = self.meta.lock();
            let slice = table.plus(at);
            let data = meta.load(ctx, slice)?.to_vec();
            let refcounts = meta.refcounts(ctx)?;
            let mut changed = Vec::new();
            for at in (0..data.len()).step_by(step) {
                let word = BigEndian::read_u64(&data[at..]);
                let Some(host) = ctx.format.mapped_host(word) else { continue };
                let wanted = is_owned(ctx, refcounts, ctx.cluster().index(host))?;
                if wanted != ctx.format.is_copied(word) {
                    changed.push((at, ctx.format.with_copied(word, wanted)));
                }
            }
            if let Some(data) = (!changed.is_empty()).then(|| meta.l2.edit(slice)).flatten() {
                changed.into_iter().for_each(|(at, word)| BigEndian::write_u64(&mut data[at..], word));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use std::sync::Arc;

    use blockmirror_block::testing::MemoryStorage;
    use blockmirror_block::{BlockDevice, WriteFlags};

    use super::*;
    use crate::{CreateOptions, OpenOptions};

    /// A write-back between slices may free a table whose own reference was dropped.
    #[test]
    fn a_table_is_visited_after_what_it_maps() {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(1 << 20);
        options.cluster_size = 512;
        options.create(&*storage, None).unwrap();
        let disk = OpenOptions::new().writable(true).open(storage).unwrap();
        disk.write_at(&[1; 1024], 0, WriteFlags::NONE).unwrap();
        disk.write_at(&[2; 512], 512 << 10, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        let tables = L2Tables::of(&disk.ctx, disk.meta.lock().l1()).unwrap();
        let mut visited = Vec::new();
        let mut visit = |_: &ImageContext, _: &mut Refcounts, reference: Reference| {
            visited.push(reference.is_table);
            Ok(())
        };
        disk.each_reference(&tables, None, &mut visit).unwrap();
        assert_eq!(visited, [false, false, true, false, true]);
    }
}
