//! Runs of zeros in buffers.
//!
//! A copy that must not make a sparse disk dense looks at every byte it has read; this runs at memory
//! bandwidth, and gives up on data at the first byte. Called by the copy engine, `compare`, and formats that
//! detect zero writes.

use std::ops::Range;

/// Bytes looked at between two decisions to go on: enough for the compiler to use full vectors, few enough to
/// stop early.
const STEP: usize = 256;

/// Whether every byte of `buf` is zero. True for an empty buffer.
///
/// Looks at both ends first: a block of data that begins or ends with zeros only is rare.
pub fn is_zero(buf: &[u8]) -> bool {
    if let (Some(first), Some(last)) = (buf.first(), buf.last())
        && (*first != 0 || *last != 0)
    {
        return false;
    }
    let (steps, rest) = buf.as_chunks::<STEP>();
    steps.iter().all(|step| step.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// One run of a buffer: which bytes of it, and whether all of them are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZeroRun {
    /// The bytes, as indexes into the buffer.
    pub range: Range<usize>,
    /// Whether they are zeros.
    pub zero: bool,
}

/// Cuts `buf`, which lies at `offset` of a disk, into maximal runs of zero and of other blocks.
///
/// A block is `unit` bytes (0 is taken as 1) and lies at a multiple of `unit` *of the disk*; the first and
/// the last of the buffer may be partial. A block with a single other byte is data as a whole. The runs cover
/// the buffer, in order, and their kinds alternate.
pub fn runs(buf: &[u8], offset: u64, unit: usize) -> ZeroRuns<'_> {
    let unit = unit.max(1);
    // The remainder is below `unit`, so it fits.
    let into = (offset % unit as u64) as usize;
    ZeroRuns { buf, unit, border: unit - into, at: 0, next: None }
}

/// The iterator that [`runs`] makes.
#[derive(Clone, Debug)]
pub struct ZeroRuns<'a> {
    buf: &'a [u8],
    unit: usize,
    /// Where the next block to look at ends.
    border: usize,
    /// Where the next run begins.
    at: usize,
    /// The kind of the block at `at`, which ended the previous run, if it is known already.
    next: Option<bool>,
}

impl ZeroRuns<'_> {
    /// Looks at the block from `from` to the border, and moves the border on.
    fn block(&mut self, from: usize) -> (usize, bool) {
        let end = self.border.min(self.buf.len());
        self.border = end.saturating_add(self.unit);
        (end, is_zero(&self.buf[from..end]))
    }
}

impl Iterator for ZeroRuns<'_> {
    type Item = ZeroRun;

    fn next(&mut self) -> Option<ZeroRun> {
        let start = self.at;
        if start == self.buf.len() {
            return None;
        }
        let (mut end, zero) = match self.next.take() {
            Some(zero) => (self.border - self.unit, zero),
            None => self.block(start),
        };
        while end < self.buf.len() {
            let (block_end, kind) = self.block(end);
            if kind != zero {
                self.next = Some(kind);
                break;
            }
            end = block_end;
        }
        self.at = end;
        Some(ZeroRun { range: start..end, zero })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [0, 1, 7, 255, 256, 257, 512, 4096, 4099] {
            let mut buf = vec![0; len];
            assert!(is_zero(&buf));
            for i in 0..len {
                buf[i] = 0x80;
                assert!(!is_zero(&buf), "{i} of {len}");
                buf[i] = 0;
            }
        }
    }

    #[test]
    fn blocks_lie_at_multiples_of_the_unit_of_the_disk() {
        let mut buf = vec![0; 20];
        buf[9] = 1;
        // The buffer begins 3 bytes into a block of 8: blocks end at 5, 13 and 20.
        let runs: Vec<_> = runs(&buf, 1003, 8).map(|r| (r.range, r.zero)).collect();
        assert_eq!(runs, [(0..5, true), (5..13, false), (13..20, true)]);
    }

    #[test]
    fn an_empty_buffer_has_no_runs_and_a_unit_of_nothing_is_one_byte() {
        assert_eq!(runs(&[], 7, 4096).next(), None);
        let runs: Vec<_> = runs(&[0, 1], u64::MAX, 0).map(|r| r.zero).collect();
        assert_eq!(runs, [true, false]);
    }

    proptest! {
        #[test]
        fn agrees_with_looking_at_every_block(
            stripes in proptest::collection::vec((any::<bool>(), 0usize..60), 0..30),
            offset in 0u64..1000,
            unit in 1usize..40,
        ) {
            let buf: Vec<u8> = stripes.iter().flat_map(|(zero, n)| vec![u8::from(!zero); *n]).collect();
            let mut naive: Vec<ZeroRun> = Vec::new();
            for i in 0..buf.len() {
                let block = |i: usize| (offset + i as u64) / unit as u64;
                let zero = (0..buf.len()).filter(|j| block(*j) == block(i)).all(|j| buf[j] == 0);
                match naive.last_mut() {
                    Some(run) if run.zero == zero => run.range.end = i + 1,
                    _ => naive.push(ZeroRun { range: i..i + 1, zero }),
                }
            }
            prop_assert_eq!(runs(&buf, offset, unit).collect::<Vec<_>>(), naive);
        }
    }
}
