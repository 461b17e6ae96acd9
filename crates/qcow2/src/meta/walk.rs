//! The mapping of a guest range as runs: whole tables are read and decoded at the speed of memory.
//!
//! Called by [`crate::read`] and [`crate::extents`], and by all others that ask about more than one cluster.
//! What must hold: slices of the range that lie one behind the other in a table are read at once, and
//! others only where more questions follow; a slice of zeros is passed over without looking at its entries;
//! entries that continue each other become one piece before anything is called for them. The metadata lock
//! is held meanwhile, so one look passes a bounded number of clusters.

use blockmirror_block::{ByteRange, Result, Visit};
use byteorder::{BigEndian, ByteOrder};

use super::{Meta, decode_at, listed};
use crate::context::ImageContext;
use crate::format::entry::{CompressedRun, Entry, PlainEntry};
use crate::offset::{GuestCluster, GuestOffset, HostOffset};

/// Clusters, or holes of the L1 table, that one look at the mapping passes at most: where they all lie one
/// behind the other there is no end of runs to stop at, and the metadata lock is held meanwhile. A multiple
/// of what a slice maps.
const CLUSTERS_AT_ONCE: u64 = 1 << 15;

/// The most bytes of a table that are read at once.
const READ_AHEAD: usize = 256 << 10;

/// What a run of guest bytes is mapped to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mapping {
    /// Nothing here: the backing device decides.
    Unallocated,
    /// Zeros; space may be reserved at the given place.
    Zero(Option<HostOffset>),
    /// Bytes as they are, in the data storage.
    Data(HostOffset),
    /// One compressed cluster, or part of one.
    Compressed(CompressedRun),
}

/// A maximal run of guest bytes with one mapping. A compressed run never spans clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MapRun {
    pub(crate) range: ByteRange,
    pub(crate) mapping: Mapping,
}

impl Mapping {
    /// That of a cluster, as it is for its bytes from the guest offset `at` on.
    fn moved(self, ctx: &ImageContext, at: u64) -> Self {
        let within = ctx.cluster().within(GuestOffset(at));
        match self {
            Self::Data(host) => Self::Data(host.plus(within)),
            Self::Zero(host) => Self::Zero(host.map(|host| host.plus(within))),
            other => other,
        }
    }
}

impl MapRun {
    /// Whether `next`, which follows directly, goes on in the same way.
    fn continues_into(&self, next: &Self) -> bool {
        let after = |host: HostOffset| host.plus(self.range.len());
        match (self.mapping, next.mapping) {
            (Mapping::Unallocated, Mapping::Unallocated) | (Mapping::Zero(None), Mapping::Zero(None)) => true,
            (Mapping::Zero(Some(a)), Mapping::Zero(Some(b))) | (Mapping::Data(a), Mapping::Data(b)) => {
                after(a) == b
            }
            _ => false,
        }
    }
}

impl Meta {
    /// What lies in `range`, as runs in order; stops after about `max` runs, or after many clusters, so the
    /// last one may end before the range does. `range` lies inside the disk.
    pub(crate) fn runs(&mut self, ctx: &ImageContext, range: ByteRange, max: usize) -> Result<Vec<MapRun>> {
        self.collect(ctx, range, max, false)
    }

    /// The same for a question about the mapping, which others about the same table follow: a layer of a
    /// chain is asked about one hole of the layers above it after the other. What the range needs of a table
    /// is read with all that lies behind it there.
    pub(crate) fn runs_in_turn(
        &mut self,
        ctx: &ImageContext,
        range: ByteRange,
        max: usize,
    ) -> Result<Vec<MapRun>> {
        self.collect(ctx, range, max, true)
    }

    fn collect(
        &mut self,
        ctx: &ImageContext,
        range: ByteRange,
        max: usize,
        in_turn: bool,
    ) -> Result<Vec<MapRun>> {
        let mut runs: Vec<MapRun> = Vec::new();
        self.walk(ctx, range, in_turn, &mut |piece| {
            let full = runs.len() >= max;
            match runs.last_mut() {
                Some(run) if run.continues_into(&piece) => {
                    run.range = ByteRange::new(run.range.start(), piece.range.end());
                }
                _ if full => return Visit::Break(()),
                _ => runs.push(piece),
            }
            Visit::Continue(())
        })?;
        Ok(runs)
    }

