//! Whether an image file, or its data file, was cut short: an interrupted download, a copy onto a full disk.
//!
//! `info` asks. Reads find out for themselves ([`crate::io`]).

use std::sync::Arc;

use blockmirror_block::{ByteRange, Storage};

use crate::error::Result;
use crate::format::header::Header;
use crate::format::refcount::RefcountWidth;
use crate::image::{OpenOptions, Qcow2};
use crate::limits::MAX_REFCOUNT_TABLE_BYTES;
use crate::meta::Mapping;

/// Runs of the mapping that are looked at in one go.
const BATCH: usize = 1024;

/// What a file that was cut short lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct CutShort {
    /// Bytes of the file.
    pub file_len: u64,
    /// The first guest byte whose data, or whose table, is missing.
    pub first: u64,
    /// Guest bytes that are missing.
    pub missing: u64,
}

impl CutShort {
    /// Looks whether `storage`, an image with `header` and without a data file, was cut short; `None` if it is whole.
    ///
    /// Reads one refcount block of a whole image. Only where the refcounts reach past the end of the file the tables are read.
    ///
    /// # Errors
    /// The storage fails.
    pub fn find(storage: Arc<dyn Storage>, header: &Header) -> Result<Option<Self>> {
        if header.data_file.is_some() || !counts_reach_past_end(&*storage, header)? {
            return Ok(None);
        }
        let file_len = storage.len()?;
        match OpenOptions::new().open(storage) {
            Ok(image) => image.cut_short(),
            // Not even the L1 table is there.
            Err(_) => Ok(Some(Self { file_len, first: 0, missing: header.virtual_size })),
        }
    }
}

/// Whether the last cluster with a refcount, or its last subcluster, begins at or past the end of the file.
fn counts_reach_past_end(storage: &dyn Storage, header: &Header) -> Result<bool> {
    let len = storage.len()?;
    let cluster = header.cluster_size();
    let table_bytes = (u64::from(header.refcount_table_clusters) * cluster).min(MAX_REFCOUNT_TABLE_BYTES);
    // At most 8 MiB. What the file does not hold reads as zeros.
    let mut table = vec![0; table_bytes.min(len.saturating_sub(header.refcount_table_offset)) as usize];
    storage.read_at(&mut table, header.refcount_table_offset)?;
    let Some(width) = RefcountWidth::from_order(header.refcount_order) else { return Ok(false) };
    let per_block = width.entries(cluster);
    // At most 2 MiB.
    let mut block = vec![0; cluster as usize];
    for (index, entry) in table.as_chunks::<8>().0.iter().enumerate().rev() {
        let at = u64::from_be_bytes(*entry) & !511;
        if at == 0 {
            continue;
        }
        if at >= len {
            return Ok(true);
        }
        storage.read_at(&mut block, at)?;
        // Entries of a block, at most 2^24.
        let last = (0..per_block as usize).rev().find(|i| width.get(&block, *i) > 0);
        if let Some(last) = last {
            let host = (index as u64 * per_block + last as u64).saturating_mul(cluster);
            let last_unit = if header.extended_l2 { cluster - cluster / 32 } else { 0 };
            return Ok(host.saturating_add(last_unit) >= len);
        }
    }
    Ok(false)
}

impl Qcow2 {
    /// Looks through the whole mapping for data, and tables, past the end of the file that should hold them.
    fn cut_short(&self) -> Result<Option<CutShort>> {
        let file_len = self.io.data().len()?;
        let unit = self.io.format.subcluster_size();
        let table_bytes = self.io.l2_entries() << self.io.cluster().bits();
        let mut found: Option<CutShort> = None;
        let mut note = |range: ByteRange| {
            let cut = found.get_or_insert(CutShort { file_len, first: range.start(), missing: 0 });
            cut.missing += range.len();
        };
        let mut at = 0;
        while at < self.io.size() {
            // A look does not go past a table, so that one that cannot be read hides no other.
            let table =
                ByteRange::new(at, (at / table_bytes + 1).saturating_mul(table_bytes).min(self.io.size()));
            let runs = self.meta.lock().runs(&self.io, table, BATCH);
            let Ok(runs) = runs else {
                note(table);
                at = table.end();
                continue;
            };
            for run in runs {
                if let Mapping::Data(host) = run.mapping {
                    // What begins before the end of the file is there, and the rest of its unit is zeros.
                    let there = file_len.saturating_sub(host.0).next_multiple_of(unit).min(run.range.len());
                    let missing = ByteRange::new(run.range.start() + there, run.range.end());
                    if !missing.is_empty() {
                        note(missing);
                    }
                }
                at = run.range.end();
            }
        }
        Ok(found)
    }
}
