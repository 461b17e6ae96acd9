//! Refcounts and the allocation of host clusters. Lives in [`Meta`](crate::meta::Meta), under its lock; of
//! the storage it only reads slices.
//!
//! Rules that hold at every instant:
//!
//! - A cluster is handed out only if its refcount is zero, no metadata is known to lie there and it is not
//!   unverified ([`crate::verify`]); its refcount is one in memory before the caller learns of it.
//! - A dropped reference does not lower the refcount at once: it waits in *pending* until the entry that
//!   held it is durably gone ([`crate::writeback`] calls [`Refcounts::unref`] then). From that
//!   moment the cluster may be reused: the new user's refcount, one again, reaches the disk before any entry
//!   that points there.
//! - Block, then table: a refcount table entry is written only after the block it points at is durable.

mod alloc;
mod contiguous;
mod grow;
mod missing;
mod new_blocks;
mod packing;

use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::{ByteRange, Result, StorageEvent};

pub(crate) use alloc::{Allocation, Grant};
pub(crate) use contiguous::RunSearch;
pub(crate) use missing::Missing;
pub(crate) use new_blocks::NewBlocks;

use crate::cache::SliceCache;
use crate::cluster_set::ClusterSet;
use crate::context::ImageContext;
use crate::dirty::DirtySectors;
use crate::format::refcount::RefcountWidth;
use crate::holes::HoleCursor;
use crate::limits::MAX_HOST_OFFSET;
use crate::offset::{ClusterRange, HostCluster, HostOffset};
use crate::overlap::{MetadataKind, MetadataMap};
use crate::stop::StopCheck;

const TABLE_OFFSET_MASK: u64 = !511;

/// References waiting to be dropped before a write-back is asked for, in runs.
const PENDING_RUNS: usize = 1 << 15;

/// The refcount structures of a writable image.
#[derive(Debug)]
pub(crate) struct Refcounts {
    width: RefcountWidth,
    table: Vec<u64>,
    table_at: HostOffset,
    pub(crate) table_dirty: DirtySectors,
    pub(crate) blocks: SliceCache,
    /// Slices that were read from the storage.
    loads: u64,
    /// No free cluster below this, but for unverified ones.
    next_free: HostCluster,
    /// Clusters below the file's length at opening that are not to be handed out if their refcount is zero: a
    /// damaged image may map them all the same ([`crate::verify`]).
    unverified: ChunkBitmap,
    /// The lowest free one that an allocation has met, while there is hope that it becomes usable.
    met_unverified: Option<HostCluster>,
    /// Unverified clusters stay unused.
    never_verify: bool,
    /// From this host offset on the storage was never written.
    never_written: Option<HostOffset>,
    /// Behind the last of the clusters that were handed out since the image was opened.
    handed_out: HostCluster,
    /// Where the next compressed cluster goes ([`packing`]).
    room: Option<packing::Room>,
    /// Dropped references whose entries may still be on disk.
    pending: Vec<Range<HostCluster>>,
    pub(crate) metadata: MetadataMap,
}

impl Refcounts {
    /// From the refcount table as read from disk. `metadata` knows the header and the L1 and L2 tables; this
    /// adds the refcount structures.
    pub(crate) fn new(
        ctx: &ImageContext,
        width: RefcountWidth,
        table_at: HostOffset,
        table: Vec<u64>,
        blocks: SliceCache,
        mut metadata: MetadataMap,
    ) -> Result<Self> {
        // usize to u64 is exact here.
        metadata.claim(ctx, MetadataKind::RefcountTable, table_at, table.len() as u64 * 8)?;
        for (index, entry) in table.iter().enumerate() {
            let block = HostOffset(entry & TABLE_OFFSET_MASK);
            if block.0 != 0 {
                ctx.check_table("read refcount table", block, index as u64)?;
                if block.0 >= MAX_HOST_OFFSET {
                    return Err(ctx.corrupt("read refcount table", block.0, "offset above 2^56"));
                }
                metadata.claim(ctx, MetadataKind::RefcountBlock, block, ctx.cluster().bytes())?;
            }
        }
        let info = ctx.storage.info();
        let len = ctx.storage.len()?;
        let never_written = (info.zero_init && !info.fixed_len).then_some(HostOffset(len));
        // Data in an external file has no refcounts; the tables here are all known.
        let unverified = if ctx.format.external_data { 0 } else { ctx.cluster().count(len) };
        let mut unverified = ChunkBitmap::new(unverified);
        unverified.set_all();
        let table_dirty = DirtySectors::default();
        Ok(Self {
            width,
            table,
            table_at,
            table_dirty,
            blocks,
            loads: 0,
            next_free: HostCluster(0),
            unverified,
            met_unverified: None,
            never_verify: false,
            never_written,
            handed_out: HostCluster(0),
            room: None,
            pending: Vec::new(),
            metadata,
        })
    }

