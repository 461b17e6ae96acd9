//! A set of chunk numbers below a fixed length.
//!
//! The base of [`DirtyBitmap`](crate::DirtyBitmap); also used by itself where what is counted are clusters or
//! blocks (the COW bitmap of a target, clusters seen by a check). Must hold: no bit at or past `len` is ever
//! set.

use std::ops::Range;

use crate::tree::{Node, height_for};

/// A set of chunk numbers below a fixed length.
///
/// Ranges that reach past the length are clipped to it; reversed ranges are empty. Nothing here panics, for
/// any argument.
#[derive(Clone, Debug)]
pub struct ChunkBitmap {
    len: u64,
    height: u32,
    root: Node,
}

impl ChunkBitmap {
    /// An empty set of chunks below `len`. Costs the same few hundred bytes whatever the length.
    pub fn new(len: u64) -> Self {
        let height = height_for(len);
        Self { len, height, root: Node::uniform(height, false) }
    }

    /// Chunks that there are, set or not.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no chunks at all. (Whether none is *set*: [`count`](Self::count).)
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Chunks that are set.
    pub fn count(&self) -> u64 {
        self.root.count()
    }

    /// Chunks that are set in `range`.
    pub fn count_in(&self, range: Range<u64>) -> u64 {
        match self.clip(range) {
            Some((first, last)) => self.root.count_in(self.height, first, last),
            None => 0,
        }
    }

    /// Whether `chunk` is set; false past the end.
    pub fn get(&self, chunk: u64) -> bool {
        chunk < self.len && self.root.get(self.height, chunk)
    }

    /// Sets `range`; returns how many of it were clear.
    pub fn set(&mut self, range: Range<u64>) -> u64 {
        self.fill(range, true)
    }

    /// Clears `range`; returns how many of it were set.
    pub fn clear(&mut self, range: Range<u64>) -> u64 {
        self.fill(range, false)
    }

    /// Sets every chunk.
    pub fn set_all(&mut self) {
        self.root = Node::uniform(self.height, false);
        self.fill(0..self.len, true);
    }

    /// Clears every chunk.
    pub fn clear_all(&mut self) {
        self.root = Node::uniform(self.height, false);
    }

    /// The first set chunk at or after `from`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.next(from, true)
    }

    /// The first clear chunk at or after `from`.
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        self.next(from, false)
    }

    /// The first maximal run of set chunks at or after `from`. A run that began before starts at `from`.
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next_set(from)?;
        Some(start..self.next_clear(start).unwrap_or(self.len))
    }

    /// Sets every chunk that `other` has set; chunks past the own length are ignored.
    pub fn union(&mut self, other: &Self) {
        if other.len == self.len {
            self.root.union(self.height, &other.root);
            return;
        }
        let mut at = 0;
        while let Some(run) = other.next_run(at) {
            at = run.end;
            self.set(run);
        }
    }

    /// The chunks `64 * index ..` as a word, the first one lowest. Bits past the end are 0.
    pub fn word(&self, index: u64) -> u64 {
        match index.checked_mul(64) {
            Some(at) if at < self.len => self.root.word(self.height, at),
            _ => 0,
        }
    }

    /// Replaces the chunks `64 * index ..` by the bits of `bits`, the first one lowest. Bits past the end are
    /// ignored.
    pub fn set_word(&mut self, index: u64, bits: u64) {
        let Some(at) = index.checked_mul(64) else { return };
        let Some(left @ 1..) = self.len.checked_sub(at) else { return };
        let valid = if left < 64 { bits & ((1 << left) - 1) } else { bits };
        self.root.set_word(self.height, at, valid);
    }

    /// Bytes that the bitmap owns on the heap.
    pub fn heap_bytes(&self) -> usize {
        self.root.heap_bytes()
    }

    fn next(&self, from: u64, value: bool) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        self.root.next(self.height, from, value).filter(|&found| found < self.len)
    }

    fn fill(&mut self, range: Range<u64>, value: bool) -> u64 {
        let Some((first, last)) = self.clip(range) else { return 0 };
        let before = self.count();
        self.root.fill(self.height, first, last, value);
        before.abs_diff(self.count())
    }

    /// First and last chunk of `range`, if it holds any.
    fn clip(&self, range: Range<u64>) -> Option<(u64, u64)> {
        let end = range.end.min(self.len);
        (range.start < end).then(|| (range.start, end - 1))
    }
}

/// Equal when they have the same length and the same chunks set.
impl PartialEq for ChunkBitmap {
    fn eq(&self, other: &Self) -> bool {
        let mut at = 0;
        if self.len != other.len || self.count() != other.count() {
            return false;
        }
        while let Some(run) = self.next_run(at) {
            if other.next_run(at).as_ref() != Some(&run) {
                return false;
            }
            at = run.end;
        }
        true
    }
}

impl Eq for ChunkBitmap {}
