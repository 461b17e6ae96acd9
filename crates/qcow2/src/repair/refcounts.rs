//! Sets refcounts right where they are.
//!
//! Each one becomes the number of references that were counted, so the order in which they reach the disk
//! does not matter: each write brings the image nearer to what its tables say.

use crate::check::{Block, Checker, Mending};
use crate::error::Result;

/// Bytes of a block that are read and written at once.
const PIECE: u64 = 64 << 10;
/// What is written around a change.
const SECTOR: usize = 512;

impl Checker<'_> {
    /// Lowers the refcounts that are too high, unless it is not known what uses the cluster; with `raise`,
    /// raises those that are too low.
    pub(super) fn set_refcounts(&mut self, raise: bool) -> Result<()> {
        let (per_block, clusters) = (self.disk.per_block(), self.file_clusters().max(self.counts.end()));
        for index in 0..clusters.div_ceil(per_block) {
            if let Block::At(offset) = self.disk.block(index) {
                let first = index * per_block;
                self.set_block(offset, first, (first + per_block).min(clusters), raise)?;
            }
        }
        Ok(())
    }

    fn set_block(&mut self, offset: u64, first: u64, last: u64, raise: bool) -> Result<()> {
        let (width, piece) = (self.disk.width(), PIECE.min(self.cluster_size()));
        let per_piece = width.entries(piece);
        // At most PIECE.
        let mut buf = vec![0; piece as usize];
        for (at, start) in (offset..).step_by(piece as usize).zip((first..last).step_by(per_piece as usize)) {
            self.step(piece)?;
            self.storage.read_at(&mut buf, at)?;
            let mut changed = None;
            for (index, cluster) in (start..(start + per_piece).min(last)).enumerate() {
                let (refcount, references) = (width.get(&buf, index), self.counts.refcount(cluster));
                if (references < refcount && self.may_free()) || (references > refcount && raise) {
                    self.mending(&Mending::Refcount { cluster, refcount, references });
                    width.set(&mut buf, index, references);
                    let byte = (index * width.bits() as usize) / 8;
                    let (from, _) = changed.unwrap_or((byte, byte));
                    changed = Some((from, byte));
                }
            }
            if let Some((from, to)) = changed {
                let (from, end) = (from / SECTOR * SECTOR, (to / SECTOR + 1) * SECTOR);
                self.storage.write_at(&buf[from..end], at + from as u64)?;
            }
        }
        Ok(())
    }
}
