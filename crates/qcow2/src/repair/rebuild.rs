//! Makes the refcount table and its blocks anew, where nothing else lies.
//!
//! The new ones are durable before the header points at them, in one write of one sector. Until then the old
//! ones stay as they are.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use crate::check::{Block, Checker, Mending};
use crate::error::{Error, Result};
use crate::limits::MAX_REFCOUNT_TABLE_BYTES;

/// Where the header has the offset of the refcount table, and after it the number of its clusters.
const HEADER_REFCOUNT_TABLE: u64 = 48;

/// Where the new structures go.
struct Plan {
    /// The blocks that there will be, by their index in the table.
    blocks: BTreeSet<u64>,
    /// Clusters of the table, which follows the blocks.
    table_clusters: u64,
    /// All of the new clusters.
    place: Range<u64>,
    /// Clusters of old blocks whose refcounts cannot be believed.
    doubtful: HashSet<u64>,
}

impl Checker<'_> {
    /// Writes new refcounts for what was counted, which is all but the old refcount structures, and has the
    /// header point at them.
    pub(super) fn rebuild_refcounts(&mut self) -> Result<()> {
        self.mending(&Mending::NewRefcounts);
        let plan = self.plan()?;
        let size = self.cluster_size();
        let (per_block, width) = (self.disk.per_block(), self.disk.width());
        // At most 8 MiB, and one cluster.
        let mut table = vec![0; (plan.table_clusters * size) as usize];
        let mut block = vec![0; size as usize];
        for (index, cluster) in plan.blocks.iter().zip(plan.place.start..) {
            self.step(size)?;
            for (slot, counted) in (index * per_block..(index + 1) * per_block).enumerate() {
                let refcount = self.new_refcount(&plan, counted)?;
                width.set(&mut block, slot, refcount);
            }
            self.storage.write_at(&block, cluster * size)?;
            // Below the table's length, by the plan.
            BigEndian::write_u64(&mut table[*index as usize * 8..], cluster * size);
        }
        let table_at = (plan.place.end - plan.table_clusters) * size;
        self.storage.write_at(&table, table_at)?;
        self.storage.flush()?;
        let mut place = [0; 12];
        BigEndian::write_u64(&mut place, table_at);
        // At most 8 MiB of clusters.
        BigEndian::write_u32(&mut place[8..], plan.table_clusters as u32);
        self.storage.write_at(&place, HEADER_REFCOUNT_TABLE)?;
        self.storage.flush()?;
        self.report_freed(&plan);
        Ok(())
    }

    /// Names the clusters of the old structures, which the new ones call free.
    fn report_freed(&mut self, plan: &Plan) {
        if !self.may_free() {
            return;
        }
        let end = self.file_clusters();
        let is_freed = |old: &u64| *old < end && self.counts.get(*old) == 0 && !plan.place.contains(old);
        let freed: BTreeSet<u64> = self.old_structures().into_iter().filter(is_freed).collect();
        for cluster in freed {
            self.mending(&Mending::Refcount { cluster, refcount: 1, references: 0 });
        }
    }

    /// What the refcount of `cluster` is to be. Nothing is freed unless all that uses clusters was counted.
    fn new_refcount(&mut self, plan: &Plan, cluster: u64) -> Result<u64> {
        if plan.place.contains(&cluster) {
            return Ok(1);
        }
        let counted = self.counts.refcount(cluster);
        if self.may_free() || cluster >= self.file_clusters() {
            return Ok(counted);
        }
        Ok(self.old_refcount(&plan.doubtful, cluster)?.unwrap_or(1).max(counted))
    }

    /// The refcount of `cluster` in the old structures; `None` if it is not known.
    fn old_refcount(&mut self, doubtful: &HashSet<u64>, cluster: u64) -> Result<Option<u64>> {
        match self.disk.block(cluster / self.disk.per_block()) {
            Block::At(offset) if doubtful.contains(&(offset / self.cluster_size())) => Ok(None),
            _ => Ok(self.disk.get(self.storage, cluster)?),
        }
    }

    /// The clusters of old refcount blocks that lie past the end of the file, where something else lies, or
    /// that are blocks of several ranges.
    fn doubtful_blocks(&self) -> HashSet<u64> {
        let (mut seen, mut doubtful) = (HashSet::new(), HashSet::new());
        for index in 0..self.disk.table.len() as u64 {
            let Block::At(offset) = self.disk.block(index) else { continue };
            let cluster = offset / self.cluster_size();
            if !seen.insert(cluster) || cluster >= self.file_clusters() || self.counts.get(cluster) > 0 {
                doubtful.insert(cluster);
            }
        }
        doubtful
    }

    fn plan(&mut self) -> Result<Plan> {
        let (size, per_block) = (self.cluster_size(), self.disk.per_block());
        let may_free = self.may_free();
        let doubtful = if may_free { HashSet::new() } else { self.doubtful_blocks() };
        let end = self.counts.end();
        let used = if may_free { end } else { end.max(self.file_clusters()) }.div_ceil(per_block);
        let mut blocks: BTreeSet<u64> = (0..used)
            .filter(|index| !may_free || self.counts.any(index * per_block, (index + 1) * per_block))
            .collect();
        loop {
            // The new clusters need refcounts themselves: they are added until that needs no more clusters.
            let entries = blocks.last().map_or(0, |last| last + 1);
            let table_clusters = (entries * 8).div_ceil(size).max(1);
            let place = self.free_run(table_clusters + blocks.len() as u64, &doubtful)?;
            let before = blocks.len();
            blocks.extend(place.start / per_block..=(place.end - 1) / per_block);
            let bytes = table_clusters * size;
            if bytes > MAX_REFCOUNT_TABLE_BYTES {
                let (what, limit) = ("the refcount table, in bytes,", MAX_REFCOUNT_TABLE_BYTES);
                return Err(Error::LimitExceeded { what, value: bytes, limit });
            }
            if blocks.len() == before {
                return Ok(Plan { blocks, table_clusters, place, doubtful });
            }
        }
    }

    /// `clusters` clusters in a row that nothing refers to and that are not of the old refcount structures:
    /// behind the end of the file, where it can grow. Unless all that uses clusters was counted, an old block
    /// says that they are free.
    fn free_run(&mut self, clusters: u64, doubtful: &HashSet<u64>) -> Result<Range<u64>> {
        let end = self.file_clusters().max(self.counts.end());
        if !self.storage.info().fixed_len {
            return Ok(end..end + clusters);
        }
        let old = self.old_structures();
        let mut run = 0..0;
        for cluster in 0..self.storage.len()? / self.cluster_size() {
            let in_use = self.counts.get(cluster) > 0 || old.contains(&cluster);
            if in_use || !(self.may_free() || self.is_known_free(doubtful, cluster)?) {
                run = cluster + 1..cluster + 1;
            } else {
                run.end = cluster + 1;
            }
            if run.end - run.start == clusters {
                return Ok(run);
            }
        }
        let full = blockmirror_block::Error::new(blockmirror_block::ErrorKind::NoSpace, "repair");
        let why = format!("no {clusters} free clusters in a row for new refcounts");
        Err(full.in_file(self.storage.name()).because(why).into())
    }

    fn is_known_free(&mut self, doubtful: &HashSet<u64>, cluster: u64) -> Result<bool> {
        let has_block = matches!(self.disk.block(cluster / self.disk.per_block()), Block::At(_));
        Ok(has_block && self.old_refcount(doubtful, cluster)? == Some(0))
    }

    /// The clusters of the present refcount table and blocks.
    fn old_structures(&self) -> HashSet<u64> {
        let size = self.cluster_size();
        let table = self.header.refcount_table_offset / size;
        let mut old: HashSet<u64> = (table..table + u64::from(self.header.refcount_table_clusters)).collect();
        for index in 0..self.disk.table.len() as u64 {
            if let Block::At(offset) = self.disk.block(index) {
                old.insert(offset / size);
            }
        }
        old
    }
}
