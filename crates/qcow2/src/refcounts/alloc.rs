//! Handing out host clusters for guest data and L2 tables, and taking back those that were not used.

use std::ops::Range;

use blockmirror_block::{Error, ErrorKind, Result};

use super::{NewBlocks, Refcounts};
use crate::context::ImageContext;
use crate::limits::MAX_HOST_OFFSET;
use crate::offset::{ClusterRange, HostCluster};

/// What a search for free clusters does under one hold of the metadata lock: refcount slices that it loads,
/// and steps. A step passes one slice or finds one cluster.
const SEARCH_LOADS: u64 = 256;
const SEARCH_STEPS: u32 = 1 << 15;

/// What a disk writes as a whole.
const SECTOR: u64 = 512;

/// Host clusters that were handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Grant {
    /// The first.
    pub(crate) first: HostCluster,
    /// How many, at least one.
    pub(crate) count: u64,
    /// They were never written and the storage reads as zeros.
    pub(crate) fresh: bool,
}

/// The answer to a request for clusters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Allocation {
    /// Some or all of what was asked for, contiguous.
    Got(Grant),
    /// The refcount table must grow first to reach this block.
    TableFull(u64),
    /// The refcount block that counts the first free cluster must come first.
    Uncounted(NewBlocks),
    /// The first free cluster is unverified.
    Unverified,
    /// None was found yet; the next call goes on from where this one stopped.
    Searching,
}

/// Bounds a search for free clusters.
pub(super) struct SearchBudget {
    loads: u64,
    steps: u32,
}

impl SearchBudget {
    pub(super) fn new(refcounts: &Refcounts) -> Self {
        Self { loads: refcounts.loads + SEARCH_LOADS, steps: SEARCH_STEPS }
    }

    /// Takes `steps`; false if nothing is left. The last ones may be more than are left.
    pub(super) fn spend(&mut self, refcounts: &Refcounts, steps: u32) -> bool {
        if self.steps == 0 || refcounts.loads >= self.loads {
            return false;
        }
        self.steps = self.steps.saturating_sub(steps);
        true
    }
}

impl Grant {
    /// The clusters.
    pub(crate) fn clusters(&self) -> Range<HostCluster> {
        self.first..self.first.plus(self.count)
    }
}

impl Refcounts {
    /// How many clusters from `at` on are in use, as far as the refcount slice that counts `at` tells.
    pub(super) fn used_from(&mut self, ctx: &ImageContext, at: HostCluster) -> Result<u64> {
        let Some((slice, index)) = self.locate(ctx, at) else { return Ok(0) };
        self.load(ctx, slice)?;
        let Some(data) = self.blocks.get(slice) else { return Ok(0) };
        let width = self.width;
        // A slice is at most 4096 bytes.
        let entries = width.entries(data.len() as u64) as usize;
        Ok((index..entries).take_while(|i| width.get(data, *i) > 0).count() as u64)
    }

    fn is_free(&mut self, ctx: &ImageContext, cluster: HostCluster) -> Result<bool> {
        Ok(self.get(ctx, cluster)? == 0
            && !self.metadata.contains(cluster)
            && !self.unverified.get(cluster.0))
    }

    /// Hands out up to `want` contiguous clusters, passing over unverified ones if `skip`.
    pub(crate) fn allocate(&mut self, ctx: &ImageContext, want: u64, skip: bool) -> Result<Allocation> {
        let skip = skip || self.never_verify;
        if self.met_unverified.is_some() && !skip {
            return Ok(Allocation::Unverified);
        }
        let per_block = self.per_block(ctx);
        let mut at = self.next_free;
        let mut budget = SearchBudget::new(self);
        loop {
            if !budget.spend(self, 1) {
                return Ok(Allocation::Searching);
            }
            let block = at.0 / per_block;
            // usize to u64 is exact here.
            if block >= self.table.len() as u64 {
                return Ok(Allocation::TableFull(block));
            }
            let counted = self.block(block).is_some();
            let used = if counted { self.used_from(ctx, at)? } else { 0 };
            if used > 0 {
                at = at.plus(used);
            } else if self.metadata.contains(at) {
                at = self.metadata.next_absent(at);
            } else if self.unverified.get(at.0) {
                self.met_unverified = Some(self.met_unverified.map_or(at, |met| met.min(at)));
                if !skip {
                    return Ok(Allocation::Unverified);
                }
                at = self.next_verified(at);
            } else if counted {
                break;
            } else {
                self.check_room(ctx, at.plus(1))?;
                self.use_up(ctx, at..at.plus(1));
                return Ok(Allocation::Uncounted(NewBlocks::new(self, ctx, 1, at..at.plus(1))));
            }
            self.next_free = at;
        }
        let end = HostCluster((at.0 / per_block + 1) * per_block);
        let mut count = 1;
        while count < want && at.plus(count) < end && self.is_free(ctx, at.plus(count))? {
            count += 1;
        }
        let found = at..at.plus(count);
        self.check_room(ctx, found.end)?;
        for cluster in found.each() {
            self.set(ctx, cluster, 1)?;
        }
        self.next_free = found.end;
        Ok(Allocation::Got(Grant { first: at, count, fresh: self.use_up(ctx, found) }))
    }

