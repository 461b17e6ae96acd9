//! A larger refcount table, when the old one does not reach far enough.

use blockmirror_block::{Error, ErrorKind, Result};
use byteorder::{BigEndian, ByteOrder};

use super::Refcounts;
use crate::context::ImageContext;
use crate::dirty::DirtySectors;
use crate::limits::MAX_REFCOUNT_TABLE_BYTES;
use crate::offset::{ClusterRange, HostCluster};
use crate::writeback::Failure;

/// Where the header holds the refcount table's offset (8 bytes) and size in clusters (4 bytes).
const HEADER_TABLE_FIELD: u64 = 48;

impl Refcounts {
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
        if self.has_unverified(HostCluster(old_len * per_block)) {
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
        let first = HostCluster(first_block * per_block);
        let used = blocks + table_clusters;
        let new = first..first.plus(used);
        self.check_room(ctx, new.end)?;
        if let Some(taken) = new.each().find(|&c| self.metadata.contains(c)) {
            let why = "metadata lies in an uncounted cluster";
            return Err(ctx.corrupt("grow refcount table", cluster.start(taken).0, why).into());
        }
        self.use_up(ctx, new.clone());
        let mut table = self.table.clone();
        // At most 8 MiB of table, checked above, and one cluster of block.
        table.resize((table_clusters * entries_per_cluster) as usize, 0);
        for b in 0..blocks {
            let mut data = vec![0; cluster.bytes() as usize];
            for i in (0..per_block).take_while(|i| b * per_block + i < used) {
                self.width.set(&mut data, i as usize, 1);
            }
            ctx.storage.write_at(&data, cluster.start(first.plus(b)).0)?;
            table[(first_block + b) as usize] = cluster.start(first.plus(b)).0;
        }
        let table_at = cluster.start(first.plus(blocks));
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

        let old = cluster.touched(self.table_at, old_len * 8);
        self.table = table;
        self.table_at = table_at;
        self.table_dirty = DirtySectors::default();
        for cluster in new.each() {
            self.metadata.insert(cluster);
        }
        old.each().for_each(|cluster| self.metadata.remove(cluster));
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
