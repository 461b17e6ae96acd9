//! Which host clusters hold metadata, so that guest data is never written over it.
//!
//! Built at a writable open from the header, the L1 table, the refcount table and what they point at; kept up
//! to date by whatever moves a table. Consulted before every write to a host cluster that the image's tables
//! name. A free cluster that a failed write may still change is in it too, so that it is not handed out.
//!
//! The allocator and the check of writes ask different questions. The allocator passes over all of the map.
//! A write is checked against the kinds that [`OverlapChecks`] has, without I/O; which kind it would hit is
//! looked up only after a hit.

use std::ops::Range;

use blockmirror_block::Result;

use crate::cluster_set::ClusterSet;
use crate::context::ImageContext;
use crate::damage::Damage;
use crate::format::entry::L1Entry;
use crate::offset::{ClusterRange, HostCluster, HostOffset};
pub(crate) use crate::overlap_checks::{MetadataKind, OverlapChecks};

/// The clusters that hold metadata, by kind.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    /// Those of all kinds but [`MetadataKind::InactiveL2`], and those that are not to be handed out.
    all: ClusterSet,
    by_kind: [ClusterSet; MetadataKind::ALL.len()],
    pub(crate) checks: OverlapChecks,
}

impl MetadataMap {
    /// A map of nothing, for writes that are checked against `checks`.
    pub(crate) fn new(checks: OverlapChecks) -> Self {
        Self { checks, ..Self::default() }
    }

    /// Adds a cluster; false if it holds metadata already.
    ///
    /// An L2 table of a snapshot may be one of the disk too, so it is in a set of its own: its refcount keeps
    /// it from being handed out, and the disk's reference to it can be dropped.
    pub(crate) fn insert(&mut self, kind: MetadataKind, cluster: HostCluster) -> bool {
        self.by_kind[kind as usize].insert(cluster);
        kind == MetadataKind::InactiveL2 || self.all.insert(cluster)
    }

    /// `cluster` no longer holds metadata of this kind.
    pub(crate) fn remove(&mut self, kind: MetadataKind, cluster: HostCluster) {
        self.by_kind[kind as usize].remove(cluster);
        if kind != MetadataKind::InactiveL2 {
            self.all.remove(cluster);
        }
    }

    /// The L2 tables of snapshots are in these clusters from now on.
    pub(crate) fn set_inactive_l2(&mut self, tables: ClusterSet) {
        self.by_kind[MetadataKind::InactiveL2 as usize] = tables;
    }

    /// Whether a snapshot has an L2 table in `cluster`.
    pub(crate) fn is_inactive_l2(&self, cluster: HostCluster) -> bool {
        self.by_kind[MetadataKind::InactiveL2 as usize].contains(cluster)
    }

    /// The clusters of the L2 tables that only snapshots refer to, in order.
    pub(crate) fn only_inactive_l2(&self) -> Vec<HostCluster> {
        let mut tables = self.by_kind[MetadataKind::InactiveL2 as usize].sorted();
        tables.retain(|table| !self.by_kind[MetadataKind::ActiveL2 as usize].contains(*table));
        tables
    }

    /// `cluster`, which is free, is not handed out while the image is open.
    pub(crate) fn leave_unused(&mut self, cluster: HostCluster) {
        self.all.insert(cluster);
    }

    /// Whether the cluster holds metadata, or is not to be handed out.
    pub(crate) fn contains(&self, cluster: HostCluster) -> bool {
        self.all.contains(cluster)
    }

    /// The first cluster from `cluster` on that holds no metadata.
    pub(crate) fn next_absent(&self, cluster: HostCluster) -> HostCluster {
        self.all.next_absent(cluster)
    }

    /// The last cluster of `range` that holds metadata.
    pub(crate) fn last_in(&self, range: Range<HostCluster>) -> Option<HostCluster> {
        self.all.last_in(range)
    }

    /// Adds every cluster of `len` bytes at `at`, refusing one that is there already: two tables in one
    /// cluster would overwrite each other.
    pub(crate) fn claim(
        &mut self,
        ctx: &ImageContext,
        kind: MetadataKind,
        at: HostOffset,
        len: u64,
    ) -> Result<()> {
        let cluster = ctx.cluster();
        for index in cluster.touched(at, len).each() {
            if !self.insert(kind, index) {
                return Err(ctx.corrupt(
                    "open for writing",
                    cluster.start(index).0,
                    format!("{kind} overlaps other metadata"),
                ));
            }
        }
        Ok(())
    }

    /// Adds the tables that the L1 table points at.
    pub(crate) fn claim_l2_tables(&mut self, ctx: &ImageContext, l1: &[L1Entry]) -> Result<()> {
        for (index, table) in l1.iter().enumerate().filter_map(|(i, e)| Some((i, e.table()?))) {
            // usize to u64 is exact here.
            ctx.check_table("read L1 table", table, index as u64)?;
            self.claim(ctx, MetadataKind::ActiveL2, table, ctx.cluster().bytes())?;
        }
        Ok(())
    }

    /// Refuses a guest write to a host cluster that holds metadata which writes are checked against.
    pub(crate) fn check_write(&self, ctx: &ImageContext, host: HostOffset) -> Result<()> {
        let cluster = ctx.cluster().index(host);
        let may_hit = self.all.contains(cluster)
            || self.checks.contains(MetadataKind::InactiveL2)
                && self.by_kind[MetadataKind::InactiveL2 as usize].contains(cluster);
        if !may_hit {
            return Ok(());
        }
        let is_hit = |kind: &MetadataKind| {
            self.checks.contains(*kind) && self.by_kind[*kind as usize].contains(cluster)
        };
        match MetadataKind::ALL.into_iter().find(is_hit) {
            Some(kind) => Err(Damage::Overlap(kind).met(ctx, host)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_a_snapshot_may_be_one_of_the_disk_too() {
        let mut map = MetadataMap::default();
        let at = HostCluster(7);
        assert!(map.insert(MetadataKind::ActiveL2, at));
        assert!(map.insert(MetadataKind::InactiveL2, at));
        map.remove(MetadataKind::ActiveL2, at);
        assert!(!map.contains(at), "its refcount keeps it");
        assert!(map.insert(MetadataKind::InactiveL1, at));
        assert!(!map.insert(MetadataKind::RefcountBlock, at));
    }
}
