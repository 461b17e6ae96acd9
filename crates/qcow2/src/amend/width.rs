//! Another width of the refcounts: a new refcount table with blocks of its own, in free space, made durable
//! before the header points at it. Table and width change with one write inside the first sector.
//!
//! The new structures count themselves once, and all else as before, the old ones too: until the switch is
//! durable the header may still point at those, also if the image is opened and written meanwhile. Then the
//! old ones lose their reference. Nothing is counted anew, so that clusters which only an unknown extension
//! refers to stay in use. A crash before the switch leaves bytes in free space, one after it leaks.
//!
//! The image is not open meanwhile: nothing that this crate holds in memory knows two widths.

use std::collections::BTreeSet;
use std::ops::Range;

use blockmirror_block::{Error as BlockError, ErrorKind, Storage, zero};
use byteorder::{BigEndian, ByteOrder};

use super::Meter;
use crate::cluster_set::ClusterSet;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::format::refcount::RefcountWidth;
use crate::limits::MAX_REFCOUNT_TABLE_BYTES;
use crate::offset::HostCluster;
use crate::overlap::MetadataMap;

/// Bits of an entry of the refcount table that are not the block's offset.
const RESERVED: u64 = 511;

/// The part of the first sector that has the place of the refcount table, and its width.
const HEADER_PART: Range<usize> = 48..100;
/// Where in that part the width stands.
const ORDER_IN_PART: usize = 96 - HEADER_PART.start;

/// Whether the refcounts of the image fit into entries of the new width.
///
/// # Errors
/// [`Error::Option`] if one does not.
pub(super) fn check(storage: &dyn Storage, header: &Header, order: u32, meter: &mut Meter<'_>) -> Result<()> {
    let mut old = OldCounts::read(storage, header)?;
    // The same pass comes again before the change, and as much is written.
    meter.expect(3 * old.bytes());
    // Where the tables lie does not matter yet.
    Plan::new(storage, &mut old, order, &MetadataMap::default(), meter).map(drop)
}

/// Changes the width. The image is sound and not open, nothing past the end of its file belongs to it, and
/// `metadata` are its tables: where their refcounts are damaged they are not overwritten all the same.
pub(super) fn change(
    storage: &dyn Storage,
    order: u32,
    metadata: &MetadataMap,
    meter: &mut Meter<'_>,
) -> Result<()> {
    let header = Header::read(storage)?;
    if header.refcount_order == order {
        return Ok(());
    }
    let mut old = OldCounts::read(storage, &header)?;
    let plan = Plan::new(storage, &mut old, order, metadata, meter)?;
    plan.write(storage, &mut old, meter)?;
    plan.switch(storage)?;
    plan.free_old(storage, &mut old)
}

/// The refcounts as they are on disk.
struct OldCounts {
    table: Vec<u64>,
    width: RefcountWidth,
    cluster_size: u64,
    /// The clusters of the table and of its blocks, which lose a reference.
    structures: ClusterSet,
    /// The block that was read last, and its index.
    block: Option<(u64, Vec<u8>)>,
}

