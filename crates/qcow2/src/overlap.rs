//! Which host clusters hold metadata, so that guest data is never written over it.
//!
//! Built at a writable open from the header, the L1 table, the refcount table and what they point at; kept up
//! to date by the allocator. Consulted before every write to a host cluster that the image's tables name. A
//! free cluster that a failed write may still change is in it too, so that it is not handed out.

use std::collections::HashMap;
use std::ops::Range;

use blockmirror_block::Result;

use crate::context::ImageContext;
use crate::damage::Damage;
use crate::format::entry::L1Entry;
use crate::offset::{ClusterRange, HostCluster, HostOffset};

/// A set of host cluster indexes, 64 to a word.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    words: HashMap<u64, u64>,
}

impl MetadataMap {
    /// Adds a cluster; false if it was there already.
    pub(crate) fn insert(&mut self, cluster: HostCluster) -> bool {
        let word = self.words.entry(cluster.0 / 64).or_default();
        let bit = 1 << (cluster.0 % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Removes a cluster.
    pub(crate) fn remove(&mut self, HostCluster(cluster): HostCluster) {
        if let Some(word) = self.words.get_mut(&(cluster / 64)) {
            *word &= !(1 << (cluster % 64));
            if *word == 0 {
                self.words.remove(&(cluster / 64));
            }
        }
    }

    /// Whether the cluster holds metadata.
    pub(crate) fn contains(&self, HostCluster(cluster): HostCluster) -> bool {
        self.words.get(&(cluster / 64)).is_some_and(|word| word & (1 << (cluster % 64)) != 0)
    }

    /// The first cluster from `cluster` on that holds no metadata.
    pub(crate) fn next_absent(&self, HostCluster(mut cluster): HostCluster) -> HostCluster {
        while let Some(word) = self.words.get(&(cluster / 64)) {
            let rest = (word >> (cluster % 64)).trailing_ones();
            cluster += u64::from(rest);
            // Not cut off by the end of the word.
            if cluster % 64 != 0 || rest == 0 {
                break;
            }
        }
        HostCluster(cluster)
    }

    /// The last cluster of `range` that holds metadata.
    pub(crate) fn last_in(&self, range: Range<HostCluster>) -> Option<HostCluster> {
        let (start, mut end) = (range.start.0, range.end.0);
        while end > start {
            let last = end - 1;
            let word = self.words.get(&(last / 64)).copied().unwrap_or_default();
            // Those up to `last`.
            let below = word << (63 - last % 64);
            if below != 0 {
                let found = last - u64::from(below.leading_zeros());
                return (found >= start).then_some(HostCluster(found));
            }
            end = last / 64 * 64;
        }
        None
    }

    /// Adds every cluster of `len` bytes at `at`, refusing one that is there already: two tables in one
    /// cluster would overwrite each other.
    pub(crate) fn claim(
        &mut self,
        ctx: &ImageContext,
        what: &'static str,
        at: HostOffset,
        len: u64,
    ) -> Result<()> {
        let cluster = ctx.cluster();
        for index in cluster.touched(at, len).each() {
            if !self.insert(index) {
                return Err(ctx.corrupt(
                    "open for writing",
                    cluster.start(index).0,
                    format!("{what} overlaps other metadata"),
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
            self.claim(ctx, "an L2 table", table, ctx.cluster().bytes())?;
        }
        Ok(())
    }

    /// Refuses a guest write to a host cluster that holds metadata.
    pub(crate) fn check_write(&self, ctx: &ImageContext, host: HostOffset) -> Result<()> {
        if !self.contains(ctx.cluster().index(host)) {
            return Ok(());
        }
        Err(Damage::Overlap.met(ctx, host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(cluster: u64) -> HostCluster {
        HostCluster(cluster)
    }

    #[test]
    fn clusters_come_and_go() {
        let mut map = MetadataMap::default();
        assert!(map.insert(at(63)) && map.insert(at(64)) && !map.insert(at(64)));
        assert!(map.contains(at(63)) && map.contains(at(64)) && !map.contains(at(65)));
        map.remove(at(64));
        assert!(!map.contains(at(64)) && map.contains(at(63)));
        map.remove(at(1 << 40));
    }

    #[test]
    fn the_next_cluster_without_metadata_is_found_over_words() {
        let mut map = MetadataMap::default();
        assert_eq!(map.next_absent(at(5)), at(5));
        (60..200).for_each(|cluster| assert!(map.insert(at(cluster))));
        map.remove(at(130));
        for (from, next) in
            [(0, 0), (59, 59), (60, 130), (64, 130), (127, 130), (131, 200), (192, 200), (200, 200)]
        {
            assert_eq!(map.next_absent(at(from)), at(next), "from {from}");
        }
        (200..256).for_each(|cluster| assert!(map.insert(at(cluster))));
        assert_eq!(map.next_absent(at(150)), at(256));
    }

    #[test]
    fn the_last_cluster_with_metadata_is_found_over_words() {
        let mut map = MetadataMap::default();
        [3, 63, 130].into_iter().for_each(|cluster| assert!(map.insert(at(cluster))));
        for (range, last) in [
            (0..3, None),
            (0..4, Some(3)),
            (4..63, None),
            (4..64, Some(63)),
            (0..130, Some(63)),
            (64..130, None),
            (0..1000, Some(130)),
            (131..1000, None),
            (5..5, None),
        ] {
            assert_eq!(map.last_in(at(range.start)..at(range.end)), last.map(at), "{range:?}");
        }
    }
}
