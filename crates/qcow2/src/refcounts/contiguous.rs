//! Clusters one behind the other, for a table that must not be cut: the L1 table, when it grows.
//!
//! With small clusters such a run may be longer than what one refcount block counts, while the allocator for
//! guest data puts each new block at the beginning of what it counts. Where no free run is found, the blocks
//! for one come first here, and the run behind them, all beyond what was counted so far.

use std::ops::Range;

use blockmirror_block::Result;

use super::alloc::SearchBudget;
use super::{Missing, NewBlocks, Refcounts};
use crate::context::ImageContext;
use crate::offset::{ClusterRange, HostCluster};

/// How far a search for a free run has come. Between its calls nothing else allocates.
#[derive(Debug, Default)]
pub(crate) struct RunSearch {
    /// Clusters `start..at` are free.
    start: HostCluster,
    at: HostCluster,
    /// Refcount blocks before this one were looked at, past the end of what is counted.
    block: u64,
    /// The blocks that were asked for, with the run behind them.
    added: Option<NewBlocks>,
}

impl Refcounts {
    /// Hands out `want` contiguous clusters, at least one; their refcounts are one in memory. The inner error
    /// says what must come first; the next call with the same `search` goes on from there.
    pub(crate) fn allocate_run(
        &mut self,
        ctx: &ImageContext,
        want: u64,
        search: &mut RunSearch,
    ) -> Result<Result<Range<HostCluster>, Missing>> {
        let per_block = self.per_block(ctx);
        let mut budget = SearchBudget::new(self);
        if let Some(new) = search.added.take()
            && self.has(ctx, &new)
        {
            return Ok(Ok(new.rest()));
        }
        if search.start < self.next_free {
            (search.start, search.at) = (self.next_free, self.next_free);
        }
        while (search.start..search.at).len() < want {
            if !budget.spend(self, 1) {
                return Ok(Err(Missing::Search));
            }
            let at = search.at;
            if self.block(at.0 / per_block).is_none() {
                search.block = search.block.max(at.0 / per_block);
                return self.allocate_run_beyond(ctx, want, search, budget);
            }
            let used = self.used_from(ctx, at)?;
            if used == 0 && !self.metadata.contains(at) && !self.unverified.get(at.0) {
                search.at = at.plus(1);
                continue;
            }
            search.at = match used {
                0 if self.metadata.contains(at) => self.metadata.next_absent(at),
                0 => self.next_verified(at),
                used => at.plus(used),
            };
            search.start = search.at;
        }
        let run = search.start..search.at;
        self.check_room(ctx, run.end)?;
        for cluster in run.each() {
            self.set(ctx, cluster, 1)?;
        }
        self.use_up(ctx, run.clone());
        Ok(Ok(run))
    }

    /// The same from block `search.block` on, where nothing is counted yet.
    fn allocate_run_beyond(
        &mut self,
        ctx: &ImageContext,
        want: u64,
        search: &mut RunSearch,
        mut budget: SearchBudget,
    ) -> Result<Result<Range<HostCluster>, Missing>> {
        let per_block = self.per_block(ctx);
        // So many blocks count themselves and the run.
        let blocks = (1..).find(|b| b * per_block >= b + want).unwrap_or(1);
        // usize to u64 is exact here.
        let len = self.table.len() as u64;
        if self.has_unverified(HostCluster(search.block * per_block)) {
            search.block = search.block.max(self.unverified.len().div_ceil(per_block));
        }
        loop {
            let first_block = search.block;
            if first_block + blocks > len {
                return Ok(Err(Missing::RefcountTable(first_block + blocks - 1)));
            }
            // At most 2^16 clusters, 64 of them in a word of the map.
            if !budget.spend(self, (blocks + want / 64) as u32) {
                return Ok(Err(Missing::Search));
            }
            let first = HostCluster(first_block * per_block);
            let taken = (first_block..first_block + blocks).rfind(|b| self.block(*b).is_some());
            let metadata = self.metadata.last_in(first..first.plus(blocks + want));
            match taken.max(metadata.map(|cluster| cluster.0 / per_block)) {
                Some(block) => search.block = block + 1,
                None => break,
            }
        }
        let first = HostCluster(search.block * per_block);
        let used = first..first.plus(blocks + want);
        self.check_room(ctx, used.end)?;
        self.use_up(ctx, used.clone());
        let new = NewBlocks::new(self, ctx, blocks, used);
        search.added = Some(new.clone());
        Ok(Err(Missing::RefcountBlocks(new)))
    }
}
