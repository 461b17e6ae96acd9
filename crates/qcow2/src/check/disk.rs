//! The refcounts that an image has on disk, readable however damaged their tables are.

use blockmirror_block::{Result, Storage};

use crate::format::refcount::RefcountWidth;

/// Bytes of a block that are kept at once.
const SLICE: u64 = 4096;
/// Slices that are kept, each in a place of its own.
const SLICES: usize = 512;

/// Why a refcount cannot be read.
pub(super) const MISALIGNED: &str = "its refcount block is not aligned to clusters";
pub(super) const NOWHERE: &str = "its refcount block lies past 2^63";

/// Bits of an entry of the refcount table that must be zero.
pub(super) const RESERVED: u64 = 511;

/// Where the refcounts of a range of clusters lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Nowhere: all are zero.
    None,
    /// In a block at this offset, perhaps past the end of the file, where all are zero.
    At(u64),
    /// They cannot be read.
    Bad(&'static str),
}

/// The refcount table, and a few slices of the blocks.
#[derive(Debug)]
pub(crate) struct DiskCounts {
    pub(crate) table: Vec<u64>,
    width: RefcountWidth,
    cluster_size: u64,
    kept: Vec<(u64, Box<[u8]>)>,
    /// Slices that were read so far.
    read: u64,
    /// The refcounts of the clusters below this one were compared.
    compared: u64,
    /// Those that are not what they should be, in order of the clusters.
    wrong: Vec<(u64, u64)>,
}

impl DiskCounts {
    pub(super) fn new(table: Vec<u64>, width: RefcountWidth, cluster_size: u64) -> Self {
        Self { table, width, cluster_size, kept: Vec::new(), read: 0, compared: 0, wrong: Vec::new() }
    }

    pub(crate) fn width(&self) -> RefcountWidth {
        self.width
    }

    /// Clusters that one block counts.
    pub(crate) fn per_block(&self) -> u64 {
        self.width.entries(self.cluster_size)
    }

    /// Where entry `index` of the table says that its block lies.
    pub(crate) fn block(&self, index: u64) -> Block {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        match entry.map_or(0, |entry| entry & !RESERVED) {
            0 => Block::None,
            offset if !offset.is_multiple_of(self.cluster_size) => Block::Bad(MISALIGNED),
            offset if offset > i64::MAX as u64 => Block::Bad(NOWHERE),
            offset => Block::At(offset),
        }
    }

    /// The refcount of `cluster`; `None` if it cannot be read.
    pub(crate) fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<Option<u64>> {
        let per_block = self.per_block();
        let offset = match self.block(cluster / per_block) {
            Block::None => return Ok(Some(0)),
            Block::Bad(_) => return Ok(None),
            Block::At(offset) => offset,
        };
        let slice = SLICE.min(self.cluster_size);
        let per_slice = self.width.entries(slice);
        let in_block = cluster % per_block;
        let at = offset + in_block / per_slice * slice;
        let nth = cluster / per_slice;
        let index = (in_block % per_slice) as usize;
        let width = self.width;
        Ok(Some(width.get(self.slice(storage, nth, at, slice)?, index)))
    }

    /// The comparison has come to `cluster`, whose refcount is not what it should be.
    pub(super) fn found_wrong(&mut self, cluster: u64, refcount: u64) {
        self.wrong.push((cluster, refcount));
    }

    /// The clusters below `end` were compared.
    pub(super) fn compared_to(&mut self, end: u64) {
        self.compared = end;
    }

    /// The refcount of `cluster`, which should be `right`, as the comparison has found it; `None` if it
    /// cannot be read. What was not compared is read, in slices of which `most` are read together at most:
    /// then it counts as zero.
    pub(super) fn get_compared(
        &mut self,
        storage: &dyn Storage,
        cluster: u64,
        right: u64,
        most: u64,
    ) -> Result<Option<u64>> {
        match self.block(cluster / self.per_block()) {
            Block::None => Ok(Some(0)),
            Block::Bad(_) => Ok(None),
            Block::At(_) if cluster < self.compared => {
                let found = self.wrong.binary_search_by_key(&cluster, |(wrong, _)| *wrong);
                Ok(Some(found.map_or(right, |index| self.wrong[index].1)))
            }
            Block::At(_) if self.read < most => self.get(storage, cluster),
            Block::At(_) => Ok(Some(0)),
        }
    }

    /// The slice at `at`, which is the `nth` in order of what it counts: where blocks lie does not decide
    /// which slices take the place of each other.
    fn slice(&mut self, storage: &dyn Storage, nth: u64, at: u64, len: u64) -> Result<&[u8]> {
        if self.kept.is_empty() {
            self.kept = vec![(u64::MAX, Box::default()); SLICES];
        }
        // The remainder is below SLICES.
        let kept = &mut self.kept[(nth % SLICES as u64) as usize];
        if kept.0 != at {
            // At most SLICE bytes.
            let mut data = vec![0; len as usize].into_boxed_slice();
            storage.read_at(&mut data, at)?;
            self.read += 1;
            *kept = (at, data);
        }
        Ok(&kept.1)
    }
}