    /// The first cluster from `at` on that is not unverified.
    pub(super) fn next_verified(&self, at: HostCluster) -> HostCluster {
        let next = self.unverified.next_clear(at.0);
        HostCluster(next.unwrap_or_else(|| at.0.max(self.unverified.len())))
    }

    /// Whether there is an unverified cluster from `first` on.
    pub(crate) fn has_unverified(&self, first: HostCluster) -> bool {
        self.unverified.next_set(first.0).is_some()
    }

    /// No entry maps a free cluster: each may be handed out.
    pub(crate) fn all_verified(&mut self) {
        self.unverified.clear_all();
        if let Some(met) = self.met_unverified.take() {
            self.next_free = self.next_free.min(met);
        }
    }

    /// It cannot be found out which free clusters are mapped.
    pub(crate) fn never_verify(&mut self) {
        self.never_verify = true;
    }

    /// Whether `clusters` were never written before; from now on they count as written.
    pub(super) fn use_up(&mut self, ctx: &ImageContext, clusters: Range<HostCluster>) -> bool {
        self.handed_out = self.handed_out.max(clusters.end);
        let Some(never_written) = &mut self.never_written else { return false };
        let fresh = ctx.cluster().start(clusters.start) >= *never_written;
        *never_written = (*never_written).max(ctx.cluster().start(clusters.end));
        fresh
    }

    /// How long the file must be, so that no cluster that was handed out looks as if it had been cut off: the
    /// last cluster, or subcluster, must begin before the end.
    pub(crate) fn file_end(&self, ctx: &ImageContext) -> u64 {
        let end = ctx.cluster().start(self.handed_out).0;
        end.saturating_sub(if ctx.format.extended { 0 } else { ctx.cluster().bytes() - SECTOR })
    }

    /// Fails if the storage or the format has no room for host clusters below `end`.
    pub(super) fn check_room(&self, ctx: &ImageContext, end: HostCluster) -> Result<()> {
        let limit = if ctx.storage.info().fixed_len { ctx.storage.len()? } else { MAX_HOST_OFFSET };
        let bytes = end.0.checked_mul(ctx.cluster().bytes());
        if bytes.is_none_or(|bytes| bytes > limit) {
            return Err(Error::new(ErrorKind::NoSpace, "allocate cluster")
                .in_file(ctx.name.clone())
                .because(format!("the image cannot grow past {limit} bytes")));
        }
        Ok(())
    }

    /// Releases clusters that nothing ever pointed at.
    pub(crate) fn release(&mut self, ctx: &ImageContext, clusters: Range<HostCluster>) -> Result<()> {
        self.next_free = self.next_free.min(clusters.start);
        for cluster in clusters.each() {
            self.set(ctx, cluster, 0)?;
        }
        Ok(())
    }

    /// Releases clusters that nothing ever pointed at, and whose write has failed and may still reach the
    /// disk: they are uncounted, and not handed out while the image is open.
    pub(crate) fn release_unusable(
        &mut self,
        ctx: &ImageContext,
        clusters: Range<HostCluster>,
    ) -> Result<()> {
        self.leave_unused(clusters.clone());
        self.release(ctx, clusters)
    }

    /// `clusters`, which nothing points at, are not handed out while the image is open: a change of their
    /// bytes that has failed may still reach the disk.
    pub(crate) fn leave_unused(&mut self, clusters: Range<HostCluster>) {
        for cluster in clusters.each() {
            self.metadata.leave_unused(cluster);
        }
    }
}
