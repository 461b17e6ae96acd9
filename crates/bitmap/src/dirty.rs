//! Which bytes of a disk are dirty, at a granularity.
//!
//! The mirror job keeps one for what is left to copy; persistent bitmaps of qcow2 are loaded into one. A
//! granule is dirty as a whole; the last one ends with the disk. Marking rounds outward and clearing inward,
//! so that a bit never claims that bytes are clean which were not copied.

use std::error::Error;
use std::fmt;
use std::ops::Range;

use crate::ChunkBitmap;
use crate::tree::most_heap_bytes;

/// The finest granularity in bytes.
pub const MIN_GRANULARITY: u64 = 512;

/// The coarsest granularity in bytes: 2 GiB, that of persistent bitmaps.
pub const MAX_GRANULARITY: u64 = 2 << 30;

/// The bits of a bitmap of [`affordable_granularity`] take this much memory at most.
const AFFORDABLE_BYTES: u64 = 32 << 20;

/// The finest granularity at which a bitmap of a disk of `len` bytes takes less than 40 MiB, whatever is
/// dirty in it: 512 bytes up to 128 GiB, 4 KiB at 1 TiB, 32 KiB at 8 TiB. (Past 512 PiB it takes more,
/// because a granule is at most 2 GiB.)
pub fn affordable_granularity(len: u64) -> u64 {
    len.div_ceil(AFFORDABLE_BYTES * 8).next_power_of_two().clamp(MIN_GRANULARITY, MAX_GRANULARITY)
}

/// What a bitmap of a disk of `len` bytes at `granularity` takes at most, whatever is dirty in it:
/// [`DirtyBitmap::heap_bytes`] is never more.
///
/// ```
/// use blockmirror_bitmap::worst_case_bytes;
///
/// assert_eq!(worst_case_bytes(1 << 40, 4096) >> 20, 34);
/// assert!(worst_case_bytes(1 << 40, 64 << 20) < 4096);
/// ```
pub fn worst_case_bytes(len: u64, granularity: u64) -> u64 {
    most_heap_bytes(len.div_ceil(granularity.max(1)))
}

/// A granularity that no bitmap can have.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GranularityError {
    /// Below [`MIN_GRANULARITY`] or above [`MAX_GRANULARITY`].
    OutOfRange(u64),
    /// In range, but not a power of two.
    NotPowerOfTwo(u64),
}

impl fmt::Display for GranularityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange(given) => {
                write!(f, "granularity {given} is not between {MIN_GRANULARITY} and {MAX_GRANULARITY}")
            }
            Self::NotPowerOfTwo(given) => write!(f, "granularity {given} is not a power of two"),
        }
    }
}

impl Error for GranularityError {}

/// The dirty bytes of a disk.
///
/// Offsets and lengths are bytes. Ranges that reach past the end of the disk are clipped; reversed ranges are
/// empty. Nothing panics, for any argument.
#[derive(Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    len: u64,
    shift: u32,
    pub(crate) granules: ChunkBitmap,
}

