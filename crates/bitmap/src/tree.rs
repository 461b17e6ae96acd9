//! The 64-way tree of clear, full and mixed subtrees.
//!
//! Used by `chunk` alone. A node of height 0 is a leaf of 4096 chunks; a node of height `h` has 64 slots of
//! height `h - 1`. A slot that is all clear or all set is only two bits in the node; a mixed one is a child.
//! Must hold after every operation: a child is neither all clear nor all set, and counts are exact. Positions
//! are relative to the node, and ranges are inclusive, so that a tree over the whole 64-bit space does not
//! overflow.

use crate::leaf::{LEAF_CHUNKS, LEAF_SHIFT, Leaf};

/// A subtree, whose height its owner knows.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    /// Height 0.
    Leaf(Box<Leaf>),
    /// Height 1 and more.
    Inner(Box<Inner>),
}

#[derive(Clone, Debug)]
pub(crate) struct Inner {
    /// Slots that are not all clear.
    any: u64,
    /// Slots that are all set.
    full: u64,
    /// Bits set below.
    count: u64,
    /// One for every slot in `any & !full`, in order.
    children: Vec<Node>,
}

/// The height of a tree that has room for `len` chunks.
pub(crate) fn height_for(len: u64) -> u32 {
    let mut height = 0;
    while slot_shift(height + 1) < u64::BITS && (len.saturating_sub(1)) >> slot_shift(height + 1) != 0 {
        height += 1;
    }
    height
}

/// Binary logarithm of the chunks in one slot of a node of `height` (at least 1).
const fn slot_shift(height: u32) -> u32 {
    LEAF_SHIFT + 6 * (height - 1)
}

/// Where `at` falls in a node of `height`: which slot, and where in it.
fn split(height: u32, at: u64) -> (u32, u64) {
    let shift = slot_shift(height);
    ((at >> shift & 63) as u32, at & ((1 << shift) - 1))
}

/// What [`Node::heap_bytes`] of a tree with room for `len` chunks is at most: every subtree is mixed.
pub(crate) fn most_heap_bytes(len: u64) -> u64 {
    let mut nodes = len.div_ceil(LEAF_CHUNKS).max(1);
    let mut bytes = nodes.saturating_mul(size_of::<Leaf>() as u64);
    let inner = size_of::<Inner>() as u64;
    for _ in 0..height_for(len) {
        let above = nodes.div_ceil(64);
        // Room for children grows by doubling, up to the 64 that there are.
        let room = nodes.next_power_of_two().clamp(4, 64) * size_of::<Node>() as u64;
        bytes = bytes.saturating_add(above.saturating_mul(inner + room));
        nodes = above;
    }
    bytes
}

impl Node {
    pub(crate) fn uniform(height: u32, value: bool) -> Self {
        if height == 0 {
            return Self::Leaf(Box::new(Leaf::uniform(value)));
        }
        let slots = if value { u64::MAX } else { 0 };
        let count = if value { LEAF_CHUNKS << (6 * height) } else { 0 };
        Self::Inner(Box::new(Inner { any: slots, full: slots, count, children: Vec::new() }))
    }

    pub(crate) fn count(&self) -> u64 {
        match self {
            Self::Leaf(leaf) => leaf.count(),
            Self::Inner(inner) => inner.count,
        }
    }

    pub(crate) fn get(&self, height: u32, at: u64) -> bool {
        match self {
            Self::Leaf(leaf) => leaf.get(at),
            Self::Inner(inner) => {
                let (slot, rest) = split(height, at);
                match inner.child(slot) {
                    Ok(child) => child.get(height - 1, rest),
                    Err(value) => value,
                }
            }
        }
    }

    /// The 64 bits from chunk `at`, a multiple of 64.
    pub(crate) fn word(&self, height: u32, at: u64) -> u64 {
        match self {
            Self::Leaf(leaf) => leaf.word((at >> 6 & 63) as usize),
            Self::Inner(inner) => {
                let (slot, rest) = split(height, at);
                match inner.child(slot) {
                    Ok(child) => child.word(height - 1, rest),
                    Err(value) => {
                        if value {
                            u64::MAX
                        } else {
                            0
                        }
                    }
                }
            }
        }
    }

    /// Replaces the 64 bits from chunk `at`, a multiple of 64.
    pub(crate) fn set_word(&mut self, height: u32, at: u64, bits: u64) {
        match self {
            Self::Leaf(leaf) => leaf.set_word((at >> 6 & 63) as usize, bits),
            Self::Inner(inner) => {
                let (slot, rest) = split(height, at);
                if inner.child(slot).is_err_and(|value| bits == if value { u64::MAX } else { 0 }) {
                    return;
                }
                inner.change(height, slot, |child| child.set_word(height - 1, rest, bits));
            }
        }
    }

    /// Sets `first..=last` to `value`.
    pub(crate) fn fill(&mut self, height: u32, first: u64, last: u64, value: bool) {
        match self {
            Self::Leaf(leaf) => leaf.fill(first, last, value),
            Self::Inner(inner) => {
                for (slot, lo, hi, whole) in inner_slots(height, first, last) {
                    if whole {
                        inner.set_slot(height, slot, value);
                    } else if inner.child(slot).err() != Some(value) {
                        inner.change(height, slot, |child| child.fill(height - 1, lo, hi, value));
                    }
                }
            }
        }
    }