    /// The refcount table as it is to be on disk, and where it lies.
    pub(crate) fn table(&self) -> (&[u64], HostOffset) {
        (&self.table, self.table_at)
    }

    /// Clusters that one refcount block counts.
    fn per_block(&self, ctx: &ImageContext) -> u64 {
        self.width.entries(ctx.cluster().bytes())
    }

    fn block(&self, index: u64) -> Option<HostOffset> {
        let entry = *self.table.get(usize::try_from(index).ok()?)?;
        match entry & TABLE_OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// The slice that counts `cluster`, and the entry's index in it; `None` if there is no block yet.
    fn locate(&self, ctx: &ImageContext, cluster: HostCluster) -> Option<(HostOffset, usize)> {
        let per_block = self.per_block(ctx);
        let block = self.block(cluster.0 / per_block)?;
        let per_slice = self.width.entries(self.blocks.slice_size() as u64);
        let in_block = cluster.0 % per_block;
        let slice = block.plus(in_block / per_slice * self.blocks.slice_size() as u64);
        // BackingLayer the entries of a slice, at most 32768.
        Some((slice, (in_block % per_slice) as usize))
    }

    fn load(&mut self, ctx: &ImageContext, slice: HostOffset) -> Result<()> {
        if self.blocks.get(slice).is_none() {
            ctx.storage.announce(StorageEvent::RefblockLoad);
            let data = ctx.read_slice("read refcount block", slice)?;
            self.blocks.insert(slice, &data);
            self.loads += 1;
        }
        Ok(())
    }

    /// How many slices were read from the storage so far.
    pub(crate) fn loads(&self) -> u64 {
        self.loads
    }

    /// The refcount of `cluster`.
    pub(crate) fn get(&mut self, ctx: &ImageContext, cluster: HostCluster) -> Result<u64> {
        let Some((slice, index)) = self.locate(ctx, cluster) else { return Ok(0) };
        self.load(ctx, slice)?;
        Ok(self.blocks.get(slice).map_or(0, |data| self.width.get(data, index)))
    }

    /// The largest refcount that can be said.
    pub(crate) fn max(&self) -> u64 {
        self.width.max()
    }

    /// Sets the refcount of a cluster that a block counts.
    pub(crate) fn set(&mut self, ctx: &ImageContext, cluster: HostCluster, value: u64) -> Result<()> {
        let Some((slice, index)) = self.locate(ctx, cluster) else {
            return Err(ctx.corrupt(
                "write refcount",
                ctx.cluster().start(cluster).0,
                "the refcount block is missing",
            ));
        };
        self.load(ctx, slice)?;
        if let Some(data) = self.blocks.edit(slice) {
            self.width.set(data, index, value);
        }
        Ok(())
    }

    /// Frees counted clusters that are neither in `used` nor metadata, as many as the cache holds changes of;
    /// the others leak. `used` is all that the image's entries map, so that no free cluster is unverified any
    /// more.
    pub(crate) fn free_unused(
        &mut self,
        ctx: &ImageContext,
        used: &ClusterSet,
        stop: &StopCheck<'_>,
    ) -> Result<()> {
        let per_block = self.per_block(ctx);
        let slice_size = self.blocks.slice_size();
        let per_slice = self.width.entries(slice_size as u64);
        let blocks: Vec<_> = (0..self.table.len() as u64).filter_map(|i| Some((i, self.block(i)?))).collect();
        let mut holes = HoleCursor::default();
        for (index, block) in blocks {
            stop.check()?;
            for slice in 0..per_block / per_slice {
                let at = block.plus(slice * slice_size as u64);
                if self.blocks.wants_write_back()
                    || holes.is_hole(ctx, ByteRange::at(at.0, slice_size as u64))
                {
                    continue;
                }
                let data = match self.blocks.get(at) {
                    Some(data) => data.to_vec().into_boxed_slice(),
                    None => ctx.read_slice("read refcount block", at)?,
                };
                let first = index * per_block + slice * per_slice;
                // A slice is at most 4096 bytes.
                for (entry, cluster) in (0..per_slice as usize).zip((first..).map(HostCluster)) {
                    let is_used = || used.contains(cluster) || self.metadata.contains(cluster);
                    if self.width.get(&data, entry) > 0 && !is_used() {
                        self.set(ctx, cluster, 0)?;
                    }
                }
            }
        }
        self.next_free = HostCluster(0);
        self.all_verified();
        Ok(())
    }

    /// Notes that one reference to each of `clusters` goes away with a change that is not durable yet.
    ///
    /// An entry for guest data that names a cluster of metadata never had a reference to it: that is damage,
    /// and giving such a cluster back would free the image's own tables. Nor had one that names a cluster
    /// with a refcount of zero, which may have another owner by the time the reference would be dropped. If
    /// the refcount cannot be read the cluster leaks, which is harmless.
    pub(crate) fn defer_unref(&mut self, ctx: &ImageContext, clusters: Range<HostCluster>) {
        for cluster in clusters.each() {
            if !self.metadata.contains(cluster) && !self.metadata.is_inactive_l2(cluster) {
                self.defer_unref_one(ctx, cluster);
            }
        }
    }

    /// The same for clusters of a table that the image gives up, and that a snapshot may still have.
    pub(crate) fn defer_unref_table(&mut self, ctx: &ImageContext, clusters: Range<HostCluster>) {
        clusters.each().for_each(|cluster| self.defer_unref_one(ctx, cluster));
    }

    fn defer_unref_one(&mut self, ctx: &ImageContext, cluster: HostCluster) {
        if !self.get(ctx, cluster).is_ok_and(|count| count > 0) {
            return;
        }
        match self.pending.last_mut() {
            Some(last) if last.end == cluster => last.end = cluster.plus(1),
            _ => self.pending.push(cluster..cluster.plus(1)),
        }
    }

    /// Whether so many references wait that a write-back should come first.
    pub(crate) fn wants_write_back(&self) -> bool {
        self.pending.len() > PENDING_RUNS || self.blocks.wants_write_back()
    }

    /// The references dropped so far; they stay the caller's until [`Self::unref`] or
    /// [`Self::put_back`].
    pub(crate) fn take_pending_unrefs(&mut self) -> Vec<Range<HostCluster>> {
        std::mem::take(&mut self.pending)
    }

    /// The references were not dropped after all.
    pub(crate) fn put_back(&mut self, pending: Vec<Range<HostCluster>>) {
        self.pending.extend(pending);
    }

    /// The clusters among `clusters` that will be free once the references are dropped, in order. Several
    /// compressed clusters may each drop one to the same host cluster.
    pub(crate) fn last_references(
        &mut self,
        ctx: &ImageContext,
        clusters: &[Range<HostCluster>],
    ) -> Result<Vec<Range<HostCluster>>> {
        let mut borders: Vec<(HostCluster, bool)> = clusters
            .iter()
            .filter(|r| !r.is_empty())
            .flat_map(|r| [(r.start, true), (r.end, false)])
            .collect();
        borders.sort_unstable();
        let mut out: Vec<Range<HostCluster>> = Vec::new();
        // How many references to each cluster from `at` on are dropped.
        let (mut at, mut drops) = (HostCluster(0), 0);
        for (border, starts) in borders {
            // Before the first range nothing is dropped: no need to look there.
            let between = if drops > 0 { at..border } else { border..border };
            for cluster in between.each() {
                if self.get(ctx, cluster)? == drops && !self.metadata.contains(cluster) {
                    self.close_room(ctx, cluster);
                    match out.last_mut() {
                        Some(last) if last.end == cluster => last.end = cluster.plus(1),
                        _ => out.push(cluster..cluster.plus(1)),
                    }
                }
            }
            at = border;
            // Where one range ends and another begins, the end comes first.
            if starts { drops += 1 } else { drops -= 1 }
        }
        Ok(out)
    }

    /// Drops one reference to each of `clusters`, whose holders are durably gone.
    ///
    /// One that has become metadata since is left alone: two entries named it although its refcount was one,
    /// and the other's reference was dropped first.
    pub(crate) fn unref(&mut self, ctx: &ImageContext, clusters: &[Range<HostCluster>]) -> Result<()> {
        for cluster in clusters.iter().flat_map(ClusterRange::each) {
            if self.metadata.contains(cluster) {
                continue;
            }
            let count = self.get(ctx, cluster)?;
            // A cluster that was referenced with a refcount of zero is an older damage, which this does not
            // worsen.
            if count > 0 {
                self.set(ctx, cluster, count - 1)?;
            }
            if count == 1 {
                self.close_room(ctx, cluster);
                self.unverified.clear(cluster.0..cluster.0 + 1);
                self.next_free = self.next_free.min(cluster);
            }
        }
        Ok(())
    }
}
