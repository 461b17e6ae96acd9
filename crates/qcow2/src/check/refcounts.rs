//! Counts the refcount table and its blocks.

use super::disk::{Block, RESERVED};
use super::{Checker, Finding, Structure};
use crate::error::Result;

impl Checker<'_> {
    /// Counts the refcount table and blocks, and sees whether they can be used as they are.
    pub(super) fn count_refcounts(&mut self) -> Result<()> {
        let size = self.cluster_size();
        let (offset, clusters) = (self.header.refcount_table_offset, self.header.refcount_table_clusters);
        let len = u64::from(clusters) * size;
        let is_counted = self.count_range(Structure::RefcountTable, offset, len, 1, 0);
        if is_counted && offset + len > self.file_len {
            self.find(&Finding::PastEnd { structure: Structure::RefcountTable, offset, len }, 1);
        }
        self.refcounts_damaged |= !is_counted || offset + len > self.file_len;
        for index in 0..self.disk.table.len() {
            let entry = self.disk.table[index];
            if entry == 0 {
                continue;
            }
            self.total += size;
            let (table, at) = (Structure::RefcountTable, offset + index as u64 * 8);
            let problem = if entry & RESERVED != 0 {
                Some(Finding::ReservedBits { table, at, entry })
            } else if !entry.is_multiple_of(size) {
                let structure = Structure::RefcountBlock;
                Some(Finding::Misaligned { structure, at, offset: entry })
            } else if entry >> self.format.cluster.bits() >= self.file_clusters() {
                let structure = Structure::RefcountBlock;
                Some(Finding::PastEnd { structure, offset: entry, len: size })
            } else {
                None
            };
            if let Some(problem) = problem {
                self.refcounts_damaged = true;
                self.find(&problem, 1);
                continue;
            }
            self.count_range(Structure::RefcountBlock, entry, size, 1, 0);
            let references = self.counts.get(entry >> self.format.cluster.bits());
            if references != 1 {
                self.refcounts_damaged = true;
                let index = index as u64;
                self.find(&Finding::SharedRefcountBlock { index, offset: entry, references }, 1);
            }
        }
        // A table that something else lies in is not written where it is.
        let bits = self.format.cluster.bits();
        self.refcounts_damaged |= (offset >> bits..(offset + len) >> bits).any(|at| self.counts.get(at) != 1);
        Ok(())
    }

    /// Whether a refcount block lies in each place where a cluster is in use.
    pub(crate) fn has_all_blocks(&self) -> bool {
        let per_block = self.disk.per_block();
        let is_missing = |index| !matches!(self.disk.block(index), Block::At(_));
        let counted = self.counts.end().div_ceil(per_block);
        !(0..counted)
            .any(|index| is_missing(index) && self.counts.any(index * per_block, (index + 1) * per_block))
    }
}
