//! Whether an image file, or its data file, was cut short: an interrupted download, a copy onto a full disk.
//!
//! `info` asks, and opening for writing does: the first write behind the end of such a file would make zeros
//! of all that is missing before it. Reads find out for themselves ([`crate::context`]). The work is bounded
//! whatever the image says of itself.

mod rest;

use std::sync::Arc;

use blockmirror_block::zero::is_zero;
use blockmirror_block::{ByteRange, Error as BlockError, ErrorKind, Storage};

use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::format::refcount::RefcountWidth;
use crate::image::{OpenOptions, Qcow2};
use crate::limits::MAX_REFCOUNT_TABLE_BYTES;
use crate::meta::Mapping;
use crate::offset::{GuestOffset, HostOffset};
use crate::refcounts::Refcounts;

/// Runs of the mapping that are looked at in one go.
const BATCH: usize = 1024;

/// Entries of L1 and L2 tables that are looked at: 1 TiB of disk, with clusters of 64 KiB.
const MOST_ENTRIES: u64 = 1 << 24;

/// Refcount blocks that are looked at, and their bytes together.
const MOST_BLOCKS: u32 = 1024;
const MOST_BLOCK_BYTES: u64 = 64 << 20;

/// Bytes that are passed over at once where they are zeros.
const ZEROS: usize = 1024;

/// What a file that was cut short lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct CutShort {
    /// Bytes of the file.
    pub file_len: u64,
    /// The first guest byte whose data, or whose table, is missing; where none was found, the first that was
    /// not looked at.
    pub first: u64,
    /// Guest bytes that are missing.
    pub missing: u64,
    /// Whether the look came to the end of the disk. It is bounded: where it was stopped, more may be
    /// missing.
    pub complete: bool,
}

impl CutShort {
    /// Looks whether `storage`, an image with `header` and without a data file, was cut short; `None` if it
    /// is whole.
    ///
    /// Reads one refcount block of a whole image, and its L1 table if its last cluster is short. Only where
    /// the refcounts, or a table, reach past the end of the file the tables are read.
    ///
    /// # Errors
    /// The storage fails.
    pub fn find(storage: Arc<dyn Storage>, header: &Header) -> Result<Option<Self>> {
        if header.data_file.is_some() {
            return Ok(None);
        }
        let file_len = storage.len()?;
        let may_reach = counts_may_reach_past_end(&*storage, header)?;
        if !may_reach && file_len.is_multiple_of(header.cluster_size()) {
            return Ok(None);
        }
        match OpenOptions::new().open(storage) {
            Ok(image) if may_reach || image.lacks_part_of_table(file_len) => {
                image.look_past_end(file_len, 0, MOST_ENTRIES)
            }
            // A storage that fails says nothing of the image.
            Err(Error::Storage(error)) if error.kind() != ErrorKind::Corrupt => Err(error.into()),
            // Not even the L1 table is there.
            Err(_) if may_reach => {
                Ok(Some(Self { file_len, first: 0, missing: header.virtual_size, complete: true }))
            }
            _ => Ok(None),
        }
    }

    /// Why `operation` is refused in an image that lacks this.
    fn refusal(&self, operation: &'static str, name: &str) -> BlockError {
        let (len, first) = (self.file_len, self.first);
        let why = if self.missing > 0 {
            format!(
                "the file ends at {len}, and what the guest has at {first} lies past that: it was cut short \
                 and is for reading only, since a write would make zeros of what is missing"
            )
        } else {
            format!("the tables are too many to look for what is missing past the end of the file at {len}")
        };
        BlockError::new(ErrorKind::CutShort, operation).in_file(name).because(why)
    }
}

impl OpenOptions {
    /// Refuses to open `storage` for writing, before anything is written, if something was found missing.
    ///
    /// # Errors
    /// [`ErrorKind::CutShort`]; the storage fails.
    pub(crate) fn refuse_cut_short(storage: &Arc<dyn Storage>, header: &Header) -> Result<()> {
        match CutShort::find(Arc::clone(storage), header)?.filter(|cut| cut.missing > 0) {
            Some(cut) => Err(cut.refusal("open for writing", storage.name()).into()),
            None => Ok(()),
        }
    }
}

