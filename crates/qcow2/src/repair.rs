//! Repairing an image: what [`check`](crate::check()) finds is mended as far as that loses nothing.
//!
//! [`repair`] is called by `image`, on a storage that nothing else has open, and by a writable open of an
//! image that is marked dirty (`at_open`). It writes in this order, with a
//! flush at each arrow, so that a repair that was cut short leaves the image no worse and can be repeated:
//!
//! ```text
//!   the snapshot table  -->  entries that no reader takes otherwise
//!     -->  refcounts in place, or new refcount structures (rebuild): where those that there are cannot be
//!          used, or call a cluster free that is in use
//!     -->  (rebuild) the header points at them  -->  COPIED flags, tables out of clusters with guest data
//!          and of each other, refcounts in place (separate: if there are such tables)
//!     -->  COPIED flags  -->  dirty and corrupt bits cleared
//! ```
//!
//! What must hold: while a table is missing no cluster is freed and no entry changed, as what the missing one
//! maps is not known; while guest data or a table lies past the end of the file, the file is not made longer;
//! while bitmaps are damaged but not stale no cluster is freed; no guest byte that could be read before reads
//! differently after.

mod at_open;
mod rebuild;
mod refcounts;
mod separate;
mod snapshots;

use std::ops::Range;

pub(crate) use at_open::repair_dirty;

use blockmirror_block::{ErrorKind, Storage};

use crate::check::{CheckObserver, CheckReport, Checker, Counts, Reporting};
use crate::error::{Error, Result};
use crate::format::feature;

/// Where a version 3 header has its features.
const HEADER_INCOMPATIBLE: u64 = 72;
const HEADER_AUTOCLEAR: u64 = 88;

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// Refcounts that are too high; and COPIED flags, if nothing else is wrong.
    Leaks,
    /// Everything that can be repaired without a loss.
    All,
}

/// Checks the image in `storage`, repairs it and checks it once more. The observer sees the findings of the
/// first check, where COPIED flags are held against the refcounts as the repair leaves them; the figures are
/// those of the last one, and how many of the first are gone. Autoclear features that are not known are
/// cleared.
///
/// The image may be marked dirty or corrupt; if no corruption is left it is neither afterwards.
///
/// # Bounds
/// At most 22 times the requests and bytes of a [`check`](crate::check()) of the file as the repair leaves
/// it. The file grows by 2¼ times its length and 1 MiB, at most: where each of its clusters is an L2 table
/// and the L1 table takes all of it, both are copied, and counted in refcounts that are made anew.
///
/// # Errors
/// As for [`check`](crate::check()), and what writing fails with. The repair can be repeated then.
pub fn repair(storage: &dyn Storage, what: Repair, observer: &mut dyn CheckObserver) -> Result<CheckReport> {
    // What an earlier repair has written, and not flushed, looks sound.
    storage.flush()?;
    let mut before = examine(storage, observer, Reporting::Aloud)?;
    clear_unknown_autoclear(storage, observer)?;
    let (first, copied_in_doubt) = (before.report, before.copied_in_doubt);
    let mut report = first;
    if !first.is_clean() || copied_in_doubt {
        if what == Repair::All {
            give_up_bitmaps(storage, observer, &before)?;
            if snapshots::fix_table(storage, observer)? {
                before = examine(storage, observer, Reporting::Silent)?;
            }
            fix_entries(storage, observer, before)?;
        }
        fix_refcounts(storage, what, 0..0, observer)?;
        let mut copied_wrong = 0;
        if what == Repair::All {
            copied_wrong = separate::separate_tables(storage, observer)?;
        }
        // By the refcounts as they are now: a flag that agrees with what was set right was never wrong.
        copied_wrong += fix_copied(storage, what, observer)?;
        let mut checker = Checker::open(storage, observer, Reporting::Silent)?;
        checker.check()?;
        report = checker.report;
        report.corruptions_fixed = (first.corruptions + copied_wrong).saturating_sub(report.corruptions);
        report.leaks_fixed = first.leaks.saturating_sub(report.leaks);
    }
    if report.corruptions == 0 && report.check_errors == 0 {
        clear_marks(storage, observer)?;
    }
    Ok(report)
}

/// What a check has found out that a repair needs.
struct Examined {
    report: CheckReport,
    counts: Counts,
    bad_entries: u64,
    bitmaps_damaged: bool,
    tables_missing: bool,
    copied_in_doubt: bool,
}

fn examine(
    storage: &dyn Storage,
    observer: &mut dyn CheckObserver,
    reporting: Reporting,
) -> Result<Examined> {
    let mut checker = Checker::open(storage, observer, reporting)?;
    checker.check_refcounts()?;
    Ok(Examined {
        report: checker.report,
        counts: checker.counts,
        bad_entries: checker.bad_entries,
        bitmaps_damaged: checker.bitmaps_damaged,
        tables_missing: checker.tables_missing,
        copied_in_doubt: checker.copied_in_doubt,
    })
}

