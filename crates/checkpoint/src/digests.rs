//! Digests of marked regions: what tells later whether source and target still hold what was copied.
//!
//! Kept by [`crate::log`] for a log that has them. A record brings the digests of the regions that it marks;
//! the table has those of all areas before. Must hold: before the header of a new area is valid, the table
//! has, durably, the digest of each region that the snapshot marks. The table is written in whole blocks;
//! what a write changes in them are regions that nothing valid marks yet, or whose record is still there.

use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::Storage;

use crate::error::Error;
use crate::header::{BLOCK, DIGEST, Header};

/// What is kept of a region's digest: the first 16 bytes. A comparison has to show that something has
/// changed, and misses it with a probability of 2^-128.
pub type Digest = [u8; DIGEST];

/// Digests in a block.
const IN_BLOCK: u64 = BLOCK / DIGEST as u64;

/// The digests of all regions, 16 MiB at most; zeros for those that have none.
#[derive(Debug)]
pub(crate) struct DigestTable {
    digests: Vec<Digest>,
    /// The blocks of the table in which its storage may lack a digest.
    unwritten: ChunkBitmap,
}

impl DigestTable {
    pub(crate) fn new(header: &Header) -> Self {
        // The number of regions is bounded.
        let regions = header.regions() as usize;
        Self {
            digests: vec![[0; DIGEST]; regions],
            unwritten: ChunkBitmap::new(header.regions().div_ceil(IN_BLOCK)),
        }
    }

    /// Reads the table from `storage`.
    pub(crate) fn read(header: &Header, storage: &dyn Storage) -> Result<Self, Error> {
        let mut table = Self::new(header);
        storage.read_at(table.digests.as_flattened_mut(), header.table_at())?;
        Ok(table)
    }

    pub(crate) fn get(&self, region: u64) -> Option<Digest> {
        self.digests.get(usize::try_from(region).ok()?).copied()
    }

    /// Sets the digest of a region, in memory. Past the last region it does nothing.
    pub(crate) fn set(&mut self, region: u64, digest: Digest) {
        if let Some(own) = usize::try_from(region).ok().and_then(|region| self.digests.get_mut(region)) {
            *own = digest;
            self.unwritten.set(region / IN_BLOCK..region / IN_BLOCK + 1);
        }
    }

    /// Those of the regions in `run`.
    pub(crate) fn of_run(&self, run: Range<u64>) -> &[Digest] {
        self.digests.get(run.start as usize..run.end as usize).unwrap_or_default()
    }

    /// Writes the blocks that the storage may lack, without a flush.
    pub(crate) fn write(&self, header: &Header, storage: &dyn Storage) -> Result<(), Error> {
        let mut at = 0;
        while let Some(run) = self.unwritten.next_run(at) {
            at = run.end;
            let digests = run.start * IN_BLOCK..(run.end * IN_BLOCK).min(self.digests.len() as u64);
            let offset = header.table_at() + run.start * BLOCK;
            storage.write_at(self.of_run(digests).as_flattened(), offset)?;
        }
        Ok(())
    }

    /// A flush has succeeded after all of it was [written](Self::write).
    pub(crate) fn is_durable(&mut self) {
        self.unwritten = ChunkBitmap::new(self.unwritten.len());
    }
}
