//! A set of bytes of a disk, kept as disjoint ranges.
//!
//! The core keeps in one what it has taken from the dirty bitmap and not finished: to the byte, whatever the
//! granularity, so that work on a small range never holds up its neighbours. The number of ranges is bounded
//! by the caller (queued extents and operations in flight).

use std::collections::BTreeMap;

use blockmirror_block::ByteRange;

/// Disjoint, non-empty, non-touching ranges.
#[derive(Debug, Default)]
pub(crate) struct RangeSet {
    /// Start to end.
    runs: BTreeMap<u64, u64>,
    bytes: u64,
}

impl RangeSet {
    /// Bytes in the set.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds all of `range`.
    pub(crate) fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start(), range.end());
        // From the run before or at `start`, as long as runs touch.
        while let Some((&s, &e)) = self.runs.range(..=end).next_back()
            && e >= start
        {
            self.runs.remove(&s);
            self.bytes -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.runs.insert(start, end);
        self.bytes += end - start;
    }

    /// Takes all of `range` out.
    pub(crate) fn remove(&mut self, range: ByteRange) {
        while let Some(run) = self.first_overlap(range) {
            self.runs.remove(&run.start());
            self.bytes -= run.len();
            for rest in [
                ByteRange::new(run.start(), range.start().min(run.end())),
                ByteRange::new(range.end().max(run.start()), run.end()),
            ] {
                if !rest.is_empty() {
                    self.runs.insert(rest.start(), rest.end());
                    self.bytes += rest.len();
                }
            }
        }
    }

    /// The first run that shares a byte with `range`, whole.
    pub(crate) fn first_overlap(&self, range: ByteRange) -> Option<ByteRange> {
        if range.is_empty() {
            return None;
        }
        let before = self.runs.range(..=range.start()).next_back();
        let after = || self.runs.range(range.start()..range.end()).next();
        before
            .filter(|&(_, &end)| end > range.start())
            .or_else(after)
            .map(|(&start, &end)| ByteRange::new(start, end))
    }

    /// Separate runs.
    pub(crate) fn count(&self) -> usize {
        self.runs.len()
    }

    /// The runs in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.runs.iter().map(|(&start, &end)| ByteRange::new(start, end))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_booleans(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..64), 0..60),
            probe in (0u64..64, 0u64..64),
        ) {
            let mut set = RangeSet::default();
            let mut model = [false; 64];
            for (add, a, b) in steps {
                let range = ByteRange::new(a, b);
                if add { set.insert(range) } else { set.remove(range) }
                for i in a..b.max(a) {
                    model[i as usize] = add;
                }
            }
            prop_assert_eq!(set.bytes(), model.iter().filter(|&&b| b).count() as u64);
            let runs: Vec<_> = set.iter().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].start()), "maximal runs: {:?}", runs);
            let got: Vec<bool> = (0..64).map(|i| runs.iter().any(|r| r.contains(i))).collect();
            prop_assert_eq!(&got[..], &model[..]);
            let probe = ByteRange::new(probe.0, probe.1);
            let expected = runs.iter().find(|r| !probe.is_empty() && r.overlaps(probe)).copied();
            prop_assert_eq!(set.first_overlap(probe), expected);
        }
    }
}