/// Whether the last cluster with a refcount, or its last subcluster, begins at or past the end of the file.
/// Where that takes too long to find out it may.
fn counts_may_reach_past_end(storage: &dyn Storage, header: &Header) -> Result<bool> {
    let len = storage.len()?;
    let cluster = header.cluster_size();
    let table_bytes = (u64::from(header.refcount_table_clusters) * cluster).min(MAX_REFCOUNT_TABLE_BYTES);
    let Some(width) = RefcountWidth::from_order(header.refcount_order) else { return Ok(false) };
    let per_block = width.entries(cluster);
    // Blocks before this one count nothing past the end. At most 2^20.
    let first_block = len / cluster / per_block;
    let table_at = header.refcount_table_offset.saturating_add(first_block.saturating_mul(8));
    let table_end = header.refcount_table_offset.saturating_add(table_bytes).min(len);
    // At most 8 MiB. What the file does not hold reads as zeros.
    let mut table = vec![0; table_end.saturating_sub(table_at) as usize];
    storage.read_at(&mut table, table_at)?;
    table.truncate(last_byte(&table).map_or(0, |last| last + 1).next_multiple_of(8));
    // At most 2 MiB.
    let mut block = vec![0; cluster as usize];
    let mut looked = 0;
    for (index, entry) in table.as_chunks::<8>().0.iter().enumerate().rev() {
        let at = u64::from_be_bytes(*entry) & !511;
        if at == 0 {
            continue;
        }
        if at >= len || looked == MOST_BLOCKS || u64::from(looked) * cluster >= MOST_BLOCK_BYTES {
            return Ok(true);
        }
        looked += 1;
        storage.read_at(&mut block, at)?;
        // The last entry that is not zero has a part in the last byte that is not.
        let Some(byte) = last_byte(&block) else { continue };
        let bits = cluster * 8 / per_block;
        let (first, last) = (byte as u64 * 8 / bits, (byte as u64 * 8 + 7) / bits);
        // BackingLayer the entries of a block, at most 2^24.
        if let Some(last) = (first..=last).rev().find(|i| width.get(&block, *i as usize) > 0) {
            let host = ((first_block + index as u64) * per_block + last).saturating_mul(cluster);
            let last_unit = if header.extended_l2 { cluster - cluster / 32 } else { 0 };
            return Ok(host.saturating_add(last_unit) >= len);
        }
    }
    Ok(false)
}

/// The last byte that is not zero.
fn last_byte(bytes: &[u8]) -> Option<usize> {
    let piece = bytes.rchunks(ZEROS).position(|piece| !is_zero(piece))?;
    bytes[..bytes.len() - piece * ZEROS].iter().rposition(|byte| *byte != 0)
}

impl Qcow2 {
    /// Refuses an image whose file, or data file, was cut short. The look is bounded. Where it is stopped
    /// before it has found anything missing from the image file, the rest is left for later ([`rest`]).
    ///
    /// # Errors
    /// [`ErrorKind::CutShort`] if something is missing, or if that cannot be found out of a data file.
    pub(crate) fn check_whole(&self) -> Result<()> {
        let data = self.ctx.data();
        let len = data.len()?;
        let image_len = self.ctx.storage.len()?;
        if self.lacks_part_of_table(image_len) {
            let all = CutShort { file_len: image_len, first: 0, missing: self.ctx.size(), complete: false };
            let cut = self.look_past_end(len, 0, MOST_ENTRIES)?.unwrap_or(all);
            let cut = CutShort { file_len: image_len, ..cut };
            return Err(cut.refusal("open for writing", self.ctx.storage.name()).into());
        }
        if self.ends_in_table_of_snapshot(image_len) {
            let error = BlockError::new(ErrorKind::CutShort, "open for writing");
            let why = format!(
                "the file ends at {image_len}, inside an L2 table of a snapshot: it was cut short and is for \
                 reading only"
            );
            return Err(error.in_file(self.ctx.storage.name()).because(why).into());
        }
        let found = if self.ctx.format.external_data {
            // Guest data lies in it where the guest has it, so only what is past its end can be missing.
            let from = len.min(self.ctx.size()) / self.ctx.cluster().bytes() * self.ctx.cluster().bytes();
            self.look_past_end(len, from, MOST_ENTRIES)?
        } else if counts_may_reach_past_end(&**data, &self.header())? {
            match self.look_past_end(len, 0, MOST_ENTRIES)? {
                Some(cut) if cut.missing == 0 => self.leave_rest(len),
                // What snapshots have was not looked at.
                None if self.header().snapshot_count > 0 => self.leave_rest(len),
                found => found,
            }
        } else {
            None
        };
        found.map_or(Ok(()), |cut| Err(cut.refusal("open for writing", data.name()).into()))
    }

