//! A larger refcount table, when the old one does not reach far enough: planned, written, then used.
//!
//! The caller holds the write-back lock, since refcount slices and the header are written, and the lock of
//! the tables all the time.

use blockmirror_block::{Error, ErrorKind, Result};
use byteorder::{BigEndian, ByteOrder};

use super::{NewBlocks, Refcounts};
use crate::cache::DirtySlice;
use crate::context::ImageContext;
use crate::dirty::DirtySectors;
use crate::failure::Failure;
use crate::limits::MAX_REFCOUNT_TABLE_BYTES;
use crate::offset::{ClusterRange, HostCluster, HostOffset};
use crate::overlap::MetadataKind;

/// Where the header holds the refcount table's offset (8 bytes) and size in clusters (4 bytes).
const HEADER_TABLE_FIELD: u64 = 48;

/// A larger refcount table, from its plan to its use. In between everything it needs is written, without the
/// metadata lock.
#[derive(Debug)]
pub(crate) struct GrownTable {
    blocks: NewBlocks,
    table: Vec<u64>,
    table_at: HostOffset,
    clusters: u64,
}

impl GrownTable {
    /// Writes the new blocks, the table and `dirty`, the refcount slices that differ from the disk; and when
    /// all of that is durable, the header.
    pub(crate) fn write(&self, ctx: &ImageContext, dirty: &[DirtySlice]) -> Result<(), Failure> {
        self.blocks.write(ctx)?;
        let mut bytes = vec![0; self.table.len() * 8];
        BigEndian::write_u64_into(&self.table, &mut bytes);
        ctx.storage.write_at(&bytes, self.table_at.0)?;
        for (at, data) in dirty {
            ctx.storage.write_at(data, at.0)?;
        }
        ctx.barrier()?;
        // Offset and size of the table stand side by side in one sector, so they change at once.
        let mut field = [0; 12];
        BigEndian::write_u64(&mut field, self.table_at.0);
        // At most 8 MiB of table: fits.
        BigEndian::write_u32(&mut field[8..], self.clusters as u32);
        ctx.write_header(HEADER_TABLE_FIELD, &field)
    }
}

impl Refcounts {
    /// Plans a table that reaches block `block`; `None` if the present one does.
    ///
    /// All of it lies in clusters beyond what the old table counts, and past all that are unverified.
    pub(crate) fn plan_table(&mut self, ctx: &ImageContext, block: u64) -> Result<Option<GrownTable>> {
        let cluster = ctx.cluster();
        let per_block = self.per_block(ctx);
        let old_len = self.table.len() as u64;
        if block < old_len {
            return Ok(None);
        }
        // The new blocks come first, then the table, right behind what the old table counts, or past the
        // unverified clusters: they need not be verified for it, and the new table counts this place.
        let mut first_block = old_len;
        if self.has_unverified(HostCluster(old_len * per_block)) {
            first_block = first_block.max(self.unverified.len().div_ceil(per_block));
        }
        let least = (old_len + old_len / 2).max(block + 1).max(first_block + 1);
        let (blocks, table_clusters) = table_size(ctx, per_block, first_block, least)?;
        let first = HostCluster(first_block * per_block);
        let new = first..first.plus(blocks + table_clusters);
        self.check_room(ctx, new.end)?;
        if let Some(taken) = self.metadata.last_in(new.clone()) {
            let why = "metadata lies in an uncounted cluster";
            return Err(ctx.corrupt("grow refcount table", cluster.start(taken).0, why));
        }
        self.use_up(ctx, new.clone());
        let blocks = NewBlocks::new(self, ctx, blocks, new);
        let mut table = self.table.clone();
        // At most 8 MiB.
        table.resize((table_clusters * (cluster.bytes() / 8)) as usize, 0);
        for (index, at) in blocks.entries(ctx) {
            table[index] = at.0;
        }
        let table_at = cluster.start(blocks.rest().start);
        Ok(Some(GrownTable { blocks, table, table_at, clusters: table_clusters }))
    }

    /// Uses a table that the header points at, durably.
    pub(crate) fn use_table(&mut self, ctx: &ImageContext, grown: GrownTable) -> Result<()> {
        let old = ctx.cluster().touched(self.table_at, self.table.len() as u64 * 8);
        (self.table, self.table_at) = (grown.table, grown.table_at);
        self.table_dirty = DirtySectors::default();
        for (_, at) in grown.blocks.entries(ctx) {
            self.metadata.insert(MetadataKind::RefcountBlock, ctx.cluster().index(at));
        }
        for cluster in grown.blocks.rest().each() {
            self.metadata.insert(MetadataKind::RefcountTable, cluster);
        }
        old.each().for_each(|cluster| self.metadata.remove(MetadataKind::RefcountTable, cluster));
        self.unref(ctx, &[old])
    }
}

/// How many blocks and how many clusters of table make one that has at least `least` entries, if the blocks
/// are the ones from `first_block` on.
fn table_size(ctx: &ImageContext, per_block: u64, first_block: u64, least: u64) -> Result<(u64, u64)> {
    let cluster = ctx.cluster();
    let mut table_clusters = cluster.count(8 * least);
    loop {
        let bytes = table_clusters * cluster.bytes();
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            let error = Error::new(ErrorKind::NoSpace, "grow refcount table").in_file(ctx.name.clone());
            return Err(error.because(format!(
                "the refcount table would need {bytes} bytes, more than the limit of \
                 {MAX_REFCOUNT_TABLE_BYTES}"
            )));
        }
        // At most 2^14 clusters.
        let blocks = (1..).find(|b| b * per_block >= b + table_clusters).unwrap_or(1);
        if table_clusters * (cluster.bytes() / 8) >= first_block + blocks {
            return Ok((blocks, table_clusters));
        }
        table_clusters += 1;
    }
}
