//! The lowest level of the tree: 4096 chunks as 64 words, with two summary words.
//!
//! Used by `tree` alone, for stretches that are neither all clear nor all set. Must hold: `any`, `full` and
//! `count` always agree with `words`.

/// Binary logarithm of the chunks in a leaf.
pub(crate) const LEAF_SHIFT: u32 = 12;

/// Chunks in a leaf.
pub(crate) const LEAF_CHUNKS: u64 = 1 << LEAF_SHIFT;

#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    /// Words that are not zero.
    any: u64,
    /// Words that are all ones.
    full: u64,
    /// Bits set.
    count: u32,
    words: [u64; 64],
}

impl Leaf {
    pub(crate) fn uniform(value: bool) -> Self {
        let word = if value { u64::MAX } else { 0 };
        Self { any: word, full: word, count: if value { 1 << LEAF_SHIFT } else { 0 }, words: [word; 64] }
    }

    pub(crate) fn count(&self) -> u64 {
        u64::from(self.count)
    }

    pub(crate) fn get(&self, at: u64) -> bool {
        self.words[slot(at)] >> (at & 63) & 1 == 1
    }

    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index]
    }

    pub(crate) fn set_word(&mut self, index: usize, bits: u64) {
        let old = std::mem::replace(&mut self.words[index], bits);
        self.count = self.count - old.count_ones() + bits.count_ones();
        let bit = 1 << index;
        self.any = if bits == 0 { self.any & !bit } else { self.any | bit };
        self.full = if bits == u64::MAX { self.full | bit } else { self.full & !bit };
    }

    /// Sets `first..=last` to `value`.
    pub(crate) fn fill(&mut self, first: u64, last: u64, value: bool) {
        for (index, mask) in masks(first, last) {
            let old = self.words[index];
            self.set_word(index, if value { old | mask } else { old & !mask });
        }
    }

    /// Bits set in `first..=last`.
    pub(crate) fn count_in(&self, first: u64, last: u64) -> u64 {
        masks(first, last).map(|(index, mask)| u64::from((self.words[index] & mask).count_ones())).sum()
    }

    /// The first chunk at or after `from` whose bit is `value`.
    pub(crate) fn next(&self, from: u64, value: bool) -> Option<u64> {
        let flip = if value { 0 } else { u64::MAX };
        let index = slot(from);
        let here = (self.words[index] ^ flip) & (u64::MAX << (from & 63));
        if here != 0 {
            return Some((from & !63) + u64::from(here.trailing_zeros()));
        }
        let candidates = if value { self.any } else { !self.full };
        // Two shifts, because one by 64 is not defined.
        let later = candidates & (u64::MAX << index << 1);
        if later == 0 {
            return None;
        }
        let index = later.trailing_zeros();
        let bits = self.words[index as usize] ^ flip;
        Some(u64::from(index * 64 + bits.trailing_zeros()))
    }

    /// Sets what is set in `other` as well.
    pub(crate) fn union(&mut self, other: &Self) {
        for index in 0..64 {
            if other.any >> index & 1 == 1 {
                self.set_word(index, self.words[index] | other.words[index]);
            }
        }
    }
}

/// The word that holds chunk `at` of a leaf.
fn slot(at: u64) -> usize {
    (at >> 6 & 63) as usize
}

/// The words that `first..=last` touches, and which of their bits.
fn masks(first: u64, last: u64) -> impl Iterator<Item = (usize, u64)> {
    let (head, tail) = (slot(first), slot(last));
    (head..=tail).map(move |index| {
        let mut mask = u64::MAX;
        if index == head {
            mask &= u64::MAX << (first & 63);
        }
        if index == tail {
            mask &= u64::MAX >> (63 - (last & 63));
        }
        (index, mask)
    })
}
