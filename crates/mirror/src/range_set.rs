//! A set of bytes of a disk: a [`RangeMap`] without values, whose ranges are merged.
//!
//! The core keeps in one what it has taken from the dirty bitmap and not finished. The number of ranges is
//! bounded by the caller (queued extents and operations in flight).

use blockmirror_block::ByteRange;

use crate::range_map::RangeMap;

/// Disjoint, non-empty, non-touching ranges.
#[derive(Debug, Default)]
pub(crate) struct RangeSet {
    runs: RangeMap<()>,
}

impl RangeSet {
    /// Bytes in the set.
    pub(crate) fn bytes(&self) -> u64 {
        self.runs.bytes()
    }

    /// Adds all of `range`.
    pub(crate) fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let mut all = range;
        while let Some((run, ())) = self.runs.take_touching(all) {
            all = ByteRange::new(all.start().min(run.start()), all.end().max(run.end()));
        }
        self.runs.insert(all, ());
    }

    /// Takes all of `range` out.
    pub(crate) fn remove(&mut self, range: ByteRange) {
        self.runs.cut(range, |_, ()| {});
    }

    /// The first run that shares a byte with `range`, whole.
    pub(crate) fn first_overlap(&self, range: ByteRange) -> Option<ByteRange> {
        self.runs.first_overlap(range).map(|(run, ())| run)
    }

    /// Separate runs.
    pub(crate) fn count(&self) -> usize {
        self.runs.len()
    }

    /// The runs in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.runs.iter().map(|(run, ())| run)
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