impl DirtyBitmap {
    /// An all-clean bitmap for a disk of `len` bytes at `granularity` bytes per bit.
    ///
    /// # Errors
    /// Unless `granularity` lies between [`MIN_GRANULARITY`] and [`MAX_GRANULARITY`] and is a power of two.
    /// The range is tested first.
    pub fn new(len: u64, granularity: u64) -> Result<Self, GranularityError> {
        if !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity) {
            return Err(GranularityError::OutOfRange(granularity));
        }
        if !granularity.is_power_of_two() {
            return Err(GranularityError::NotPowerOfTwo(granularity));
        }
        let granules = ChunkBitmap::new(len.div_ceil(granularity));
        Ok(Self { len, shift: granularity.trailing_zeros(), granules })
    }

    /// Length of the disk in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the disk has no bytes. (Whether none is dirty: [`is_clean`](Self::is_clean).)
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes per granule.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Granules of the disk, the last one possibly partial.
    pub fn granules(&self) -> u64 {
        self.granules.len()
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.granules.count() == 0
    }

    /// Dirty granules.
    pub fn dirty_granules(&self) -> u64 {
        self.granules.count()
    }

    /// Dirty bytes. A partial last granule counts only the bytes that the disk has.
    pub fn dirty_bytes(&self) -> u64 {
        self.bytes_of(self.granules.count(), self.last_is_dirty())
    }

    /// Dirty bytes inside `range`, to the byte.
    pub fn dirty_bytes_in(&self, range: Range<u64>) -> u64 {
        let range = self.clip(range);
        let touched = self.outward(&range);
        let Some(last) = touched.end.checked_sub(1) else { return 0 };
        let with_last = touched.end == self.granules() && self.last_is_dirty();
        let mut sum = self.bytes_of(self.granules.count_in(touched.clone()), with_last);
        if self.granules.get(touched.start) {
            sum -= range.start - self.granule(touched.start).start;
        }
        if self.granules.get(last) {
            sum -= self.granule(last).end - range.end;
        }
        sum
    }

    /// Whether the granule of `offset` is dirty; false past the end.
    pub fn is_dirty(&self, offset: u64) -> bool {
        self.granules.get(offset >> self.shift)
    }

    /// Marks every granule that `range` touches; returns the bytes that became dirty.
    pub fn set(&mut self, range: Range<u64>) -> u64 {
        let last = self.last_is_dirty();
        let changed = self.granules.set(self.outward(&self.clip(range)));
        self.bytes_of(changed, last != self.last_is_dirty())
    }

    /// Clears every granule that lies wholly in `range`; returns the bytes that became clean. (The last
    /// granule lies in it if all the bytes that the disk has there do.)
    pub fn clear(&mut self, range: Range<u64>) -> u64 {
        let last = self.last_is_dirty();
        let changed = self.granules.clear(self.inward(&self.clip(range)));
        self.bytes_of(changed, last != self.last_is_dirty())
    }

    /// Marks the whole disk.
    pub fn set_all(&mut self) {
        self.granules.set_all();
    }

    /// Clears the whole disk.
    pub fn clear_all(&mut self) {
        self.granules.clear_all();
    }

    /// The first run of dirty bytes at or after `from`, at most `max` bytes of it; `None` if there is none,
    /// or if `max` is 0.
    ///
    /// It starts at `from` if that lies inside a dirty run. Where `max` cuts it short, the cut is at the
    /// border of a granule if one lies within reach, so that the run can be cleared as a whole.
    pub fn next_dirty(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let start = from.max(self.granules.next_set(from >> self.shift)? << self.shift);
        let reach = start.saturating_add(max);
        let end = match self.granules.next_clear(start >> self.shift) {
            Some(clean) => clean << self.shift,
            None => self.len,
        };
        self.cut(start, end, reach)
    }

    /// The first run of clean bytes at or after `from`, at most `max` bytes of it; rules as for
    /// [`next_dirty`](Self::next_dirty).
    pub fn next_clean(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let start = from.max(self.granules.next_clear(from >> self.shift)? << self.shift);
        let reach = start.saturating_add(max);
        let end = match self.granules.next_set(start >> self.shift) {
            Some(dirty) => dirty << self.shift,
            None => self.len,
        };
        self.cut(start, end, reach)
    }

    /// All dirty runs, in order, each whole.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut cursor = Cursor::new(0);
        std::iter::from_fn(move || cursor.next_run(self, u64::MAX))
    }

    /// Marks what is dirty in `other`, which may have another granularity, and another length: bytes past the
    /// own end are ignored.
    pub fn merge(&mut self, other: &Self) {
        if other.shift == self.shift && other.len == self.len {
            self.granules.union(&other.granules);
            return;
        }
        let mut at = 0;
        while at < self.len
            && let Some(run) = other.next_dirty(at, u64::MAX)
        {
            // What the same granule of ours holds besides is marked already.
            at = run.end.checked_next_multiple_of(self.granularity()).unwrap_or(u64::MAX);
            self.set(run);
        }
    }

    /// The bitmap of the disk when that is `len` bytes long: what lies past the end is forgotten, and what is
    /// new is clean, but for the rest of a dirty granule.
    #[must_use]
    pub fn resized(&self, len: u64) -> Self {
        let granules = ChunkBitmap::new(len.div_ceil(self.granularity()));
        let mut resized = Self { len, shift: self.shift, granules };
        resized.merge(self);
        resized
    }

    /// Bytes that the bitmap owns on the heap.
    pub fn heap_bytes(&self) -> usize {
        self.granules.heap_bytes()
    }

    fn clip(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.len);
        range.start.min(end)..end
    }

    /// The bytes of a granule, clipped to the disk.
    fn granule(&self, index: u64) -> Range<u64> {
        let start = index.saturating_mul(self.granularity()).min(self.len);
        start..start.saturating_add(self.granularity()).min(self.len)
    }

    /// The granules that a clipped range touches.
    fn outward(&self, range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        range.start >> self.shift..range.end.div_ceil(self.granularity())
    }

    /// The granules that lie wholly in a clipped range.
    fn inward(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end == self.len { self.granules() } else { range.end >> self.shift };
        range.start.div_ceil(self.granularity()).min(end)..end
    }

    /// The bytes of so many granules, one of which may be the last of the disk.
    fn bytes_of(&self, granules: u64, with_last: bool) -> u64 {
        if with_last {
            let last = self.granule(self.granules() - 1);
            ((granules - 1) << self.shift) + (last.end - last.start)
        } else {
            granules << self.shift
        }
    }

    fn last_is_dirty(&self) -> bool {
        self.granules().checked_sub(1).is_some_and(|last| self.granules.get(last))
    }

    fn cut(&self, start: u64, end: u64, reach: u64) -> Option<Range<u64>> {
        if start >= end || reach == start {
            return None;
        }
        if reach >= end {
            return Some(start..end);
        }
        let border = reach & !(self.granularity() - 1);
        Some(start..if border > start { border } else { reach })
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("len", &self.len)
            .field("granularity", &self.granularity())
            .field("dirty_bytes", &self.dirty_bytes())
            .finish()
    }
}

/// A walk over the dirty runs of a bitmap that may change between steps.
///
/// Each step looks at the bitmap as it is then: what was cleared after the walk began is not returned, what
/// was set behind it is missed.
#[derive(Clone, Debug)]
pub struct Cursor {
    at: u64,
}

impl Cursor {
    /// A walk that begins at byte `from`.
    pub fn new(from: u64) -> Self {
        Self { at: from }
    }

    /// Where the next step begins to look.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next run of at most `max` bytes, as [`DirtyBitmap::next_dirty`] cuts it.
    pub fn next_run(&mut self, bitmap: &DirtyBitmap, max: u64) -> Option<Range<u64>> {
        let run = bitmap.next_dirty(self.at, max)?;
        self.at = run.end;
        Some(run)
    }
}