    /// Visits the pieces of `range` in order: whole holes of the L1 table or of a slice, else runs of
    /// clusters or groups of subclusters. Stops after many clusters.
    fn walk(
        &mut self,
        ctx: &ImageContext,
        range: ByteRange,
        in_turn: bool,
        visit: &mut dyn FnMut(MapRun) -> Visit,
    ) -> Result<()> {
        let cluster_size = ctx.cluster();
        let table_bytes = ctx.l2_entries() << cluster_size.bits();
        let step = ctx.format.entry_size() as usize;
        let (mut at, mut passed) = (range.start(), 0);
        while at < range.end() && passed < CLUSTERS_AT_ONCE {
            let cluster = cluster_size.index(GuestOffset(at));
            let (index, l1) = self.l1_entry(ctx, cluster)?;
            let table_end = (at - at % table_bytes).saturating_add(table_bytes).min(range.end());
            let Some(table) = l1.table() else {
                let hole = ByteRange::new(at, table_end);
                if visit(MapRun { range: hole, mapping: Mapping::Unallocated }).is_break() {
                    return Ok(());
                }
                (at, passed) = (table_end, passed + 1);
                continue;
            };
            ctx.check_table("read L1 table", table, index as u64)?;
            let (slice, in_slice) = self.locate(ctx, table, cluster);
            let slice_size = self.l2.slice_size();
            // At most 512.
            let entries = ((slice_size - in_slice) / step) as u64;
            let slice_end = cluster_size.start(cluster.plus(entries)).0.min(range.end());
            match self.l2.look(slice) {
                None => {
                    let last = match in_turn {
                        true => GuestCluster(cluster.0 | (ctx.l2_entries() - 1)),
                        false => cluster_size.index(GuestOffset(table_end - 1)),
                    };
                    let (last, _) = self.locate(ctx, table, last);
                    self.load_up_to(ctx, slice, last)?;
                    continue;
                }
                Some(None) => {
                    let hole = ByteRange::new(at, slice_end);
                    if visit(MapRun { range: hole, mapping: Mapping::Unallocated }).is_break() {
                        return Ok(());
                    }
                }
                Some(Some(data)) => {
                    let part = ByteRange::new(at, slice_end);
                    // The file may end before that.
                    let data = data.get(in_slice..).unwrap_or_default();
                    if walk_slice(ctx, data, slice.plus(in_slice as u64), part, visit)?.is_break() {
                        return Ok(());
                    }
                }
            }
            (at, passed) = (slice_end, passed + entries);
        }
        Ok(())
    }

    /// Reads the slice at `first`, which is not cached, and those behind it up to the one at `last` of the
    /// same table, as far as none of them is cached.
    fn load_up_to(&mut self, ctx: &ImageContext, first: HostOffset, last: HostOffset) -> Result<()> {
        let size = self.l2.slice_size();
        let mut len = size;
        while first.0 + (len as u64) <= last.0
            && len < READ_AHEAD
            && !self.l2.contains(first.plus(len as u64))
        {
            len += size;
        }
        let mut buf = std::mem::take(&mut self.read_ahead);
        if buf.len() < len {
            buf.resize(len, 0);
        }
        let there = ctx.read_slices("read L2 table", first, &mut buf[..len]);
        if let Ok(there) = there {
            // The first one last: it is looked at next, and must not make room for the others.
            let slices = buf[..there.next_multiple_of(size)].chunks_exact(size).enumerate().rev();
            for (at, data) in slices.map(|(i, data)| (i * size, data)) {
                self.l2.insert(first.plus(at as u64), listed(ctx, data, there - at));
            }
        }
        self.read_ahead = buf;
        there.map(drop)
    }
}

