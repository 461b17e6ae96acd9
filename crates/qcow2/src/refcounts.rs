//! Refcounts and the allocation of host clusters. Lives in [`Meta`](crate::meta::Meta), under its lock.
//!
//! Rules that hold at every instant:
//!
//! - A cluster is handed out only if its refcount is zero, no metadata is known to lie there and it is not
//!   unverified ([`crate::verify`]); its refcount is one in memory before the caller learns of it.
//! - A reference that is dropped is not given back here and now: it waits in *pending* until the entry that
//!   held it is durably gone ([`crate::writeback`] calls [`Refcounts::unref`] then). From that
//!   moment the cluster may be reused: the new user's refcount, one again, reaches the disk before any entry
//!   that points there.
//! - Block, then table: a refcount table entry is written only after the block it points at is durable.

mod contiguous;

pub(crate) use contiguous::RunSearch;

use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::{ByteRange, Error, ErrorKind, Result};
use byteorder::{BigEndian, ByteOrder};

use crate::cache::SliceCache;
use crate::context::ImageContext;
use crate::dirty::DirtySectors;
use crate::format::refcount::RefcountWidth;
use crate::limits::{MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_BYTES};
use crate::offset::HostOffset;
use crate::overlap::MetadataMap;
use crate::writeback::Failure;

const TABLE_OFFSET_MASK: u64 = !511;

/// Where the header holds the refcount table's offset (8 bytes) and size in clusters (4 bytes).
const HEADER_TABLE_FIELD: u64 = 48;

/// References waiting to be dropped before a write-back is asked for, in runs.
const PENDING_RUNS: usize = 1 << 15;

/// What a search for free clusters does under one hold of the metadata lock: refcount slices that it loads,
/// and steps. A step passes one slice or finds one cluster.
const SEARCH_LOADS: u64 = 256;
const SEARCH_STEPS: u32 = 1 << 15;

/// Host clusters that were handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Grant {
    /// Index of the first.
    pub(crate) first: u64,
    /// How many, at least one.
    pub(crate) count: u64,
    /// It was never written and the storage reads as zeros.
    pub(crate) fresh: bool,
}

/// The answer to a request for clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Allocation {
    /// Some or all of what was asked for, contiguous.
    Got(Grant),
    /// The refcount table must grow first to reach this block, which needs the write-back lock.
    TableFull(u64),
    /// The first free cluster is unverified.
    Unverified,
    /// None was found yet; the next call goes on from where this one stopped.
    Searching,
}

/// Bounds a search for free clusters.
struct SearchBudget {
    loads: u64,
    steps: u32,
}

impl SearchBudget {
    fn new(refcounts: &Refcounts) -> Self {
        Self { loads: refcounts.loads + SEARCH_LOADS, steps: SEARCH_STEPS }
    }

