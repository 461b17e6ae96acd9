//! New refcount blocks: planned under the metadata lock, written without it, then put into the refcount
//! table.
//!
//! A block counts itself from the beginning, so that nothing is left to fail once it is in use; and it is
//! written before the table points at it.

use std::ops::Range;

use blockmirror_block::Result;

use super::Refcounts;
use crate::context::ImageContext;
use crate::format::refcount::RefcountWidth;
use crate::offset::{ClusterRange, HostCluster, HostOffset};
use crate::overlap::MetadataKind;

/// Consecutive refcount blocks that are to be added.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NewBlocks {
    width: RefcountWidth,
    per_block: u64,
    /// Index of the first in the refcount table.
    first_index: u64,
    count: u64,
    /// The clusters that they count with one: the blocks themselves, and then what they are added for.
    used: Range<HostCluster>,
}

impl NewBlocks {
    /// `count` blocks at the start of `used`, where no block counts any cluster yet.
    pub(super) fn new(
        refcounts: &Refcounts,
        ctx: &ImageContext,
        count: u64,
        used: Range<HostCluster>,
    ) -> Self {
        let per_block = refcounts.per_block(ctx);
        Self { width: refcounts.width, per_block, first_index: used.start.0 / per_block, count, used }
    }

    /// Index of each in the refcount table, and its place.
    pub(super) fn entries(&self, ctx: &ImageContext) -> impl Iterator<Item = (usize, HostOffset)> {
        let (first, used, size) = (self.first_index, self.used.start, ctx.cluster());
        // Indexes inside a table of at most 8 MiB.
        (0..self.count).map(move |i| ((first + i) as usize, size.start(used.plus(i))))
    }

    /// The clusters that they are added for.
    pub(super) fn rest(&self) -> Range<HostCluster> {
        self.used.start.plus(self.count)..self.used.end
    }

    /// Writes the blocks. The caller does not hold the metadata lock.
    pub(crate) fn write(&self, ctx: &ImageContext) -> Result<()> {
        for (index, at) in self.entries(ctx) {
            // At most 2 MiB.
            let mut data = vec![0; ctx.cluster().bytes() as usize];
            let first = HostCluster(index as u64 * self.per_block);
            let counted = first.max(self.used.start)..first.plus(self.per_block).min(self.used.end);
            for cluster in counted.each() {
                self.width.set(&mut data, (cluster.0 - first.0) as usize, 1);
            }
            ctx.storage.write_at(&data, at.0)?;
        }
        Ok(())
    }
}

impl Refcounts {
    /// Whether none of the blocks is there, nor anything else in its place.
    pub(crate) fn can_add(&self, new: &NewBlocks) -> bool {
        let counts = |index| self.block(index).is_some();
        !(new.first_index..new.first_index + new.count).any(counts)
            && self.metadata.last_in(new.used.clone()).is_none()
    }

    /// Whether these very blocks are in use.
    pub(super) fn has(&self, ctx: &ImageContext, new: &NewBlocks) -> bool {
        new.entries(ctx).all(|(index, at)| self.block(index as u64) == Some(at))
    }

    /// Blocks whose write has failed and may still reach the disk: their places stay unused, and uncounted.
    pub(crate) fn give_up(&mut self, ctx: &ImageContext, new: &NewBlocks) {
        for (_, at) in new.entries(ctx) {
            let cluster = ctx.cluster().index(at);
            self.leave_unused(cluster..cluster.plus(1));
        }
    }

    /// Puts blocks that have been written into the table.
    pub(crate) fn add(&mut self, ctx: &ImageContext, new: &NewBlocks) {
        for (index, at) in new.entries(ctx) {
            self.table[index] = at.0;
            self.table_dirty.mark(index);
            self.metadata.insert(MetadataKind::RefcountBlock, ctx.cluster().index(at));
        }
    }
}
