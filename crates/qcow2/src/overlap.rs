//! Which host clusters hold metadata, so that guest data is never written over it.
//!
//! Built at a writable open from the header, the L1 table, the refcount table and what they point at; kept up
//! to date by the allocator. Consulted before every write to a host cluster that the image's tables name.

use std::collections::HashMap;
use std::ops::Range;

use blockmirror_block::{ByteRange, Result};

use crate::context::ImageContext;
use crate::format::entry::L1Entry;
use crate::offset::HostOffset;

/// The operation that [`MetadataMap::check_write`] refuses; who meets it marks the image corrupt.
pub(crate) const WRITE_OVER_METADATA: &str = "write over metadata";

/// A set of host cluster indexes, 64 to a word.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    words: HashMap<u64, u64>,
}

impl MetadataMap {
    /// Adds a cluster; false if it was there already.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        let word = self.words.entry(cluster / 64).or_default();
        let bit = 1 << (cluster % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Removes a cluster.
    pub(crate) fn remove(&mut self, cluster: u64) {
        if let Some(word) = self.words.get_mut(&(cluster / 64)) {
            *word &= !(1 << (cluster % 64));
            if *word == 0 {
                self.words.remove(&(cluster / 64));
            }
        }
    }

    /// Whether the cluster holds metadata.
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        self.words.get(&(cluster / 64)).is_some_and(|word| word & (1 << (cluster % 64)) != 0)
    }

    /// The first cluster from `cluster` on that holds no metadata.
    pub(crate) fn next_absent(&self, mut cluster: u64) -> u64 {
        while let Some(word) = self.words.get(&(cluster / 64)) {
            let rest = (word >> (cluster % 64)).trailing_ones();
            cluster += u64::from(rest);
            // Not cut off by the end of the word.
            if cluster % 64 != 0 || rest == 0 {
                break;
            }
        }
        cluster
    }

    /// The last cluster of `range` that holds metadata.
    pub(crate) fn last_in(&self, range: Range<u64>) -> Option<u64> {
        let mut end = range.end;
        while end > range.start {
            let last = end - 1;
            let word = self.words.get(&(last / 64)).copied().unwrap_or_default();
            // Those up to `last`.
            let below = word << (63 - last % 64);
            if below != 0 {
                let found = last - u64::from(below.leading_zeros());
                return (found >= range.start).then_some(found);
            }
            end = last / 64 * 64;
        }
        None
    }

    /// Adds every cluster of `range`, refusing one that is there already: two tables in one cluster would
    /// overwrite each other.
    pub(crate) fn claim(&mut self, ctx: &ImageContext, what: &'static str, range: ByteRange) -> Result<()> {
        let cluster = ctx.cluster();
        for index in cluster.index(range.start())..cluster.count(range.end()) {
            if !self.insert(index) {
                return Err(ctx.corrupt(
                    "open for writing",
                    cluster.start(index),
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
            self.claim(ctx, "an L2 table", ByteRange::at(table.0, ctx.cluster().bytes()))?;
        }
        Ok(())
    }

    /// Refuses a guest write to a host cluster that holds metadata.
    pub(crate) fn check_write(&self, ctx: &ImageContext, host: HostOffset) -> Result<()> {
        if !self.contains(ctx.cluster().index(host.0)) {
            return Ok(());
        }
        Err(ctx.corrupt(
            WRITE_OVER_METADATA,
            host.0,
            "the mapped cluster holds metadata; the write was refused",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_come_and_go() {
        let mut map = MetadataMap::default();
        assert!(map.insert(63) && map.insert(64) && !map.insert(64));
        assert!(map.contains(63) && map.contains(64) && !map.contains(65));
        map.remove(64);
        assert!(!map.contains(64) && map.contains(63));
        map.remove(1 << 40);
    }

    #[test]
    fn the_next_cluster_without_metadata_is_found_over_words() {
        let mut map = MetadataMap::default();
        assert_eq!(map.next_absent(5), 5);
        (60..200).for_each(|cluster| assert!(map.insert(cluster)));
        map.remove(130);
        for (from, next) in
            [(0, 0), (59, 59), (60, 130), (64, 130), (127, 130), (131, 200), (192, 200), (200, 200)]
        {
            assert_eq!(map.next_absent(from), next, "from {from}");
        }
        (200..256).for_each(|cluster| assert!(map.insert(cluster)));
        assert_eq!(map.next_absent(150), 256);
    }

    #[test]
    fn the_last_cluster_with_metadata_is_found_over_words() {
        let mut map = MetadataMap::default();
        [3, 63, 130].into_iter().for_each(|cluster| assert!(map.insert(cluster)));
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
            assert_eq!(map.last_in(range.clone()), last, "{range:?}");
        }
    }
}