impl OldCounts {
    /// Reads the table: at most 8 MiB, by the cap on the header. An image that opens for writing has no block
    /// twice, and all of them in its file.
    fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let cluster_size = header.cluster_size();
        let mut raw = vec![0; (u64::from(header.refcount_table_clusters) * cluster_size) as usize];
        storage.read_at(&mut raw, header.refcount_table_offset)?;
        let mut table = vec![0; raw.len() / 8];
        BigEndian::read_u64_into(&raw, &mut table);
        table.iter_mut().for_each(|entry| *entry &= !RESERVED);
        let mut structures = ClusterSet::default();
        let first = header.refcount_table_offset / cluster_size;
        let clusters = first..first + u64::from(header.refcount_table_clusters);
        let blocks = table.iter().filter(|at| **at != 0).map(|at| at / cluster_size);
        for cluster in clusters.chain(blocks) {
            structures.insert(HostCluster(cluster));
        }
        let width = width(header.refcount_order)?;
        Ok(Self { table, width, cluster_size, structures, block: None })
    }

    /// Bytes of all blocks.
    fn bytes(&self) -> u64 {
        self.table.iter().filter(|at| **at != 0).count() as u64 * self.cluster_size
    }

    fn per_block(&self) -> u64 {
        self.width.entries(self.cluster_size)
    }

    /// Makes block `index` the one that was read last; whether there is one.
    fn load(&mut self, storage: &dyn Storage, index: u64) -> Result<bool> {
        let at = usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0);
        if at == 0 {
            return Ok(false);
        }
        if self.block.as_ref().is_none_or(|(there, _)| *there != index) {
            // At most 2 MiB.
            let mut data = vec![0; self.cluster_size as usize];
            storage.read_at(&mut data, at)?;
            self.block = Some((index, data));
        }
        Ok(true)
    }

    /// The refcount of `cluster` on disk.
    fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64> {
        let per_block = self.per_block();
        if !self.load(storage, cluster / per_block)? {
            return Ok(0);
        }
        // Below the entries of a block, at most 2^24.
        let index = (cluster % per_block) as usize;
        Ok(self.block.as_ref().map_or(0, |(_, data)| self.width.get(data, index)))
    }

    /// Calls `visit` with each cluster that has a refcount, and that refcount, in order.
    fn each(
        &mut self,
        storage: &dyn Storage,
        meter: &mut Meter<'_>,
        visit: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let per_block = self.per_block();
        for index in 0..self.table.len() as u64 {
            if !self.load(storage, index)? {
                continue;
            }
            meter.step(storage, self.cluster_size)?;
            let Some((_, data)) = &self.block else { continue };
            if zero::is_zero(data) {
                continue;
            }
            for slot in 0..per_block {
                let count = self.width.get(data, slot as usize);
                if count > 0 {
                    visit(index * per_block + slot, count)?;
                }
            }
        }
        Ok(())
    }
}

/// Where the new structures go.
struct Plan {
    width: RefcountWidth,
    cluster_size: u64,
    /// The blocks that there will be, by their index in the table.
    blocks: BTreeSet<u64>,
    /// Clusters of the table, which is followed by the blocks.
    table_clusters: u64,
    /// All of the new clusters.
    place: Range<u64>,
}

impl Plan {
    fn new(
        storage: &dyn Storage,
        old: &mut OldCounts,
        order: u32,
        metadata: &MetadataMap,
        meter: &mut Meter<'_>,
    ) -> Result<Self> {
        let (width, cluster_size) = (width(order)?, old.cluster_size);
        let per_block = width.entries(cluster_size);
        // At most 2^20 blocks: a longer table is refused.
        let mut blocks = BTreeSet::new();
        let mut end = 0;
        old.each(storage, meter, &mut |cluster, count| {
            if count > width.max() {
                return Err(too_high(cluster * cluster_size, count, width));
            }
            check_table_len((cluster / per_block + 1) * 8)?;
            if blocks.last() != Some(&(cluster / per_block)) {
                blocks.insert(cluster / per_block);
            }
            end = cluster + 1;
            Ok(())
        })?;
        loop {
            // The new clusters need refcounts themselves: they are added until that needs no more clusters.
            let entries = blocks.last().map_or(0, |last| last + 1);
            let table_clusters = (entries * 8).div_ceil(cluster_size).max(1);
            check_table_len(table_clusters * cluster_size)?;
            let clusters = table_clusters + blocks.len() as u64;
            let place = free_run(storage, old, end, clusters, metadata, meter)?;
            let before = blocks.len();
            blocks.extend(place.start / per_block..=(place.end - 1) / per_block);
            if blocks.len() == before {
                return Ok(Self { width, cluster_size, blocks, table_clusters, place });
            }
        }
    }

    /// The blocks that there will be, with their places.
    fn places(&self) -> impl Iterator<Item = (u64, u64)> {
        self.blocks.iter().copied().zip(self.place.start + self.table_clusters..)
    }

    /// Writes blocks and table, durably.
    fn write(&self, storage: &dyn Storage, old: &mut OldCounts, meter: &mut Meter<'_>) -> Result<()> {
        let size = self.cluster_size;
        // At most 8 MiB, and a cluster.
        let mut table = vec![0; (self.table_clusters * size) as usize];
        let mut block = vec![0; size as usize];
        for (index, cluster) in self.places() {
            meter.step(storage, size)?;
            self.fill(storage, old, index, &mut block)?;
            storage.write_at(&block, cluster * size)?;
            // Below the table's length, by the plan.
            BigEndian::write_u64(&mut table[index as usize * 8..], cluster * size);
        }
        storage.write_at(&table, self.place.start * size)?;
        Ok(storage.flush()?)
    }