/// Visits the clusters of `part` from the first on, whose entries are at the start of `data`, part of the
/// slice of an L2 table that lies at `offset`.
fn walk_slice(
    ctx: &ImageContext,
    data: &[u8],
    offset: HostOffset,
    part: ByteRange,
    visit: &mut dyn FnMut(MapRun) -> Visit,
) -> Result<Visit> {
    let cluster_size = ctx.cluster();
    let step = ctx.format.entry_size() as usize;
    let (mut at, mut entry_at) = (part.start(), 0);
    while at < part.end() {
        let cluster = cluster_size.index(GuestOffset(at));
        let entry = decode_at(ctx, data, entry_at, cluster, offset)?;
        let count = continuing(ctx, &data[entry_at..]);
        let end = cluster_size.start(cluster.plus(count)).0.min(part.end());
        let piece = ByteRange::new(at, end);
        let visited = match (uniform(ctx, entry), entry) {
            (Some(mapping), _) => visit(MapRun { range: piece, mapping: mapping.moved(ctx, at) }),
            (None, Entry::Compressed(run)) => {
                visit(MapRun { range: piece, mapping: Mapping::Compressed(run) })
            }
            (None, Entry::Plain(plain)) => visit_subclusters(ctx, plain, piece, visit),
        };
        if visited.is_break() {
            return Ok(visited);
        }
        at = end;
        entry_at += count as usize * step;
    }
    Ok(Visit::Continue(()))
}

/// How many entries at the start of `data` continue each other: all of their clusters are one run.
fn continuing(ctx: &ImageContext, data: &[u8]) -> u64 {
    let format = ctx.format;
    let first = BigEndian::read_u64(data);
    let stride = match format.mapped_host(first) {
        Some(_) => ctx.cluster().bytes(),
        None if format.is_compressed(first) => return 1,
        None => 0,
    };
    let follows = |count: u64, word: u64| {
        // The flags are the same, so that no offset runs into them.
        word == first.wrapping_add(count.wrapping_mul(stride)) && format.flags(word) == format.flags(first)
    };
    let words = data.as_chunks::<8>().0;
    let count = if format.extended {
        let (entries, _) = words.as_chunks::<2>();
        let Some([_, bitmap]) = entries.first().filter(|[_, bitmap]| is_uniform(*bitmap)) else { return 1 };
        let rest = entries.iter().zip(0..);
        rest.take_while(|([word, own], i)| own == bitmap && follows(*i, BigEndian::read_u64(word))).count()
    } else {
        words.iter().zip(0..).take_while(|(word, i)| follows(*i, BigEndian::read_u64(*word))).count()
    };
    // At most 512, and at least one.
    count as u64
}

/// Whether the subclusters are all allocated, all zero, or none of both.
fn is_uniform(bitmap: [u8; 8]) -> bool {
    let bitmap = BigEndian::read_u64(&bitmap);
    matches!((bitmap >> 32, bitmap & 0xffff_ffff), (0 | 0xffff_ffff, 0) | (0, 0xffff_ffff))
}

/// What a whole cluster is mapped to, if all of it is mapped in one way and not compressed.
fn uniform(ctx: &ImageContext, entry: Entry) -> Option<Mapping> {
    let Entry::Plain(PlainEntry { host, allocated, zero, .. }) = entry else { return None };
    let all = ctx.format.all();
    match (host, allocated, zero) {
        (_, 0, 0) => Some(Mapping::Unallocated),
        (Some(host), allocated, _) if allocated == all => Some(Mapping::Data(host)),
        (host, _, zero) if zero == all => Some(Mapping::Zero(host)),
        _ => None,
    }
}

/// Visits the part of one cluster that lies in `part`, by subclusters.
fn visit_subclusters(
    ctx: &ImageContext,
    plain: PlainEntry,
    part: ByteRange,
    visit: &mut dyn FnMut(MapRun) -> Visit,
) -> Visit {
    let start = part.start() - ctx.cluster().within(GuestOffset(part.start()));
    let size = ctx.format.subcluster_size();
    let mut at = part.start();
    while at < part.end() {
        let bit = 1u32 << ((at - start) / size);
        let end = (start + ((at - start) / size + 1) * size).min(part.end());
        let host = plain.host.map(|h| h.plus(at - start));
        let mapping = match host {
            Some(host) if plain.allocated & bit != 0 => Mapping::Data(host),
            host if plain.zero & bit != 0 => Mapping::Zero(host),
            _ => Mapping::Unallocated,
        };
        visit(MapRun { range: ByteRange::new(at, end), mapping })?;
        at = end;
    }
    Visit::Continue(())
}

#[cfg(test)]
mod tests;
