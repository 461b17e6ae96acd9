//! Pseudo-random numbers (splitmix64): the same on every machine, so that a seed is all it takes to repeat a
//! run. The simulator, the stress test, the fuzzers and random tests take theirs from here.
//!
//! Must hold: the sequence of a seed never changes, because findings are reported as seeds.

use crate::ByteRange;

/// The generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The numbers of `seed`, which are others for every `salt`.
    pub fn new(seed: u64, salt: u64) -> Self {
        let mut rng = Self(seed ^ salt.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }

    /// The numbers that splitmix64 makes from `state`.
    pub fn from_state(state: u64) -> Self {
        Self(state)
    }

    #[expect(clippy::should_implement_trait, reason = "an iterator could end")]
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if `n` is.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// A number from `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `percent` of a hundred cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// True once in `n` times; always if that is 0.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of `of`, which is not empty.
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())].clone()
    }

    /// An index into something of length `len`; 0 if that is empty.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// At most `longest` bytes inside `within`.
    pub fn byte_range(&mut self, within: ByteRange, longest: u64) -> ByteRange {
        let start = within.start() + self.below(within.len());
        ByteRange::at(start, 1 + self.below(longest)).intersect(within)
    }

    /// Bytes, each as random as the numbers.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_be_bytes()[0]).collect()
    }

    /// Bytes without a zero among them, other ones with each call.
    pub fn nonzero_bytes(&mut self, len: u64) -> Vec<u8> {
        let seed = self.next() as u8;
        (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed | 1).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeds of findings stay good.
    #[test]
    fn the_sequence_of_a_seed_is_fixed() {
        // The reference values of splitmix64 for the state 1234567.
        let mut rng = Rng::from_state(1_234_567);
        assert_eq!([rng.next(), rng.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
        assert_ne!(Rng::new(1, 2).next(), Rng::new(1, 3).next());
    }
}
