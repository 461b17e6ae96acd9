//! Checking an image: every reference to every cluster is counted and held against the refcounts.
//!
//! [`check`] is called by `image`, and by `repair` before and after its work. It does not open the image: it
//! reads what is there, by the parsers of [`mod@crate::format`], and goes on past damage. What must hold:
//! memory and reads are bounded by the length of the file, whatever the image says of itself. Each table is
//! read once and counted as often as it is used (`spans`); counts are kept in pages (`counts`).
//!
//! ```text
//!   header, snapshots, bitmaps --> L1 spans --> L2 tables, in order of the file --> counts
//!   refcount table, blocks     ------------------------------------------------->  counts
//!                                                counts | refcounts on disk --> findings
//!                                  active L1, L2 | refcounts on disk        --> COPIED flags
//! ```

mod compare;
mod copied;
mod counts;
mod directories;
mod disk;
mod open;
mod refcounts;
mod report;
mod shared;
mod spans;
mod tables;

use std::fmt;

use blockmirror_block::{Error as BlockError, ErrorKind, Storage, Visit};

pub(crate) use self::counts::Counts;
pub(crate) use self::disk::{Block, DiskCounts};
pub use self::report::{CheckReport, Finding, Mending, Severity, Structure};
pub(crate) use self::shared::TableToMove;
use self::spans::Use;
use self::tables::TableRef;
use crate::error::Result;
use crate::format::entry::EntryFormat;
use crate::format::header::Header;

/// What a check reports while it goes on.
pub trait CheckObserver {
    /// Something is wrong, `times` times.
    fn found(&mut self, finding: &Finding, times: u64) {
        let _ = (finding, times);
    }

    /// A repair is about to write `mending`.
    fn mending(&mut self, mending: &Mending) {
        let _ = mending;
    }

    /// `done` of about `total` bytes of metadata were read. The check ends with [`ErrorKind::Cancelled`] if
    /// the answer is to break.
    fn progress(&mut self, done: u64, total: u64) -> Visit {
        let _ = (done, total);
        Visit::Continue(())
    }
}

/// Observes nothing.
impl CheckObserver for () {}

/// Checks the image in `storage`. Nothing is written. An external data file is not looked at.
///
/// # Bounds
/// For a file of `n` clusters, and `d` snapshots and bitmaps (each is an entry that lies in the file, and
/// there are at most 65536 of either):
///
/// - at most `16 + 8 n + 4 d` reads. A read is at most 1 MiB, one cluster, or the refcount table, of which at
///   most 8 MiB are read. Together they read at most 14 times the file, and 64 KiB.
/// - at most `160 n` bytes of memory, those of the bitmap directory (64 MiB at most), and 64 MiB beside that.
///   Of a sound image it is some 2 bytes for each cluster of the file and 24 for each L2 table.
///
/// Neither depends on what the header and the tables say.
///
/// # Errors
/// The header makes no sense, but for where the refcount table lies; the storage fails; the observer breaks.
pub fn check(storage: &dyn Storage, observer: &mut dyn CheckObserver) -> Result<CheckReport> {
    let mut checker = Checker::open(storage, observer, Reporting::Aloud)?;
    checker.check()?;
    Ok(checker.report)
}

/// Whether findings go to the observer. Progress it always sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reporting {
    Aloud,
    Silent,
}

/// A check under way.
pub(crate) struct Checker<'a> {
    pub(crate) storage: &'a dyn Storage,
    observer: &'a mut dyn CheckObserver,
    reporting: Reporting,
    pub(crate) header: Header,
    format: EntryFormat,
    file_len: u64,
    /// References, as they are counted.
    pub(crate) counts: Counts,
    /// Refcounts on disk.
    pub(crate) disk: DiskCounts,
    /// L2 tables, in order of the file.
    tables: Vec<TableRef>,
    /// The clusters of the L1 tables and of the snapshot table.
    table_clusters: Vec<Use>,
    pub(crate) report: CheckReport,
    /// What earlier counting has found, if entries that are wrong are to be corrected: an entry is changed
    /// only in a cluster that nothing else uses.
    fixing: Option<Counts>,
    /// Findings that correcting entries would remove.
    pub(crate) bad_entries: u64,
    /// The refcount table or blocks are damaged: they can only be made anew.
    pub(crate) refcounts_damaged: bool,
    /// A cluster that is in use has the refcount 0.
    pub(crate) used_as_free: bool,
    /// Bitmaps, or their directory, are damaged.
    pub(crate) bitmaps_damaged: bool,
    /// A table could not be read, so that what it uses is not known.
    pub(crate) tables_missing: bool,
    /// Guest data or a table lies past the end of the file: whatever makes the file longer hides that.
    pub(crate) lacks_data: bool,
    /// A COPIED flag may be wrong.
    pub(crate) copied_in_doubt: bool,
    done: u64,
    total: u64,
}

