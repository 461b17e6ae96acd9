//! Holds the refcounts on disk against the references that were counted.

use blockmirror_block::zero::is_zero;

use super::counts::{COPIED, NOT_COPIED, PAGE};
use super::disk::Block;
use super::{Checker, Finding};
use crate::error::Result;

/// Bytes of a refcount block that are read at once.
const PIECE: u64 = 64 << 10;

impl Checker<'_> {
    /// Compares every cluster of the file.
    pub(super) fn compare(&mut self) -> Result<()> {
        let clusters = self.file_clusters().max(self.counts.end());
        let per_block = self.disk.per_block();
        let mut end = 1;
        for index in 0..clusters.div_ceil(per_block) {
            let (first, last) = (index * per_block, ((index + 1) * per_block).min(clusters));
            match self.disk.block(index) {
                Block::None => self.compare_zero(first, last, &mut end),
                Block::At(offset) => self.compare_block(offset, first, last, &mut end)?,
                Block::Bad(why) => {
                    self.refcounts_damaged = true;
                    let finding = Finding::RefcountUnreadable { first, last: last - 1, why };
                    self.find(&finding, last - first);
                }
            }
        }
        self.disk.compared_to(clusters);
        self.report.image_end_offset = end * self.cluster_size();
        Ok(())
    }

    /// Compares the clusters `first..last`, which the block at `offset` counts.
    fn compare_block(&mut self, offset: u64, first: u64, last: u64, end: &mut u64) -> Result<()> {
        let width = self.disk.width();
        let piece = PIECE.min(self.cluster_size());
        let per_piece = width.entries(piece);
        // At most PIECE.
        let mut buf = vec![0; piece as usize];
        for (at, start) in (offset..).step_by(piece as usize).zip((first..last).step_by(per_piece as usize)) {
            self.step(piece)?;
            self.storage.read_at(&mut buf, at)?;
            let stop = (start + per_piece).min(last);
            if is_zero(&buf) {
                self.compare_zero(start, stop, end);
                continue;
            }
            for (index, cluster) in (start..stop).enumerate() {
                self.compare_cluster(cluster, width.get(&buf, index), end);
            }
        }
        Ok(())
    }

    /// Compares the clusters `first..last`, whose refcounts are all zero.
    fn compare_zero(&mut self, first: u64, last: u64, end: &mut u64) {
        let mut cluster = first;
        while cluster < last {
            let page_end = ((cluster / PAGE + 1) * PAGE).min(last);
            if self.counts.has_page(cluster) {
                (cluster..page_end).for_each(|cluster| self.compare_cluster(cluster, 0, end));
            }
            cluster = page_end;
        }
    }

    /// Compares one cluster; `end` becomes the end of those in use.
    fn compare_cluster(&mut self, cluster: u64, refcount: u64, end: &mut u64) {
        let (references, flags) = self.counts.refcount_flagged(cluster);
        if references == 0 && refcount == 0 {
            return;
        }
        *end = cluster + 1;
        if references != refcount {
            self.disk.found_wrong(cluster, refcount);
        }
        if references > refcount {
            self.used_as_free |= refcount == 0;
            self.find(&Finding::RefcountTooLow { cluster, refcount, references }, 1);
        } else if references < refcount {
            self.find(&Finding::Leak { cluster, refcount, references }, 1);
        }
        self.copied_in_doubt |= flags & if refcount == 1 { NOT_COPIED } else { COPIED } != 0;
    }
}
