//! Writes the snapshot table anew, if it has entries that are not complete or that nothing can be made of.
//!
//! Entries that the file does not hold, and those behind them, are lost: where they would start is not known.
//! So are those that the longest table has no room for.
//! The refcounts of the new place come first, then the table, then the header that points at it.

use blockmirror_block::Storage;

use super::{Repair, fix_refcounts};
use crate::check::{CheckObserver, Checker, Reporting};
use crate::error::Result;
use crate::format::snapshot::KeptEntry;
use crate::limits::MAX_SNAPSHOT_TABLE_BYTES;

/// Where the header has the number of snapshots, and after it the offset of their table.
const HEADER_SNAPSHOTS: u64 = 60;

/// Whether the table was wrong, and was written anew.
pub(super) fn fix_table(storage: &dyn Storage, observer: &mut dyn CheckObserver) -> Result<bool> {
    let mut checker = Checker::open(storage, &mut *observer, Reporting::Silent)?;
    let header = checker.header.clone();
    if header.snapshot_count == 0 {
        return Ok(false);
    }
    let Some((count, table)) = kept(storage, &checker)? else { return Ok(false) };
    checker.check()?;
    if checker.lacks_data {
        // It would lie where something is missing.
        return Ok(false);
    }
    let mut place = [0; 12];
    if count > 0 {
        if storage.info().fixed_len {
            return Ok(false);
        }
        let first = checker.file_clusters().max(checker.counts.end());
        let size = checker.cluster_size();
        let clusters = (table.len() as u64).div_ceil(size);
        fix_refcounts(storage, Repair::All, first..first + clusters, observer)?;
        storage.write_at(&table, first * size)?;
        storage.flush()?;
        place[..4].copy_from_slice(&count.to_be_bytes());
        place[4..].copy_from_slice(&(first * size).to_be_bytes());
    }
    storage.write_at(&place, HEADER_SNAPSHOTS)?;
    storage.flush()?;
    Ok(true)
}

/// The entries that stay, and their number; `None` if the table is as it should be.
fn kept(storage: &dyn Storage, checker: &Checker<'_>) -> Result<Option<(u32, Vec<u8>)>> {
    let header = &checker.header;
    let file_len = storage.len()?;
    let (mut at, mut count, mut table, mut changed) = (header.snapshots_offset, 0, Vec::new(), false);
    for _ in 0..header.snapshot_count {
        let is_complete = header.version >= 3;
        let entry = KeptEntry::read(storage, at, file_len, is_complete, header.virtual_size)?;
        let has_room = |entry: &KeptEntry| {
            let len = entry.bytes.as_ref().map_or(0, Vec::len);
            (table.len() + len) as u64 <= MAX_SNAPSHOT_TABLE_BYTES
        };
        let Some(entry) = entry.filter(has_room) else {
            changed = true;
            break;
        };
        (at, changed) = (entry.end, changed | entry.changed);
        if let Some(bytes) = entry.bytes {
            count += 1;
            table.extend(bytes);
            table.resize(table.len().next_multiple_of(8), 0);
        }
    }
    Ok(changed.then_some((count, table)))
}
