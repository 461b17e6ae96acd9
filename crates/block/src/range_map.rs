//! Values of the bytes of a disk, kept as runs.
//!
//! For holes and allocation maps. Must hold: the number of runs is bounded by what the caller has set.

use std::collections::BTreeMap;

use crate::ByteRange;

/// A value for some of the bytes of a disk.
///
/// ```
/// use blockmirror_block::{ByteRange, RangeMap};
///
/// let mut map = RangeMap::default();
/// map.set(ByteRange::new(0, 100), Some('a'));
/// map.set(ByteRange::new(50, 60), Some('b'));
/// map.set(ByteRange::new(70, 200), None);
/// let pieces: Vec<_> = map.pieces(ByteRange::new(10, 90)).collect();
/// assert_eq!(
///     pieces,
///     [
///         (ByteRange::new(10, 50), Some('a')),
///         (ByteRange::new(50, 60), Some('b')),
///         (ByteRange::new(60, 70), Some('a')),
///         (ByteRange::new(70, 90), None),
///     ]
/// );
/// ```
#[derive(Clone, Debug)]
pub struct RangeMap<V> {
    /// Start to end and value. Runs do not overlap, are not empty, and two that touch differ.
    runs: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for RangeMap<V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<V: Copy + PartialEq> RangeMap<V> {
    /// Gives all of `range` the value, or takes its values away.
    pub fn set(&mut self, range: ByteRange, value: Option<V>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start(), range.end());
        // Runs that touch `range`, the one that begins before it included.
        let near: Vec<(u64, u64, V)> = self
            .runs
            .range(..=end)
            .rev()
            .take_while(|(_, (run_end, _))| *run_end >= start)
            .map(|(at, (run_end, value))| (*at, *run_end, *value))
            .collect();
        for (run_start, run_end, run_value) in near {
            self.runs.remove(&run_start);
            if Some(run_value) == value {
                start = start.min(run_start);
                end = end.max(run_end);
                continue;
            }
            if run_start < range.start() {
                self.runs.insert(run_start, (range.start(), run_value));
            }
            if run_end > range.end() {
                self.runs.insert(range.end(), (run_end, run_value));
            }
        }
        if let Some(value) = value {
            self.runs.insert(start, (end, value));
        }
    }

    /// `range` in maximal pieces, in order and without gaps, each with its value.
    pub fn pieces(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, Option<V>)> {
        let mut at = range.start();
        std::iter::from_fn(move || {
            if at >= range.end() {
                return None;
            }
            let here = self.runs.range(..=at).next_back().filter(|(_, (end, _))| *end > at);
            let (end, value) = match here {
                Some((_, (end, value))) => (*end, Some(*value)),
                None => (self.runs.range(at..).next().map_or(u64::MAX, |(start, _)| *start), None),
            };
            let piece = ByteRange::new(at, end.min(range.end()));
            at = piece.end();
            Some((piece, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_values(
            steps in prop::collection::vec((0u64..64, 0u64..64, prop::option::of(0u8..3)), 0..40),
            asked in (0u64..70, 0u64..70),
        ) {
            let mut map = RangeMap::default();
            let mut model = [None; 70];
            for (a, b, value) in steps {
                map.set(ByteRange::new(a, b), value);
                if a < b {
                    model[a as usize..b as usize].fill(value);
                }
            }
            let asked = ByteRange::new(asked.0, asked.1);
            let pieces: Vec<_> = map.pieces(asked).collect();
            prop_assert!(pieces.windows(2).all(|two| two[0].0.end() == two[1].0.start() && two[0].1 != two[1].1));
            let bytes: Vec<_> = pieces
                .iter()
                .flat_map(|(range, value)| std::iter::repeat_n(*value, range.len() as usize))
                .collect();
            let wanted = if asked.is_empty() { &[][..] } else { &model[asked.start() as usize..asked.end() as usize] };
            prop_assert_eq!(&bytes[..], wanted);
        }
    }
}
