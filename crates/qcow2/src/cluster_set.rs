//! A set of host clusters: what holds metadata (`overlap`), and what the entries of an image map (`reopen`).
//! 64 of them take 16 bytes where they lie together, and as many where each lies alone.

use std::collections::HashMap;
use std::ops::Range;

use crate::offset::HostCluster;

/// A set of host cluster indexes, 64 to a word.
#[derive(Debug, Default)]
pub(crate) struct ClusterSet {
    words: HashMap<u64, u64>,
}

impl ClusterSet {
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

    /// Whether the cluster is in it.
    pub(crate) fn contains(&self, HostCluster(cluster): HostCluster) -> bool {
        self.words.get(&(cluster / 64)).is_some_and(|word| word & (1 << (cluster % 64)) != 0)
    }

    /// Whether there is none in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The clusters, in order.
    pub(crate) fn sorted(&self) -> Vec<HostCluster> {
        let mut words: Vec<_> = self.words.iter().map(|(index, word)| (*index, *word)).collect();
        words.sort_unstable();
        let bits = |word: u64| (0..64).filter(move |bit| word & (1 << bit) != 0);
        words.into_iter().flat_map(|(i, word)| bits(word).map(move |bit| HostCluster(i * 64 + bit))).collect()
    }

    /// The first cluster from `cluster` on that is not in the set.
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

    /// The last cluster of `range` that is in it.
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(cluster: u64) -> HostCluster {
        HostCluster(cluster)
    }

    #[test]
    fn clusters_come_and_go() {
        let mut set = ClusterSet::default();
        assert!(set.insert(at(63)) && set.insert(at(64)) && !set.insert(at(64)));
        assert!(set.contains(at(63)) && set.contains(at(64)) && !set.contains(at(65)));
        set.remove(at(64));
        assert!(!set.contains(at(64)) && set.contains(at(63)));
        set.remove(at(1 << 40));
    }

    #[test]
    fn the_next_absent_cluster_is_found_over_words() {
        let mut set = ClusterSet::default();
        assert_eq!(set.next_absent(at(5)), at(5));
        (60..200).for_each(|cluster| assert!(set.insert(at(cluster))));
        set.remove(at(130));
        for (from, next) in
            [(0, 0), (59, 59), (60, 130), (64, 130), (127, 130), (131, 200), (192, 200), (200, 200)]
        {
            assert_eq!(set.next_absent(at(from)), at(next), "from {from}");
        }
        (200..256).for_each(|cluster| assert!(set.insert(at(cluster))));
        assert_eq!(set.next_absent(at(150)), at(256));
    }

    #[test]
    fn the_last_cluster_is_found_over_words() {
        let mut set = ClusterSet::default();
        [3, 63, 130].into_iter().for_each(|cluster| assert!(set.insert(at(cluster))));
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
            assert_eq!(set.last_in(at(range.start)..at(range.end)), last.map(at), "{range:?}");
        }
    }
}