    /// Takes `steps`; false if nothing is left. The last ones may be more than are left.
    fn spend(&mut self, refcounts: &Refcounts, steps: u32) -> bool {
        if self.steps == 0 || refcounts.loads >= self.loads {
            return false;
        }
        self.steps = self.steps.saturating_sub(steps);
        true
    }
}

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
    next_free: u64,
    /// Clusters below the file's length at opening that are not to be handed out if their refcount is zero: a
    /// damaged image may map them all the same ([`crate::verify`]).
    unverified: ChunkBitmap,
    /// The lowest free one that an allocation has met, while there is hope that it becomes usable.
    met_unverified: Option<u64>,
    /// Unverified clusters stay unused.
    never_verify: bool,
    /// From this host offset on the storage was never written.
    never_written: u64,
    /// Dropped references whose entries may still be on disk.
    pending: Vec<Range<u64>>,
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
        metadata.claim(ctx, "the refcount table", ByteRange::at(table_at.0, table.len() as u64 * 8))?;
        for (index, entry) in table.iter().enumerate() {
            let block = HostOffset(entry & TABLE_OFFSET_MASK);
            if block.0 != 0 {
                ctx.check_table("read refcount table", block, index as u64)?;
                if block.0 >= MAX_HOST_OFFSET {
                    return Err(ctx.corrupt("read refcount table", block.0, "offset above 2^56"));
                }
                metadata.claim(ctx, "a refcount block", ByteRange::at(block.0, ctx.cluster().bytes()))?;
            }
        }
        let info = ctx.storage.info();
        let len = ctx.storage.len()?;
        let never_written = if info.zero_init && !info.fixed_len { len } else { u64::MAX };
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
            next_free: 0,
            unverified,
            met_unverified: None,
            never_verify: false,
            never_written,
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
    fn locate(&self, ctx: &ImageContext, cluster: u64) -> Option<(HostOffset, usize)> {
        let per_block = self.per_block(ctx);
        let block = self.block(cluster / per_block)?;
        let per_slice = self.width.entries(self.blocks.slice_size() as u64);
        let in_block = cluster % per_block;
        let slice = block.plus(in_block / per_slice * self.blocks.slice_size() as u64);
        // BackingLayer the entries of a slice, at most 32768.
        Some((slice, (in_block % per_slice) as usize))
    }

    fn load(&mut self, ctx: &ImageContext, slice: HostOffset) -> Result<()> {
        if self.blocks.get(slice).is_none() {
            let data = ctx.read_slice("read refcount block", slice)?;
            self.blocks.insert(slice, data);
            self.loads += 1;
        }
        Ok(())
    }

    /// How many slices were read from the storage so far.
    pub(crate) fn loads(&self) -> u64 {
        self.loads
    }

    /// The refcount of `cluster`.
    pub(crate) fn get(&mut self, ctx: &ImageContext, cluster: u64) -> Result<u64> {
        let Some((slice, index)) = self.locate(ctx, cluster) else { return Ok(0) };
        self.load(ctx, slice)?;
        Ok(self.blocks.get(slice).map_or(0, |data| self.width.get(data, index)))
    }

    /// Sets the refcount of a cluster that a block counts.
    fn set(&mut self, ctx: &ImageContext, cluster: u64, value: u64) -> Result<()> {
        let Some((slice, index)) = self.locate(ctx, cluster) else {
            return Err(ctx.corrupt(
                "write refcount",
                ctx.cluster().start(cluster),
                "the refcount block is missing",
            ));
        };
        self.load(ctx, slice)?;
        if let Some(data) = self.blocks.edit(slice) {
            self.width.set(data, index, value);
        }
        Ok(())
    }

    /// How many clusters from `at` on are in use, as far as the refcount slice that counts `at` tells.
    fn used_from(&mut self, ctx: &ImageContext, at: u64) -> Result<u64> {
        let Some((slice, index)) = self.locate(ctx, at) else { return Ok(0) };
        self.load(ctx, slice)?;
        let Some(data) = self.blocks.get(slice) else { return Ok(0) };
        let width = self.width;
        // A slice is at most 4096 bytes.
        let entries = width.entries(data.len() as u64) as usize;
        Ok((index..entries).take_while(|i| width.get(data, *i) > 0).count() as u64)
    }

    fn is_free(&mut self, ctx: &ImageContext, cluster: u64) -> Result<bool> {
        Ok(self.get(ctx, cluster)? == 0 && !self.metadata.contains(cluster) && !self.unverified.get(cluster))
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
            let block = at / per_block;
            // usize to u64 is exact here.
            if block >= self.table.len() as u64 {
                return Ok(Allocation::TableFull(block));
            }
            let counted = self.block(block).is_some();
            let used = if counted { self.used_from(ctx, at)? } else { 0 };
            if used > 0 {
                at += used;
            } else if self.metadata.contains(at) {
                at = self.metadata.next_absent(at);
            } else if self.unverified.get(at) {
                self.met_unverified = Some(self.met_unverified.map_or(at, |met| met.min(at)));
                if !skip {
                    return Ok(Allocation::Unverified);
                }
                at = self.next_verified(at);
            } else if counted {
                break;
            } else {
                self.add_block(ctx, at)?;
                at += 1;
            }
            self.next_free = at;
        }
        let end = (at / per_block + 1) * per_block;
        let mut count = 1;
        while count < want && at + count < end && self.is_free(ctx, at + count)? {
            count += 1;
        }
        self.check_room(ctx, at + count)?;
        for cluster in at..at + count {
            self.set(ctx, cluster, 1)?;
        }
        self.next_free = at + count;
        Ok(Allocation::Got(Grant { first: at, count, fresh: self.use_up(ctx, at, at + count) }))
    }

    /// The first cluster from `at` on that is not unverified.
    fn next_verified(&self, at: u64) -> u64 {
        self.unverified.next_clear(at).unwrap_or_else(|| at.max(self.unverified.len()))
    }

    /// Whether there is an unverified cluster from `first` on.
    pub(crate) fn has_unverified(&self, first: u64) -> bool {
        self.unverified.next_set(first).is_some()
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

    /// Whether clusters `first..end` were never written before; from now on they count as written.
    fn use_up(&mut self, ctx: &ImageContext, first: u64, end: u64) -> bool {
        let fresh = ctx.cluster().start(first) >= self.never_written;
        if self.never_written != u64::MAX {
            self.never_written = self.never_written.max(ctx.cluster().start(end));
        }
        fresh
    }

    /// Fails if the storage or the format has no room for host clusters below `end`.
    fn check_room(&self, ctx: &ImageContext, end: u64) -> Result<()> {
        let limit = if ctx.storage.info().fixed_len { ctx.storage.len()? } else { MAX_HOST_OFFSET };
        let bytes = end.checked_mul(ctx.cluster().bytes());
        if bytes.is_none_or(|bytes| bytes > limit) {
            return Err(Error::new(ErrorKind::NoSpace, "allocate cluster")
                .in_file(ctx.name.clone())
                .because(format!("the image cannot grow past {limit} bytes")));
        }
        Ok(())
    }

    /// Makes cluster `at`, which no block counts yet, the refcount block that counts it.
    fn add_block(&mut self, ctx: &ImageContext, at: u64) -> Result<()> {
        self.check_room(ctx, at + 1)?;
        self.use_up(ctx, at, at + 1);
        let offset = HostOffset(ctx.cluster().start(at));
        let per_block = self.per_block(ctx);
        // At most 2 MiB. The block counts itself from the beginning, so that nothing is left to fail once it
        // is in use.
        let mut data = vec![0; ctx.cluster().bytes() as usize];
        self.width.set(&mut data, (at % per_block) as usize, 1);
        ctx.storage.write_at(&data, offset.0)?;
        // The caller found the index inside the table.
        let index = (at / per_block) as usize;
        self.table[index] = offset.0;
        self.table_dirty.mark(index);
        self.metadata.insert(at);
        Ok(())
    }

    /// Takes clusters back that nothing ever pointed at.
    pub(crate) fn release(&mut self, ctx: &ImageContext, clusters: Range<u64>) -> Result<()> {
        self.next_free = self.next_free.min(clusters.start);
        for cluster in clusters {
            self.set(ctx, cluster, 0)?;
        }
        Ok(())
    }

    /// Frees every counted cluster that is neither in `used` nor metadata. `used` is all that the image's
    /// entries map, so that no free cluster is unverified any more.
    pub(crate) fn free_unused(&mut self, ctx: &ImageContext, used: &MetadataMap) -> Result<()> {
        let per_block = self.per_block(ctx);
        let slice_size = self.blocks.slice_size();
        let per_slice = self.width.entries(slice_size as u64);
        let blocks: Vec<_> = (0..self.table.len() as u64).filter_map(|i| Some((i, self.block(i)?))).collect();
        for (index, block) in blocks {
            for slice in 0..per_block / per_slice {
                let at = block.plus(slice * slice_size as u64);
                let data = match self.blocks.get(at) {
                    Some(data) => data.to_vec().into_boxed_slice(),
                    None => ctx.read_slice("read refcount block", at)?,
                };
                let first = index * per_block + slice * per_slice;
                // A slice is at most 4096 bytes.
                for (entry, cluster) in (0..per_slice as usize).zip(first..) {
                    let is_used = || used.contains(cluster) || self.metadata.contains(cluster);
                    if self.width.get(&data, entry) > 0 && !is_used() {
                        self.set(ctx, cluster, 0)?;
                    }
                }
            }
        }
        self.next_free = 0;
        self.all_verified();
        Ok(())
    }

    /// Notes that one reference to each of `clusters` goes away with a change that is not durable yet.
    ///
    /// An entry for guest data that names a cluster of metadata never had a reference to it: that is damage,
    /// and giving such a cluster back would free the image's own tables. Nor had one that names a cluster
    /// with a refcount of zero, which may have another owner by the time the reference would be dropped. If
    /// the refcount cannot be read the cluster leaks, which is harmless.
    pub(crate) fn defer_unref(&mut self, ctx: &ImageContext, clusters: Range<u64>) {
        for cluster in clusters {
            if self.metadata.contains(cluster) || !self.get(ctx, cluster).is_ok_and(|count| count > 0) {
                continue;
            }
            match self.pending.last_mut() {
                Some(last) if last.end == cluster => last.end += 1,
                _ => self.pending.push(cluster..cluster + 1),
            }
        }
    }

    /// Whether so many references wait that a write-back should come first.
    pub(crate) fn wants_write_back(&self) -> bool {
        self.pending.len() > PENDING_RUNS || self.blocks.wants_write_back()
    }

    /// The references dropped so far; they stay the caller's until [`Self::unref`] or
    /// [`Self::put_back`].
    pub(crate) fn take_pending_unrefs(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.pending)
    }

    /// The references were not dropped after all.
    pub(crate) fn put_back(&mut self, pending: Vec<Range<u64>>) {
        self.pending.extend(pending);
    }

    /// The clusters among `clusters` that will be free once the references are dropped.
    pub(crate) fn last_references(
        &mut self,
        ctx: &ImageContext,
        clusters: &[Range<u64>],
    ) -> Result<Vec<Range<u64>>> {
        let mut out: Vec<Range<u64>> = Vec::new();
        for cluster in clusters.iter().cloned().flatten() {
            if self.get(ctx, cluster)? == 1 && !self.metadata.contains(cluster) {
                match out.last_mut() {
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => out.push(cluster..cluster + 1),
                }
            }
        }
        Ok(out)
    }

    /// Drops one reference to each of `clusters`, whose holders are durably gone.
    ///
    /// One that has become metadata since is left alone: two entries named it although its refcount was one,
    /// and the other's reference was dropped first.
    pub(crate) fn unref(&mut self, ctx: &ImageContext, clusters: &[Range<u64>]) -> Result<()> {
        for cluster in clusters.iter().cloned().flatten() {
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
                self.unverified.clear(cluster..cluster + 1);
                self.next_free = self.next_free.min(cluster);
            }
        }
        Ok(())
    }

    /// Moves the refcount table to a larger place so that it reaches block `block`.
    ///
    /// Runs under the write-back lock, since it writes refcount slices and the header itself. Everything it
    /// writes lies in clusters beyond what the old table counts, and past all that are unverified, durable
    /// before the header points there.
    pub(crate) fn grow_table(&mut self, ctx: &ImageContext, block: u64) -> Result<(), Failure> {
        let cluster = ctx.cluster();
        let per_block = self.per_block(ctx);
        let old_len = self.table.len() as u64;
        if block < old_len {
            return Ok(());
        }
        let entries_per_cluster = cluster.bytes() / 8;
        // The new blocks come first, then the table, right behind what the old table counts, or past the
        // unverified clusters: they need not be verified for it, and the new table counts this place.
        let mut first_block = old_len;
        if self.has_unverified(old_len * per_block) {
            first_block = first_block.max(self.unverified.len().div_ceil(per_block));
        }
        let mut table_clusters =
            cluster.count(8 * (old_len + old_len / 2).max(block + 1).max(first_block + 1));
        let blocks = loop {
            let bytes = table_clusters * cluster.bytes();
            if bytes > MAX_REFCOUNT_TABLE_BYTES {
                let error = Error::new(ErrorKind::NoSpace, "grow refcount table").in_file(ctx.name.clone());
                let why = format!(
                    "the refcount table would need {bytes} bytes, more than the limit of {MAX_REFCOUNT_TABLE_BYTES}"
                );
                return Err(error.because(why).into());
            }
            // At most 2^14 clusters.
            let blocks = (1..).find(|b| b * per_block >= b + table_clusters).unwrap_or(1);
            if table_clusters * entries_per_cluster >= first_block + blocks {
                break blocks;
            }
            table_clusters += 1;
        };
        let first = first_block * per_block;
        let used = blocks + table_clusters;
        self.check_room(ctx, first + used)?;
        if let Some(taken) = (first..first + used).find(|&c| self.metadata.contains(c)) {
            let why = "metadata lies in an uncounted cluster";
            return Err(ctx.corrupt("grow refcount table", cluster.start(taken), why).into());
        }
        self.use_up(ctx, first, first + used);
        let mut table = self.table.clone();
        // At most 8 MiB of table, checked above, and one cluster of block.
        table.resize((table_clusters * entries_per_cluster) as usize, 0);
        for b in 0..blocks {
            let mut data = vec![0; cluster.bytes() as usize];
            for i in (0..per_block).take_while(|i| b * per_block + i < used) {
                self.width.set(&mut data, i as usize, 1);
            }
            ctx.storage.write_at(&data, cluster.start(first + b))?;
            table[(first_block + b) as usize] = cluster.start(first + b);
        }
        let table_at = HostOffset(cluster.start(first + blocks));
        let mut bytes = vec![0; table.len() * 8];
        BigEndian::write_u64_into(&table, &mut bytes);
        ctx.storage.write_at(&bytes, table_at.0)?;
        self.write_dirty_blocks(ctx)?;
        ctx.barrier()?;
        // Offset and size of the table stand side by side in one sector, so they change at once.
        let mut field = [0; 12];
        BigEndian::write_u64(&mut field, table_at.0);
        // At most 8 MiB of table: fits.
        BigEndian::write_u32(&mut field[8..], table_clusters as u32);
        ctx.write_header(HEADER_TABLE_FIELD, &field)?;

        let old = cluster.index(self.table_at.0)..cluster.count(self.table_at.0 + old_len * 8);
        self.table = table;
        self.table_at = table_at;
        self.table_dirty = DirtySectors::default();
        for index in first..first + used {
            self.metadata.insert(index);
        }
        old.clone().for_each(|index| self.metadata.remove(index));
        // The header does not point at the old table any more, durably.
        Ok(self.unref(ctx, &[old])?)
    }

    /// Writes the refcount slices that differ from the disk, so that the table may point at their blocks.
    fn write_dirty_blocks(&mut self, ctx: &ImageContext) -> Result<()> {
        let written =
            self.blocks.take_dirty().iter().try_for_each(|(at, data)| ctx.storage.write_at(data, at.0));
        match written {
            Ok(()) => self.blocks.written(),
            Err(_) => self.blocks.not_written(),
        }
        written
    }
}