/// Gives up bitmaps that cannot be read. What they lack must not be taken for them where the file grows.
fn give_up_bitmaps(storage: &dyn Storage, observer: &mut dyn CheckObserver, found: &Examined) -> Result<()> {
    if found.bitmaps_damaged {
        let header = Checker::open(storage, observer, Reporting::Silent)?.header;
        // Readers then take all bitmaps for stale.
        write_word(storage, HEADER_AUTOCLEAR, header.autoclear & !feature::AUTOCLEAR_BITMAPS)?;
    }
    Ok(())
}

/// Corrects entries of tables.
fn fix_entries(storage: &dyn Storage, observer: &mut dyn CheckObserver, found: Examined) -> Result<()> {
    // What looks like a table may be anything while one is missing, guest data that it maps as well.
    if found.bad_entries > 0 && !found.tables_missing {
        let mut checker = Checker::open(storage, observer, Reporting::Silent)?;
        checker.fix_entries(found.counts)?;
        storage.flush()?;
    }
    Ok(())
}

/// Sets refcounts right. Those of the clusters `reserved`, which are not in use yet, become one.
///
/// As with QEMU all are written anew where a cluster in use has the refcount 0. They could be set right where
/// they are, too, and are where the new ones have no room. A file that was cut short is not made longer: new
/// refcounts would lie where entries map what is missing. There the old ones stay if they cannot be used.
fn fix_refcounts(
    storage: &dyn Storage,
    what: Repair,
    reserved: Range<u64>,
    observer: &mut dyn CheckObserver,
) -> Result<()> {
    let mut checker = Checker::open(storage, &mut *observer, Reporting::Silent)?;
    checker.check()?;
    checker.counts.reserve(reserved.clone());
    let damaged = checker.refcounts_damaged || !checker.has_all_blocks();
    let grows = !storage.info().fixed_len;
    let anew = damaged || checker.used_as_free && grows && !checker.lacks_data;
    match what {
        Repair::Leaks if damaged => return Ok(()),
        Repair::All if damaged && grows && checker.lacks_data => return Ok(()),
        Repair::All if anew => match rebuild_refcounts(storage, reserved.clone(), &mut *observer) {
            Err(Error::Storage(error)) if !damaged && error.kind() == ErrorKind::NoSpace => {
                let mut checker = Checker::open(storage, observer, Reporting::Silent)?;
                checker.check()?;
                checker.counts.reserve(reserved);
                checker.set_refcounts(true)?;
            }
            written => written?,
        },
        what => checker.set_refcounts(what == Repair::All)?,
    }
    Ok(storage.flush()?)
}

/// Writes new refcount structures. What the old ones refer to does not count: they go.
fn rebuild_refcounts(
    storage: &dyn Storage,
    reserved: Range<u64>,
    observer: &mut dyn CheckObserver,
) -> Result<()> {
    let mut guest = Checker::open(storage, observer, Reporting::Silent)?;
    guest.count_guest()?;
    guest.counts.reserve(reserved);
    guest.rebuild_refcounts()
}

/// Sets COPIED flags right, if nothing else is wrong or everything is to be; returns how many were wrong.
fn fix_copied(storage: &dyn Storage, what: Repair, observer: &mut dyn CheckObserver) -> Result<u64> {
    let mut checker = Checker::open(storage, observer, Reporting::Silent)?;
    checker.check_refcounts()?;
    let others = checker.report;
    let may_change = !checker.tables_missing && (what == Repair::All || others.is_clean());
    checker.settle_copied(may_change)?;
    let wrong = checker.report.corruptions - others.corruptions;
    if wrong > 0 && may_change {
        storage.flush()?;
    }
    Ok(wrong)
}

/// Clears the autoclear features that this writer does not know: it would make stale what they stand for.
fn clear_unknown_autoclear(storage: &dyn Storage, observer: &mut dyn CheckObserver) -> Result<()> {
    let header = Checker::open(storage, observer, Reporting::Silent)?.header;
    let kept = header.autoclear_when_written();
    if kept == header.autoclear {
        return Ok(());
    }
    write_word(storage, HEADER_AUTOCLEAR, kept)
}

/// Clears the marks of an image that was not closed, or in which damage was met.
fn clear_marks(storage: &dyn Storage, observer: &mut dyn CheckObserver) -> Result<()> {
    let header = Checker::open(storage, observer, Reporting::Silent)?.header;
    let marks = feature::INCOMPATIBLE_DIRTY | feature::INCOMPATIBLE_CORRUPT;
    if header.incompatible & marks != 0 {
        write_word(storage, HEADER_INCOMPATIBLE, header.incompatible & !marks)?;
    }
    Ok(())
}

/// Writes a word of the header, durably.
fn write_word(storage: &dyn Storage, at: u64, value: u64) -> Result<()> {
    storage.write_at(&value.to_be_bytes(), at)?;
    Ok(storage.flush()?)
}