impl fmt::Debug for Checker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checker").field("storage", &self.storage).field("report", &self.report).finish()
    }
}

impl Checker<'_> {
    /// The whole check.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.check_refcounts()?;
        if self.copied_in_doubt {
            self.check_copied(false)?;
        }
        Ok(())
    }

    /// The check but for COPIED flags.
    pub(crate) fn check_refcounts(&mut self) -> Result<()> {
        self.count_guest()?;
        self.count_refcounts()?;
        self.compare()?;
        self.check_shared()
    }

    /// Looks at the COPIED flags if one of them may be wrong, and reports what it finds; with `fix` sets
    /// right what is. Everything else was checked.
    pub(crate) fn settle_copied(&mut self, fix: bool) -> Result<()> {
        self.reporting = Reporting::Aloud;
        if self.copied_in_doubt { self.check_copied(fix) } else { Ok(()) }
    }

    /// Says what is about to be written.
    pub(crate) fn mending(&mut self, mending: &Mending) {
        self.observer.mending(mending);
    }

    /// Counts everything but the refcounts themselves.
    pub(crate) fn count_guest(&mut self) -> Result<()> {
        self.count_range(Structure::Header, 0, self.cluster_size(), 1, 0);
        self.count_tables()
    }

    /// The same, and corrects entries that are wrong, where `counted` says that nothing else is in their
    /// place. No table is missing.
    pub(crate) fn fix_entries(&mut self, counted: Counts) -> Result<()> {
        self.fixing = Some(counted);
        let result = self.count_guest();
        self.fixing = None;
        result
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        self.format.cluster.bytes()
    }

    /// Clusters of the file; the last may be cut.
    pub(crate) fn file_clusters(&self) -> u64 {
        self.format.cluster.count(self.file_len)
    }

    /// Whether all that uses clusters was counted, so that the others are free.
    pub(crate) fn may_free(&self) -> bool {
        !self.tables_missing && !self.bitmaps_damaged
    }

    /// Reports `finding`, which stands for `times` of its kind.
    fn find(&mut self, finding: &Finding, times: u64) {
        if times == 0 {
            return;
        }
        if let Finding::PastEnd { structure, .. } = finding {
            use Structure::{CompressedData, Data, L1Table, L2Table};
            self.lacks_data |= matches!(structure, L1Table | L2Table | Data | CompressedData);
        }
        match finding.severity() {
            Severity::Corruption => self.report.corruptions += times,
            Severity::Leak => self.report.leaks += times,
            Severity::CheckError => self.report.check_errors += times,
        }
        if self.reporting == Reporting::Aloud {
            self.observer.found(finding, times);
        }
    }

    /// Before `bytes` of metadata are read.
    pub(crate) fn step(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.total = self.total.max(self.done);
        if self.observer.progress(self.done, self.total).is_continue() {
            return Ok(());
        }
        Err(BlockError::new(ErrorKind::Cancelled, "check").in_file(self.storage.name()).into())
    }

    /// Counts `uses` references, each with `flags`, to what lies in `len` bytes at `offset`. The file may end
    /// inside the last cluster; whether it does not end before that.
    fn count_range(&mut self, structure: Structure, offset: u64, len: u64, uses: u64, flags: u8) -> bool {
        if len == 0 || uses == 0 {
            return true;
        }
        let end = offset.saturating_add(len);
        if end.saturating_sub(self.file_len) >= self.cluster_size() {
            self.find(&Finding::PastEnd { structure, offset, len }, uses);
            self.copied_in_doubt = true;
            return false;
        }
        let bits = self.format.cluster.bits();
        for cluster in offset >> bits..=(end - 1) >> bits {
            let lost = self.counts.add(cluster, uses, flags);
            self.copied_in_doubt |= lost > 0;
            self.find(&Finding::RefcountOverflow { cluster }, lost);
        }
        true
    }
}