    /// Whether the image file, of `file_len` bytes, ends inside an L2 table. All that writers make are whole.
    fn lacks_part_of_table(&self, file_len: u64) -> bool {
        let (cluster, end) = (self.ctx.cluster(), HostOffset(file_len));
        let last = cluster.start(cluster.index(end));
        last != end && self.meta.lock().l1().iter().any(|l1| l1.table() == Some(last))
    }

    /// The same for the tables that snapshots have, of an image that is to be written.
    fn ends_in_table_of_snapshot(&self, file_len: u64) -> bool {
        let (cluster, end) = (self.ctx.cluster(), HostOffset(file_len));
        let meta = self.meta.lock();
        let has = |counts: &Refcounts| counts.metadata.is_inactive_l2(cluster.index(end));
        cluster.within(end) != 0 && meta.refcounts.as_ref().is_some_and(has)
    }

    /// Looks through the mapping from guest byte `from` on for data, and tables, past the end of the file
    /// that should hold them, which has `file_len` bytes.
    fn look_past_end(&self, file_len: u64, from: u64, budget: u64) -> Result<Option<CutShort>> {
        let ctx = &self.ctx;
        let unit = ctx.format.subcluster_size();
        let table_bytes = ctx.l2_entries() << ctx.cluster().bits();
        let image_len = ctx.storage.len()?;
        let mut found: Option<CutShort> = None;
        let mut note = |range: ByteRange| {
            let cut = CutShort { file_len, first: range.start(), missing: 0, complete: true };
            found.get_or_insert(cut).missing += range.len();
        };
        let mut left = budget;
        let mut at = from;
        while at < ctx.size() && left > 0 {
            let start = at / table_bytes * table_bytes;
            let end = start.saturating_add(table_bytes).min(ctx.size());
            left -= 1;
            let (runs, listed, has_table) = {
                let mut meta = self.meta.lock();
                let entry = meta.l1_entry(ctx, ctx.cluster().index(GuestOffset(at)));
                let lies_at = entry.ok().and_then(|(_, entry)| entry.table());
                // What the file has of the table lists the clusters up to here.
                let listed = lies_at.map_or(end, |host| {
                    let entries = image_len.saturating_sub(host.0) / ctx.format.entry_size();
                    start.saturating_add(entries << ctx.cluster().bits()).min(end)
                });
                // A look does not go past a table, so that one that cannot be read hides no other.
                let table = ByteRange::new(at, listed.max(at));
                (meta.runs(ctx, table, BATCH), listed, lies_at.is_some())
            };
            if at >= listed {
                note(ByteRange::new(at, end));
                at = end;
                continue;
            }
            let from = at;
            let runs = match runs {
                Ok(runs) => runs,
                // Damage of another kind shows where it is met.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    at = listed;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            for run in runs {
                match run.mapping {
                    Mapping::Data(host) => {
                        // What begins before the end of the file is there, and the rest of its unit is zeros.
                        let there =
                            file_len.saturating_sub(host.0).next_multiple_of(unit).min(run.range.len());
                        let missing = ByteRange::new(run.range.start() + there, run.range.end());
                        if !missing.is_empty() {
                            note(missing);
                        }
                    }
                    Mapping::Compressed(stream) if stream.offset.0 >= image_len => note(run.range),
                    _ => {}
                }
                at = run.range.end();
            }
            if has_table {
                left = left.saturating_sub((at - from) >> ctx.cluster().bits());
            }
        }
        if at < ctx.size() {
            let cut = CutShort { file_len, first: at, missing: 0, complete: false };
            found.get_or_insert(cut).complete = false;
        }
        Ok(found)
    }
}
