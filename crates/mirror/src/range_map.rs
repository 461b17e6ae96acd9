//! A map from disjoint ranges of a disk to values, by where they begin.
//!
//! The work tracker keeps in such maps what it has taken from the dirty bitmap, what is queued, what waits
//! for another try and what has failed: to the byte, whatever the granularity, so that work on a small range
//! never holds up its neighbours. Each caller bounds the number of its ranges.
//!
//! Must hold: ranges do not overlap, and none is empty.

use std::collections::BTreeMap;

use blockmirror_block::ByteRange;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct RangeMap<V> {
    /// Start to end and value.
    entries: BTreeMap<u64, (u64, V)>,
    bytes: u64,
}

impl<V> Default for RangeMap<V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), bytes: 0 }
    }
}

impl<V> RangeMap<V> {
    /// Separate ranges.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes in them.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The entries in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (ByteRange, &V)> {
        self.entries.iter().map(entry)
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.entries.values_mut().map(|(_, value)| value)
    }

    /// Adds `range`, which overlaps none that is there. An empty one is not added.
    pub(crate) fn insert(&mut self, range: ByteRange, value: V) {
        debug_assert!(self.first_overlap(range).is_none(), "{range} is there");
        if !range.is_empty() {
            self.bytes += range.len();
            self.entries.insert(range.start(), (range.end(), value));
        }
    }

    /// Takes out the entry that begins at `start`.
    pub(crate) fn remove(&mut self, start: u64) -> Option<(ByteRange, V)> {
        let (end, value) = self.entries.remove(&start)?;
        let range = ByteRange::new(start, end);
        self.bytes -= range.len();
        Some((range, value))
    }

    /// The entry that begins at `start`.
    pub(crate) fn get(&self, start: u64) -> Option<(ByteRange, &V)> {
        self.entries.get(&start).map(|(end, value)| (ByteRange::new(start, *end), value))
    }

    /// The first entry that begins at `at` or later.
    pub(crate) fn first_from(&self, at: u64) -> Option<(ByteRange, &V)> {
        self.entries.range(at..).next().map(entry)
    }

    /// The first entry that shares a byte with `range`, whole.
    pub(crate) fn first_overlap(&self, range: ByteRange) -> Option<(ByteRange, &V)> {
        if range.is_empty() {
            return None;
        }
        let before = self.entries.range(..range.start()).next_back().map(entry);
        let inside = || self.entries.range(range.start()..range.end()).next().map(entry);
        before.filter(|(other, _)| other.end() > range.start()).or_else(inside)
    }

    /// Takes out the last entry that overlaps `range` or touches it.
    pub(crate) fn take_touching(&mut self, range: ByteRange) -> Option<(ByteRange, V)> {
        let (&start, &(end, _)) = self.entries.range(..=range.end()).next_back()?;
        if end < range.start() { None } else { self.remove(start) }
    }

    /// Takes out what lies in `range`; hands each piece to `each`. What an entry has on either side stays.
    pub(crate) fn cut(&mut self, range: ByteRange, mut each: impl FnMut(ByteRange, &V))
    where
        V: Clone,
    {
        while let Some((whole, _)) = self.first_overlap(range)
            && let Some((_, value)) = self.remove(whole.start())
        {
            let cut = whole.intersect(range);
            self.insert(ByteRange::new(whole.start(), cut.start()), value.clone());
            self.insert(ByteRange::new(cut.end(), whole.end()), value.clone());
            each(cut, &value);
        }
    }
}

fn entry<'a, V>((start, (end, value)): (&u64, &'a (u64, V))) -> (ByteRange, &'a V) {
    (ByteRange::new(*start, *end), value)
}
