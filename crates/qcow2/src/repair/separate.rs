//! Moves the active L1 table and L2 tables out of clusters that a guest cluster is mapped to as well, or
//! another table lies in; and gives each of several L1 entries that point at one L2 table a copy of it.
//!
//! Where a table and guest data lie in one cluster, a change of the table would change what the guest reads;
//! so it would with two tables in one, and two entries on one. The order is that of a copy-on-write:
//! refcounts of the new places, COPIED flags, copies, then what points at them; the refcounts of the old
//! places are lowered last. Until then the image is not opened for writing; from the first entry that points
//! at a copy it may be, so that no flag may call a cluster owned that two tables map.
//!
//! Storage of a fixed length has no room for copies: there the tables stay, and so do flags in them that are
//! wrong.

use blockmirror_block::Storage;
use byteorder::{BigEndian, ByteOrder};

use super::{Repair, fix_refcounts};
use crate::check::{CheckObserver, Checker, Reporting, TableToMove};
use crate::error::Result;
use crate::format::entry::L1Entry;
use crate::offset::HostOffset;

/// Where the header has the offset of the L1 table.
const HEADER_L1_OFFSET: u64 = 40;

/// Returns how many COPIED flags were wrong.
pub(super) fn separate_tables(storage: &dyn Storage, observer: &mut dyn CheckObserver) -> Result<u64> {
    let mut checker = Checker::open(storage, &mut *observer, Reporting::Silent)?;
    checker.check()?;
    if checker.tables_missing || checker.lacks_data {
        // What looks like a table may be anything; and copies would lie where something is missing.
        return Ok(0);
    }
    let (tables, l1_shared) = checker.shared_tables();
    let (size, header) = (checker.cluster_size(), checker.header.clone());
    let first = checker.file_clusters().max(checker.counts.end());
    if (tables.is_empty() && !l1_shared) || storage.info().fixed_len {
        return Ok(0);
    }
    let l1_clusters = if l1_shared { (u64::from(header.l1_entries) * 8).div_ceil(size) } else { 0 };
    // At most the clusters of the file.
    let new_l1 = first + tables.iter().map(|table| table.copies).sum::<u64>();
    fix_refcounts(storage, Repair::All, first..new_l1 + l1_clusters, &mut *observer)?;
    let mut checker = Checker::open(storage, &mut *observer, Reporting::Silent)?;
    let wrong = settle_flags(&mut checker)?;
    // At most 2 MiB.
    let mut buf = vec![0; size as usize];
    let mut next = first;
    let mut moves = Vec::with_capacity(tables.len());
    for TableToMove { at, copies } in tables {
        storage.read_at(&mut buf, at)?;
        checker.set_l2_flags(&mut buf, at)?;
        let places = next..next + copies;
        places.clone().try_for_each(|place| storage.write_at(&buf, place * size))?;
        next = places.end;
        moves.push((at, places));
    }
    storage.flush()?;
    let mut new_place = |table: u64| {
        let index = moves.binary_search_by_key(&table, |(at, _)| *at).ok()?;
        Some(L1Entry::owned(HostOffset(moves[index].1.next()? * size)))
    };
    move_l1(&mut checker, l1_shared.then_some(new_l1 * size), &mut new_place)?;
    fix_refcounts(storage, Repair::All, 0..0, observer)?;
    Ok(wrong)
}

/// Sets COPIED flags right where they are, durably; returns how many were wrong.
fn settle_flags(checker: &mut Checker<'_>) -> Result<u64> {
    checker.check_refcounts()?;
    let others = checker.report.corruptions;
    checker.settle_copied(true)?;
    checker.storage.flush()?;
    Ok(checker.report.corruptions - others)
}

/// Has entries of the L1 table, in order, point at the new places that there are for their L2 tables, and
/// moves it to `to` if that is given. Flags of other entries are right in the new place.
fn move_l1(
    checker: &mut Checker<'_>,
    to: Option<u64>,
    new_place: &mut dyn FnMut(u64) -> Option<L1Entry>,
) -> Result<()> {
    let (storage, header) = (checker.storage, checker.header.clone());
    // At most 32 MiB, by the cap on the header.
    let mut l1 = vec![0; header.l1_entries as usize * 8];
    storage.read_at(&mut l1, header.l1_offset)?;
    for (index, entry) in l1.chunks_exact_mut(8).enumerate() {
        let table = L1Entry(BigEndian::read_u64(entry)).table();
        let moved = table.and_then(|table| new_place(table.0));
        let new = match moved {
            Some(new) => new,
            None => checker.right_l1_entry(index as u64, L1Entry(BigEndian::read_u64(entry)))?,
        };
        BigEndian::write_u64(entry, new.0);
        if to.is_none() && moved.is_some() {
            storage.write_at(entry, header.l1_offset + index as u64 * 8)?;
        }
    }
    if let Some(to) = to {
        storage.write_at(&l1, to)?;
        storage.flush()?;
        storage.write_at(&to.to_be_bytes(), HEADER_L1_OFFSET)?;
    }
    Ok(storage.flush()?)
}
