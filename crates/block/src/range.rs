//! Half-open byte ranges, the unit in which every crate talks about parts of a disk.
//!
//! A range never ends before it starts; the constructors hold that, and text that says otherwise is refused.

use std::fmt;
use std::ops::Range;

/// A half-open range of bytes, `start..end`. May be empty. It converts from and to [`Range`], and is written
/// as one (`{"start": 0, "end": 512}`) with the feature `serde`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Bounds", into = "Range<u64>"))]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range from `start` up to, not including, `end`; empty at `start` if `end` lies before it.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    /// `len` bytes from `start`; clipped at the end of the 64-bit space.
    pub const fn at(start: u64, len: u64) -> Self {
        Self { start, end: start.saturating_add(len) }
    }

    /// The range that an I/O of `len` bytes at `offset` touches, or `None` if it would pass the 64-bit space.
    pub fn checked(offset: u64, len: usize) -> Option<Self> {
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        Some(Self { start: offset, end })
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `offset` lies inside.
    pub const fn contains(self, offset: u64) -> bool {
        self.start <= offset && offset < self.end
    }

    /// Whether all of `other` lies inside. An empty range lies inside everything.
    pub const fn contains_range(self, other: Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// Whether the two share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The shared part; empty if there is none.
    pub fn intersect(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The smallest range of whole `unit`s (a power of two) that covers this one; clipped at the last whole
    /// unit of the 64-bit space.
    pub fn align_outward(self, unit: u64) -> Self {
        debug_assert!(unit.is_power_of_two());
        if self.is_empty() {
            return Self::new(self.start & !(unit - 1), self.start & !(unit - 1));
        }
        Self::new(self.start & !(unit - 1), self.end.checked_next_multiple_of(unit).unwrap_or(!(unit - 1)))
    }

    /// The largest range of whole `unit`s (a power of two) inside this one; empty if none fits.
    pub fn align_inward(self, unit: u64) -> Self {
        debug_assert!(unit.is_power_of_two());
        Self::new(self.start.checked_next_multiple_of(unit).unwrap_or(self.end), self.end & !(unit - 1))
    }

    /// Consecutive pieces of at most `max` bytes, cut at multiples of `max` of the disk where `max` is a
    /// power of two, so that pieces of neighbouring ranges meet at the same borders.
    pub fn pieces(self, max: u64) -> impl Iterator<Item = ByteRange> {
        let max = max.max(1);
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let border = if max.is_power_of_two() {
                (at & !(max - 1)).saturating_add(max)
            } else {
                at.saturating_add(max)
            };
            let piece = ByteRange::new(at, border.min(self.end));
            at = piece.end;
            Some(piece)
        })
    }
}

/// A range as it is read.
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
struct Bounds {
    start: u64,
    end: u64,
}

/// Text from outside that has a range the wrong way round is an error, not an empty range.
#[cfg(feature = "serde")]
impl TryFrom<Bounds> for ByteRange {
    type Error = &'static str;

    fn try_from(Bounds { start, end }: Bounds) -> Result<Self, Self::Error> {
        if end < start {
            return Err("a range ends before it starts");
        }
        Ok(Self { start, end })
    }
}

/// Empty at its start if it ends before that.
impl From<Range<u64>> for ByteRange {
    fn from(range: Range<u64>) -> Self {
        Self::new(range.start, range.end)
    }
}

impl From<ByteRange> for Range<u64> {
    fn from(range: ByteRange) -> Self {
        range.start..range.end
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_rounds_the_right_way() {
        let r = ByteRange::new(5, 17);
        assert_eq!(r.align_outward(8), ByteRange::new(0, 24));
        assert_eq!(r.align_inward(8), ByteRange::new(8, 16));
        assert!(ByteRange::new(9, 15).align_inward(8).is_empty());
        assert_eq!(ByteRange::new(u64::MAX - 3, u64::MAX).align_outward(8).end(), !7);
    }

    #[test]
    fn pieces_meet_at_common_borders() {
        let cut: Vec<_> = ByteRange::new(3, 20).pieces(8).collect();
        assert_eq!(cut, [ByteRange::new(3, 8), ByteRange::new(8, 16), ByteRange::new(16, 20)]);
        assert_eq!(ByteRange::new(7, 7).pieces(8).count(), 0);
    }

    #[test]
    fn ranges_convert_and_a_reversed_one_is_empty() {
        let range = ByteRange::from(5..17);
        assert_eq!((range, Range::from(range)), (ByteRange::new(5, 17), 5..17));
        assert_eq!(ByteRange::from(Range { start: 9, end: 3 }), ByteRange::new(9, 9));
    }

    #[test]
    fn reversed_bounds_make_an_empty_range() {
        assert!(ByteRange::new(9, 3).is_empty());
        assert_eq!(ByteRange::new(9, 3).len(), 0);
        assert!(!ByteRange::new(0, 4).overlaps(ByteRange::new(4, 8)));
        assert!(ByteRange::checked(u64::MAX, 2).is_none());
    }
}
