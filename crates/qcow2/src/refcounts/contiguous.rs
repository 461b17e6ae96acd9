//! Clusters one behind the other, for a table that must not be cut: the L1 table, when it grows.
//!
//! With small clusters such a run may be longer than what one refcount block counts, while the allocator for
//! guest data puts each new block at the beginning of what it counts. Where no free run is found, the blocks
//! for one come first here, and the run behind them, all beyond what was counted so far.

use blockmirror_block::Result;

use super::Refcounts;
use crate::io::Io;

impl Refcounts {
    /// Hands out `want` contiguous clusters, at least one; their refcounts are one in memory. The inner error
    /// is the refcount block that the refcount table must first reach.
    pub(crate) fn allocate_run(&mut self, io: &Io, want: u64) -> Result<Result<u64, u64>> {
        let per_block = self.per_block(io);
        let (mut start, mut at) = (self.next_free, self.next_free);
        while at - start < want {
            if self.block(at / per_block).is_none() {
                return self.allocate_run_beyond(io, at / per_block, want);
            }
            let used = self.used_from(io, at)?;
            if used == 0 && self.unverified.get(at) {
                at = self.next_verified(at);
                start = at;
            } else if used == 0 && !self.metadata.contains(at) {
                at += 1;
            } else {
                at += used.max(1);
                start = at;
            }
        }
        self.check_room(io, start + want)?;
        for cluster in start..start + want {
            self.set(io, cluster, 1)?;
        }
        self.use_up(io, start, start + want);
        Ok(Ok(start))
    }

    /// The same from block `from` on, where nothing is counted yet.
    fn allocate_run_beyond(&mut self, io: &Io, from: u64, want: u64) -> Result<Result<u64, u64>> {
        let per_block = self.per_block(io);
        // So many blocks count themselves and the run.
        let blocks = (1..).find(|b| b * per_block >= b + want).unwrap_or(1);
        // usize to u64 is exact here.
        let len = self.table.len() as u64;
        let mut first_block = from;
        if self.has_unverified(from * per_block) {
            first_block = first_block.max(self.unverified.len().div_ceil(per_block));
        }
        loop {
            if first_block + blocks > len {
                return Ok(Err(first_block + blocks - 1));
            }
            let first = first_block * per_block;
            let taken = (first_block..first_block + blocks).rfind(|b| self.block(*b).is_some());
            let metadata = (first..first + blocks + want).rfind(|c| self.metadata.contains(*c));
            match taken.max(metadata.map(|c| c / per_block)) {
                Some(block) => first_block = block + 1,
                None => break,
            }
        }
        let first = first_block * per_block;
        let used = blocks + want;
        self.check_room(io, first + used)?;
        self.use_up(io, first, first + used);
        for b in 0..blocks {
            // One cluster, at most 2 MiB.
            let mut data = vec![0; io.cluster().bytes() as usize];
            for i in (0..per_block).take_while(|i| b * per_block + i < used) {
                self.width.set(&mut data, i as usize, 1);
            }
            io.storage.write_at(&data, io.cluster().start(first + b))?;
        }
        for b in 0..blocks {
            // Inside the table, as was seen above.
            let index = (first_block + b) as usize;
            self.table[index] = io.cluster().start(first + b);
            self.table_dirty.mark(index);
            self.metadata.insert(first + b);
        }
        Ok(Ok(first + blocks))
    }
}
