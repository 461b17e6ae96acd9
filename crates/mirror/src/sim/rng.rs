//! Pseudo-random numbers (splitmix64): the same on every machine, so that a seed is all it takes to repeat a
//! schedule.

use blockmirror_block::ByteRange;

/// The generator.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`; 0 if that is 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// True once in `n` times; always if that is 0.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// An index into something of `len` elements.
    pub(crate) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// A range of at most `longest` bytes of a disk of `len` bytes.
    pub(crate) fn range(&mut self, len: u64, longest: u64) -> ByteRange {
        self.range_in(ByteRange::new(0, len), longest)
    }

    /// A range of at most `longest` bytes inside `within`.
    pub(crate) fn range_in(&mut self, within: ByteRange, longest: u64) -> ByteRange {
        let start = within.start() + self.below(within.len());
        ByteRange::at(start, 1 + self.below(longest)).intersect(within)
    }

    /// Bytes without a zero among them, other ones with each call.
    pub(crate) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let seed = self.next() as u8;
        (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed | 1).collect()
    }
}