    /// Bits set in `first..=last`.
    pub(crate) fn count_in(&self, height: u32, first: u64, last: u64) -> u64 {
        match self {
            Self::Leaf(leaf) => leaf.count_in(first, last),
            Self::Inner(inner) => inner_slots(height, first, last)
                .map(|(slot, lo, hi, whole)| match inner.child(slot) {
                    Ok(child) if whole => child.count(),
                    Ok(child) => child.count_in(height - 1, lo, hi),
                    Err(true) => hi - lo + 1,
                    Err(false) => 0,
                })
                .sum(),
        }
    }

    /// The first chunk at or after `from` whose bit is `value`. May lie past the end of the bitmap.
    pub(crate) fn next(&self, height: u32, from: u64, value: bool) -> Option<u64> {
        let inner = match self {
            Self::Leaf(leaf) => return leaf.next(from, value),
            Self::Inner(inner) => inner,
        };
        let candidates = if value { inner.any } else { !inner.full };
        let (mut slot, mut rest) = split(height, from);
        while slot < 64 {
            let left = candidates & (u64::MAX << slot);
            if left == 0 {
                return None;
            }
            if left.trailing_zeros() != slot {
                (slot, rest) = (left.trailing_zeros(), 0);
            }
            let found = match inner.child(slot) {
                Ok(child) => child.next(height - 1, rest, value),
                Err(_) => Some(rest),
            };
            if let Some(found) = found {
                // Slots past the 64-bit space exist in the highest possible tree; they are always clear.
                return u64::from(slot).checked_mul(1 << slot_shift(height))?.checked_add(found);
            }
            (slot, rest) = (slot + 1, 0);
        }
        None
    }

    /// Sets what is set in `other`, of the same height, as well.
    pub(crate) fn union(&mut self, height: u32, other: &Self) {
        match (self, other) {
            (Self::Leaf(mine), Self::Leaf(theirs)) => mine.union(theirs),
            (Self::Inner(mine), Self::Inner(theirs)) => {
                let mut left = theirs.any & !mine.full;
                while left != 0 {
                    let slot = left.trailing_zeros();
                    left &= left - 1;
                    match theirs.child(slot) {
                        Ok(child) => mine.change(height, slot, |own| own.union(height - 1, child)),
                        Err(value) => mine.set_slot(height, slot, value),
                    }
                }
            }
            _ => debug_assert!(false, "trees of different height"),
        }
    }

    /// Bytes on the heap.
    pub(crate) fn heap_bytes(&self) -> usize {
        match self {
            Self::Leaf(_) => size_of::<Leaf>(),
            Self::Inner(inner) => {
                size_of::<Inner>()
                    + inner.children.capacity() * size_of::<Self>()
                    + inner.children.iter().map(Self::heap_bytes).sum::<usize>()
            }
        }
    }
}

impl Inner {
    /// Index in `children` of the child for `slot`, or where it would be.
    fn index(&self, slot: u32) -> usize {
        let below = (1u64 << slot) - 1;
        (self.any & !self.full & below).count_ones() as usize
    }

    /// The child for a mixed `slot`, or the one value of all its bits.
    fn child(&self, slot: u32) -> Result<&Node, bool> {
        let bit = 1 << slot;
        if self.full & bit != 0 {
            Err(true)
        } else if self.any & bit == 0 {
            Err(false)
        } else {
            Ok(&self.children[self.index(slot)])
        }
    }

    /// Makes the whole `slot` of this node of `height` all clear or all set.
    fn set_slot(&mut self, height: u32, slot: u32, value: bool) {
        let span = 1u64 << slot_shift(height);
        let bit = 1u64 << slot;
        let before = match self.child(slot) {
            Ok(child) => child.count(),
            Err(true) => span,
            Err(false) => 0,
        };
        if self.any & !self.full & bit != 0 {
            let index = self.index(slot);
            self.children.remove(index);
        }
        if value {
            self.any |= bit;
            self.full |= bit;
        } else {
            self.any &= !bit;
            self.full &= !bit;
        }
        self.count = self.count - before + if value { span } else { 0 };
    }

    /// Lets `edit` change the child for `slot`, making one for it and doing away with it as needed.
    fn change(&mut self, height: u32, slot: u32, edit: impl FnOnce(&mut Node)) {
        let span = 1u64 << slot_shift(height);
        let bit = 1u64 << slot;
        let index = self.index(slot);
        if let Err(value) = self.child(slot) {
            self.children.insert(index, Node::uniform(height - 1, value));
            self.any |= bit;
            self.full &= !bit;
        }
        let child = &mut self.children[index];
        let before = child.count();
        edit(child);
        let after = child.count();
        self.count = self.count - before + after;
        if after == 0 || after == span {
            self.children.remove(index);
            if after == 0 {
                self.any &= !bit;
            } else {
                self.full |= bit;
            }
        }
    }
}

/// The slots of a node of `height` that `first..=last` touches: the slot, the first and last chunk in it, and
/// whether that is all of it.
fn inner_slots(height: u32, first: u64, last: u64) -> impl Iterator<Item = (u32, u64, u64, bool)> {
    let top = (1u64 << slot_shift(height)) - 1;
    let ((head, lo), (tail, hi)) = (split(height, first), split(height, last));
    (head..=tail).map(move |slot| {
        let lo = if slot == head { lo } else { 0 };
        let hi = if slot == tail { hi } else { top };
        (slot, lo, hi, lo == 0 && hi == top)
    })
}