    /// Fills `block` with the refcounts of block `index`, those of the old structures as they were.
    fn fill(&self, storage: &dyn Storage, old: &mut OldCounts, index: u64, block: &mut [u8]) -> Result<()> {
        let per_block = self.width.entries(self.cluster_size);
        for (slot, cluster) in (index * per_block..(index + 1) * per_block).enumerate() {
            let is_new = self.place.contains(&cluster);
            let count = if is_new { 1 } else { old.get(storage, cluster)? };
            self.width.set(block, slot, count);
        }
        Ok(())
    }

    /// Takes the reference of header and old table off what they were, durably. The switch is durable.
    fn free_old(&self, storage: &dyn Storage, old: &mut OldCounts) -> Result<()> {
        let per_block = self.width.entries(self.cluster_size);
        let mut block = vec![0; self.cluster_size as usize];
        for (index, place) in self.places() {
            self.fill(storage, old, index, &mut block)?;
            let mut goes = false;
            for (slot, cluster) in (index * per_block..(index + 1) * per_block).enumerate() {
                let count = self.width.get(&block, slot);
                if count > 0 && old.structures.contains(HostCluster(cluster)) {
                    self.width.set(&mut block, slot, count - 1);
                    goes = true;
                }
            }
            if goes {
                storage.write_at(&block, place * self.cluster_size)?;
            }
        }
        Ok(storage.flush()?)
    }

    /// Has the header point at what was written.
    fn switch(&self, storage: &dyn Storage) -> Result<()> {
        let mut part = [0; HEADER_PART.end - HEADER_PART.start];
        storage.read_at(&mut part, HEADER_PART.start as u64)?;
        BigEndian::write_u64(&mut part, self.place.start * self.cluster_size);
        // At most 8 MiB of clusters.
        BigEndian::write_u32(&mut part[8..], self.table_clusters as u32);
        BigEndian::write_u32(&mut part[ORDER_IN_PART..], self.width.bits().trailing_zeros());
        storage.write_at(&part, HEADER_PART.start as u64)?;
        Ok(storage.flush()?)
    }
}

/// `clusters` free clusters in a row: past the end of the file and of what is counted, `end`, where the file
/// can grow.
fn free_run(
    storage: &dyn Storage,
    old: &mut OldCounts,
    end: u64,
    clusters: u64,
    metadata: &MetadataMap,
    meter: &mut Meter<'_>,
) -> Result<Range<u64>> {
    let (len, size) = (storage.len()?, old.cluster_size);
    if !storage.info().fixed_len {
        let mut first = end.max(len.div_ceil(size));
        while let Some(taken) = metadata.last_in(HostCluster(first)..HostCluster(first + clusters)) {
            first = taken.0 + 1;
        }
        return Ok(first..first + clusters);
    }
    let limit = len / size;
    let (mut start, mut found) = (0, None);
    let mut look = |used: u64| {
        while found.is_none() && used.min(limit).saturating_sub(start) >= clusters {
            match metadata.last_in(HostCluster(start)..HostCluster(start + clusters)) {
                Some(taken) => start = taken.0 + 1,
                None => found = Some(start..start + clusters),
            }
        }
        start = start.max(used + 1);
        Ok(())
    };
    old.each(storage, meter, &mut |cluster, _| look(cluster))?;
    look(limit)?;
    let why = || format!("no {clusters} free clusters in a row for refcounts of another width");
    let full = || BlockError::new(ErrorKind::NoSpace, "amend").in_file(storage.name()).because(why());
    Ok(found.ok_or_else(full)?)
}

fn too_high(at: u64, count: u64, width: RefcountWidth) -> Error {
    let (bits, max) = (width.bits(), width.max());
    let problem = format!("the cluster at {at} has the refcount {count}, and {bits} bits hold {max} at most");
    Error::Option { option: "refcount_bits", problem }
}

fn check_table_len(bytes: u64) -> Result<()> {
    if bytes <= MAX_REFCOUNT_TABLE_BYTES {
        return Ok(());
    }
    let (what, limit) = ("the refcount table of that width, in bytes,", MAX_REFCOUNT_TABLE_BYTES);
    Err(Error::LimitExceeded { what, value: bytes, limit })
}

fn width(order: u32) -> Result<RefcountWidth> {
    RefcountWidth::from_order(order).ok_or_else(|| Error::HeaderField {
        field: "refcount_order",
        value: order.into(),
        allowed: "at most 6 (64 bits) is allowed".into(),
    })
}
