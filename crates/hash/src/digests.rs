//! The digests of all blocks of a disk: what tells which blocks differ, where a [`DiskHash`] only tells that
//! some do; and their record, which is made while a disk is read in any order.
//!
//! Memory: 33 bytes for each MiB, in pages of 256 blocks; a page is there as soon as one of its blocks is not
//! zero, or is recorded.

use std::collections::BTreeMap;
use std::ops::Range;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange, Error, Visit};

use crate::disk::length_hasher;
use crate::parallel::{BlockDigest, Sink, ZERO_DIGEST, block_digest, hash_blocks};
use crate::walk::{BLOCK, blocks_of};
use crate::{DiskHash, HashOptions};

/// Blocks of a page.
const PAGE: u64 = 256;

/// Digests by the number of their block.
#[derive(Debug, Default)]
struct Pages(BTreeMap<u64, Box<[Option<BlockDigest>; PAGE as usize]>>);

impl Pages {
    fn get(&self, block: u64) -> Option<BlockDigest> {
        self.0.get(&(block / PAGE)).and_then(|page| page[(block % PAGE) as usize])
    }

    fn set(&mut self, block: u64, digest: BlockDigest) {
        let page = self.0.entry(block / PAGE).or_insert_with(|| Box::new([None; PAGE as usize]));
        page[(block % PAGE) as usize] = Some(digest);
    }

    fn remove(&mut self, block: u64) {
        let number = block / PAGE;
        let Some(page) = self.0.get_mut(&number) else { return };
        page[(block % PAGE) as usize] = None;
        if page.iter().all(Option::is_none) {
            self.0.remove(&number);
        }
    }

    /// Those that there are, in order.
    fn iter(&self) -> impl Iterator<Item = (u64, BlockDigest)> {
        self.0.iter().flat_map(|(page, digests)| {
            let first = page * PAGE;
            digests.iter().zip(first..).filter_map(|(digest, block)| Some((block, (*digest)?)))
        })
    }
}

/// The digests of all blocks of a disk.
///
/// ```
/// use blockmirror_block::testing::MemoryDisk;
/// use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags};
/// use blockmirror_hash::{BLOCK, BlockDigests, HashOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (a, b) = (MemoryDisk::new(3 << 20), MemoryDisk::new(3 << 20));
/// b.write_at(&[1; 512], 5 << 19, WriteFlags::NONE)?;
/// let digests = |disk: &MemoryDisk| BlockDigests::of(disk, &HashOptions::new(), &mut |_| Visit::Continue(()));
/// let (a, b) = (digests(&a)?.ok_or("stopped")?, digests(&b)?.ok_or("stopped")?);
/// assert_ne!(a.hash(), b.hash());
/// assert_eq!(a.differing(&b).collect::<Vec<_>>(), [ByteRange::at(2 << 20, BLOCK)]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BlockDigests {
    len: u64,
    /// Those of blocks that are not zero.
    pages: Pages,
}

impl BlockDigests {
    /// Hashes what `device` holds, as [`DiskHash::of`] does.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of(
        device: &dyn BlockDevice,
        options: &HashOptions,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<Self>, Error> {
        Self::made(device, options, &|_| None, progress)
    }

    fn made(
        device: &dyn BlockDevice,
        options: &HashOptions,
        known: &(dyn Fn(u64) -> Option<BlockDigest> + Sync),
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<Self>, Error> {
        let collected = hash_blocks(device, options, known, Collected::default(), progress)?;
        Ok(collected.map(|Collected { pages, .. }| Self { len: device.len(), pages }))
    }

    /// The hash of the disk.
    pub fn hash(&self) -> DiskHash {
        let mut hasher = length_hasher(self.len);
        let mut at = 0;
        for (block, digest) in self.pages.iter() {
            hasher.zeros(block - at);
            hasher.block(digest);
            at = block + 1;
        }
        hasher.zeros(blocks_of(self.len).saturating_sub(at));
        DiskHash::of_hasher(hasher)
    }

    /// The blocks that differ, in order, of two disks of one length.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = ByteRange> + 'a {
        let pages = self.pages.0.keys().chain(other.pages.0.keys());
        let pages: std::collections::BTreeSet<_> = pages.copied().collect();
        let whole = ByteRange::new(0, self.len.max(other.len));
        let blocks = pages.into_iter().flat_map(|page| page * PAGE..(page + 1) * PAGE);
        blocks
            .filter(|block| self.pages.get(*block) != other.pages.get(*block))
            .map(move |block| ByteRange::at(block * BLOCK, BLOCK).intersect(whole))
    }
}

/// Digests as they come in.
#[derive(Debug, Default)]
struct Collected {
    pages: Pages,
    next: u64,
}

impl Sink for Collected {
    fn zeros(&mut self, count: u64) {
        self.next += count;
    }

    fn block(&mut self, digest: BlockDigest) {
        if digest != ZERO_DIGEST {
            self.pages.set(self.next, digest);
        }
        self.next += 1;
    }
}

/// Records the digests of blocks of a disk that is read in any order, on any threads.
#[derive(Debug, Default)]
pub struct DigestRecorder {
    /// *Guards* the digests so far. *Order*: leaf. *Not under it*: hashing, device calls.
    pages: Mutex<Pages>,
}

impl DigestRecorder {
    /// Nothing is recorded.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records the block at `offset`, which holds `bytes`; whether it had another digest before.
    pub fn record(&self, offset: u64, bytes: &[u8]) -> bool {
        let (block, digest) = (offset / BLOCK, block_digest(bytes));
        let mut pages = self.pages.lock();
        let before = pages.get(block);
        pages.set(block, digest);
        before.is_some_and(|before| before != digest)
    }

    /// The digests of `device`, of which those that are recorded are not made again. Nothing is recorded
    /// afterwards, unless it fails or is stopped. `progress` is as for [`DiskHash::of`].
    ///
    /// # Errors
    /// What the device reports.
    pub fn complete(
        &self,
        device: &dyn BlockDevice,
        options: &HashOptions,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<BlockDigests>, Error> {
        let made = BlockDigests::made(device, options, &|block| self.pages.lock().get(block), progress)?;
        if made.is_some() {
            *self.pages.lock() = Pages::default();
        }
        Ok(made)
    }

    /// The digest of the block with this number, if it is recorded.
    pub fn get(&self, block: u64) -> Option<BlockDigest> {
        self.pages.lock().get(block)
    }

    /// Forgets the blocks with these numbers.
    pub fn forget(&self, blocks: Range<u64>) {
        let mut pages = self.pages.lock();
        blocks.for_each(|block| pages.remove(block));
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.pages.lock().0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_takes_no_memory() {
        let recorder = DigestRecorder::new();
        for block in [3, PAGE - 1, PAGE] {
            assert!(!recorder.record(block * BLOCK, &[1]));
        }
        assert_eq!(recorder.get(3), Some(block_digest(&[1])));
        recorder.forget(0..PAGE);
        assert_eq!((recorder.get(3), recorder.get(PAGE)), (None, Some(block_digest(&[1]))));
        recorder.forget(PAGE..PAGE + 2);
        assert!(recorder.is_empty());
    }
}
