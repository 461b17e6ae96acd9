//! The blocks of a disk in order: runs of blocks that are known to be zero, and blocks to be read.
//!
//! Called by both hashes. Extents come in batches, within the budget of a query, so that memory and the time
//! between two calls are bounded whatever an image says.

use std::collections::VecDeque;

use blockmirror_block::{BlockDevice, ByteRange, Error, ExtentKind, QueryBudget, Visit};

/// Bytes of a block of [`DiskHash`](crate::DiskHash).
pub const BLOCK: u64 = 1 << 20;
/// Blocks of zeros in one run: what a disk of the greatest length says of itself in one extent takes long to
/// hash, and a caller wants to hear of it meanwhile.
const MOST_ZERO_BLOCKS: u64 = 1 << 16;
/// Extents fetched at once.
const BATCH: usize = 4096;

/// The blocks of a disk of `len` bytes, the last of which may be shorter.
pub(crate) fn blocks_of(len: u64) -> u64 {
    len.div_ceil(BLOCK)
}

/// What comes next of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// Whole blocks, of which the last one of the disk may be shorter, that read as zeros.
    Zero(ByteRange),
    /// One block, to be read.
    Block(ByteRange),
}

/// A position in a disk.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    device: &'a dyn BlockDevice,
    /// A multiple of [`BLOCK`], or the end.
    at: u64,
    end: u64,
    /// Extents from `at` on, and whether they are zeros.
    fetched: VecDeque<(ByteRange, bool)>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(device: &'a dyn BlockDevice) -> Self {
        Self { device, at: 0, end: device.len(), fetched: VecDeque::new() }
    }

    /// The next run, `None` at the end of the disk. A run of zeros may be followed by another one.
    pub(crate) fn next(&mut self) -> Result<Option<Run>, Error> {
        if self.at == self.end {
            return Ok(None);
        }
        let zero = self.zero_end()?;
        let blocks = if zero == self.end { zero } else { zero - zero % BLOCK };
        let run = if blocks > self.at {
            Run::Zero(ByteRange::new(self.at, blocks.min(self.at.saturating_add(MOST_ZERO_BLOCKS * BLOCK))))
        } else {
            Run::Block(ByteRange::new(self.at, self.end.min(self.at + BLOCK)))
        };
        self.at = match run {
            Run::Zero(range) | Run::Block(range) => range.end(),
        };
        Ok(Some(run))
    }

    /// Up to where the disk is known to be zero from `at` on, looking at no more than one block and one
    /// batch.
    fn zero_end(&mut self) -> Result<u64, Error> {
        let mut zero = self.at;
        loop {
            while self.fetched.front().is_some_and(|(range, _)| range.end() <= zero) {
                self.fetched.pop_front();
            }
            match self.fetched.front() {
                Some((range, true)) => zero = range.end(),
                Some((_, false)) => return Ok(zero),
                // Enough for whole blocks: the next call goes on from there.
                None if zero == self.end || zero >= self.at + BLOCK => return Ok(zero),
                None => self.fetch(zero)?,
            }
        }
    }

    fn fetch(&mut self, from: u64) -> Result<(), Error> {
        let (fetched, mut budget) = (&mut self.fetched, QueryBudget::new());
        self.device.extents(ByteRange::new(from, self.end), &mut |extent| {
            let spent = budget.spend(&extent);
            fetched.push_back((extent.range, extent.kind != ExtentKind::Data));
            if fetched.len() < BATCH { spent } else { Visit::Break(()) }
        })?;
        if fetched.is_empty() {
            // A device that reports nothing has broken its contract; reading tells the truth.
            fetched.push_back((ByteRange::new(from, self.end), false));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::MemoryDisk;

    use super::*;

    /// One extent once was one run, which was hashed as a whole before a caller could stop it.
    #[test]
    fn a_run_of_zeros_has_a_bound() {
        let disk = MemoryDisk::new(1 << 40);
        let (mut walk, mut at) = (Walk::new(&disk), 0);
        while let Some(run) = walk.next().unwrap() {
            let Run::Zero(range) = run else { panic!("{run:?}") };
            assert_eq!(range.start(), at);
            assert!(range.len() <= MOST_ZERO_BLOCKS * BLOCK, "{range:?}");
            at = range.end();
        }
        assert_eq!(at, disk.len());
    }
}
