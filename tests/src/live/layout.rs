//! Which part of the disk is whose.
//!
//! | part | who writes there |
//! |---|---|
//! | marks | sectors at both ends of the disk that hold the number of a writer's last operations |
//! | stripes | each belongs to one writer, or to none; boundaries at odd bytes, so that neighbours share sectors, units and clusters |
//! | shared | whole sectors, by any writer |

use blockmirror_block::ByteRange;

use super::{MAX_LEN, NO_WRITER, WRITERS, paint};

/// The part at either end that holds marks.
const EDGE: u64 = 64 << 10;
/// Distance of the writers' marks: two share a unit of 4 KiB.
const MARK_STEP: u64 = 1536;
/// The part that all write to.
const SHARED: u64 = 2 << 20;
/// Lengths of stripes in the first and the second part of the disk.
const SMALL: u64 = 5003;
const LARGE: u64 = 150_001;
pub(super) const SECTOR: u64 = 512;

#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) len: u64,
    pub(super) shared: ByteRange,
}

impl Layout {
    /// `len` is a multiple of 512 and long enough for all parts.
    pub(super) fn new(len: u64) -> Self {
        let len = len.clamp(8 << 20, MAX_LEN) / SECTOR * SECTOR;
        Self { len, shared: ByteRange::at(len / 3 / EDGE * EDGE, SHARED) }
    }

    /// One of the two sectors that hold the number of a recent operation of `writer`.
    pub(super) fn mark(&self, writer: usize, second: bool) -> ByteRange {
        let at = writer as u64 * MARK_STEP;
        // The second marks end with the disk.
        let start = if second { self.len - SECTOR - at } else { at };
        ByteRange::at(start, SECTOR)
    }

    /// The stripes of `writer`.
    pub(super) fn stripes(&self, writer: usize) -> Vec<ByteRange> {
        let small = ByteRange::new(EDGE, self.shared.start()).pieces(SMALL);
        let large = ByteRange::new(self.shared.end(), self.len - EDGE).pieces(LARGE);
        let owners = WRITERS + 1;
        small.chain(large).enumerate().filter(|(i, _)| i % owners == writer).map(|(_, range)| range).collect()
    }

    /// What the disk holds at the beginning: words without a writer, and zeros in every other stretch of 600
    /// 000 bytes and at the marks.
    pub(super) fn initial(&self) -> Vec<u8> {
        let mut disk = vec![0; self.len as usize];
        for (i, part) in ByteRange::new(0, self.len).pieces(600_000).enumerate() {
            if i % 2 == 0 {
                paint(&mut disk[part.start() as usize..part.end() as usize], part.start(), NO_WRITER, 0);
            }
        }
        for writer in 0..WRITERS {
            for second in [false, true] {
                let mark = self.mark(writer, second);
                disk[mark.start() as usize..mark.end() as usize].fill(0);
            }
        }
        disk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_parts_overlap() {
        let layout = Layout::new((8 << 20) + 1536);
        let mut parts = vec![layout.shared];
        for writer in 0..WRITERS {
            parts.extend(layout.stripes(writer));
            parts.extend([layout.mark(writer, false), layout.mark(writer, true)]);
        }
        parts.sort_by_key(|part| part.start());
        assert!(parts.windows(2).all(|two| two[0].end() <= two[1].start()));
        assert_eq!(parts.last().map(|last| last.end()), Some(layout.len), "the last sector is written");
    }
}
