//! What each part of a disk holds, as sums over a bounded number of cells.
//!
//! Filled run by run, in any order that does not repeat a byte; a run costs as many steps as it touches
//! cells, so a whole disk costs as many as it has runs and cells.

use std::ops::Range;

use crate::style::Color;

/// The most cells of a map.
pub const CELLS: u64 = 2048;

/// The smallest cell, a sector.
const SMALLEST_CELL: u64 = 512;

/// Layers of a backing chain that are counted one by one; those below are counted together.
pub(crate) const LAYERS: usize = 8;

/// What a run of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// Data, stored as it is in the image itself.
    Data,
    /// Data that comes from a backing file.
    Backing,
    /// Data that is stored compressed.
    Compressed,
    /// Space is taken, and reads as zeros.
    Preallocated,
    /// Reads as zeros and takes no space: a hole in a file, or a cluster marked as zero.
    Zero,
    /// No layer says anything of it.
    Hole,
}

impl Content {
    pub(crate) const ALL: [Self; 6] =
        [Self::Data, Self::Backing, Self::Compressed, Self::Preallocated, Self::Zero, Self::Hole];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Data => "Data",
            Self::Backing => "Data of a backing file",
            Self::Compressed => "Compressed data",
            Self::Preallocated => "Allocated, reads as zeros",
            Self::Zero => "Zeros, no space taken",
            Self::Hole => "Unallocated",
        }
    }

    pub(crate) fn color(self) -> Color {
        match self {
            Self::Data => Color::Data,
            Self::Backing => Color::Backing,
            Self::Compressed => Color::Compressed,
            Self::Preallocated => Color::Preallocated,
            Self::Zero => Color::Zero,
            Self::Hole => Color::Hole,
        }
    }

    fn is_data(self) -> bool {
        matches!(self, Self::Data | Self::Backing | Self::Compressed)
    }
}

/// Bytes for each [`Content`].
pub(crate) type Mix = [u64; Content::ALL.len()];

/// Pieces of data of one order of length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pieces {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
}

/// Pieces shorter than this are counted together, by order of length; then those that are longer.
pub(crate) const PIECE_LIMITS: [u64; 4] = [64 << 10, 1 << 20, 16 << 20, 256 << 20];

/// What a part of a disk holds: the figures of a picture.
#[derive(Clone, Debug)]
pub struct Allocation {
    range: Range<u64>,
    cell: u64,
    cells: Vec<Mix>,
    totals: Mix,
    /// Data by the layer that it comes from.
    layers: [u64; LAYERS + 1],
    pieces: [Pieces; PIECE_LIMITS.len() + 1],
}

impl Allocation {
    /// Of the bytes `range` of a disk, of which nothing is known yet.
    pub fn new(range: Range<u64>) -> Self {
        let len = range.end.saturating_sub(range.start);
        let cell = len.div_ceil(CELLS).next_power_of_two().max(SMALLEST_CELL);
        // At most `CELLS`.
        let cells = vec![Mix::default(); len.div_ceil(cell) as usize];
        Self {
            range: range.start..range.start + len,
            cell,
            cells,
            totals: Mix::default(),
            layers: Default::default(),
            pieces: Default::default(),
        }
    }

    /// Takes a run of the disk, which holds `content`; `depth` says which layer of the chain it comes from, 0
    /// is the image itself. Data that lies in one piece in its file is one run.
    pub fn push(&mut self, run: Range<u64>, content: Content, depth: u32) {
        let (start, end) = (run.start.max(self.range.start), run.end.min(self.range.end));
        let Some(length) = end.checked_sub(start).filter(|length| *length > 0) else { return };
        self.totals[content as usize] += length;
        if content.is_data() {
            self.layers[(depth as usize).min(LAYERS)] += length;
        }
        if matches!(content, Content::Data | Content::Backing) {
            let order = PIECE_LIMITS.iter().filter(|limit| length >= **limit).count();
            self.pieces[order].count += 1;
            self.pieces[order].bytes += length;
        }
        let (mut at, end) = (start - self.range.start, end - self.range.start);
        while at < end {
            let index = at / self.cell;
            let next = ((index + 1).saturating_mul(self.cell)).min(end);
            self.cells[index as usize][content as usize] += next - at;
            at = next;
        }
    }

    pub(crate) fn start(&self) -> u64 {
        self.range.start
    }

    /// Bytes that it is about.
    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Bytes of a cell; the last one may have less.
    pub(crate) fn cell(&self) -> u64 {
        self.cell
    }

    pub(crate) fn cells(&self) -> &[Mix] {
        &self.cells
    }

    pub(crate) fn total(&self, content: Content) -> u64 {
        self.totals[content as usize]
    }

    pub(crate) fn data(&self) -> u64 {
        Content::ALL.into_iter().filter(|content| content.is_data()).map(|content| self.total(content)).sum()
    }

    pub(crate) fn layers(&self) -> &[u64] {
        &self.layers
    }

    pub(crate) fn pieces(&self) -> &[Pieces] {
        &self.pieces
    }

    /// Pieces of data that is stored as it is.
    pub(crate) fn piece_count(&self) -> u64 {
        self.pieces.iter().map(|pieces| pieces.count).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn cells_are_bounded_and_hold_each_byte_once() {
        for len in [0, 1, 511, 512, 513, 1 << 20, (1 << 20) + 1, 8 << 40, u64::MAX] {
            let mut allocation = Allocation::new(0..len);
            assert!(allocation.cells().len() as u64 <= CELLS, "{len}");
            assert!(allocation.cell().is_power_of_two());
            allocation.push(0..len, Content::Data, 0);
            let sum: u128 = allocation.cells().iter().flatten().map(|bytes| u128::from(*bytes)).sum();
            assert_eq!(sum, u128::from(len), "{len}");
        }
    }

    #[test]
    fn what_lies_outside_does_not_count() {
        let mut allocation = Allocation::new(4096..8192);
        allocation.push(0..5000, Content::Data, 2);
        allocation.push(5000..6000, Content::Zero, 0);
        allocation.push(6000..u64::MAX, Content::Compressed, 20);
        allocation.push(9000..9001, Content::Data, 0);
        let total = |content| allocation.total(content);
        assert_eq!(
            (total(Content::Data), total(Content::Zero), total(Content::Compressed)),
            (904, 1000, 2192)
        );
        assert_eq!(
            (allocation.layers()[2], allocation.layers()[LAYERS], allocation.data()),
            (904, 2192, 3096)
        );
        assert_eq!(allocation.piece_count(), 1, "compressed data has no pieces");
    }

    #[test]
    fn pieces_are_counted_by_length() {
        let mut allocation = Allocation::new(0..1 << 40);
        for length in [1, (64 << 10) - 1, 64 << 10, 1 << 20, 300 << 20] {
            allocation.push(0..length, Content::Data, 0);
        }
        let counts: Vec<_> = allocation.pieces().iter().map(|pieces| pieces.count).collect();
        assert_eq!(counts, [2, 1, 1, 0, 1]);
        assert_eq!(allocation.pieces().last().unwrap().bytes, 300 << 20);
    }
}
