//! How far a copy or comparison is: the figures, and the objects of `--progress=json` ([`lines`]).
//!
//! Lines for people are the meter's ([`crate::meter`]).

mod lines;
mod object;
mod rate;

use blockmirror_block::size::human_size;
use blockmirror_mirror::Progress;

pub(crate) use lines::Lines;
pub(crate) use object::Object;
pub(crate) use rate::RateWindow;

/// What is being done, of which readings tell how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Copy,
    /// What an interrupted copy has copied is read again.
    Resume,
    Verify,
    Commit,
    Rebase,
    Compare,
    Check,
    Amend,
    Hash,
}

impl Phase {
    /// For programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Resume => "resume",
            Self::Verify => "verify",
            Self::Commit => "commit",
            Self::Rebase => "rebase",
            Self::Compare => "compare",
            Self::Check => "check",
            Self::Amend => "amend",
            Self::Hash => "hash",
        }
    }

    /// What has been done to the bytes, for people.
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::Copy | Self::Commit => "done",
            Self::Resume => "read again",
            Self::Verify => "verified",
            Self::Rebase | Self::Compare => "compared",
            Self::Check => "checked",
            Self::Amend => "amended",
            Self::Hash => "hashed",
        }
    }
}

/// Where something stands, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// What has been copied, shared, zeroed or given up.
    pub(crate) work_done: u64,
    /// What is still to be copied or zeroed, as far as that is known.
    pub(crate) work_left: u64,
    /// QEMU's name of the state of a job.
    pub(crate) state: &'static str,
    /// Of a copy.
    pub(crate) copy: Option<CopyFigures>,
}

/// What became of the bytes that a copy has dealt with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyFigures {
    pub(crate) copied: u64,
    pub(crate) zeroed: u64,
    pub(crate) skipped: u64,
    pub(crate) shared: u64,
    pub(crate) failed: u64,
}

impl Reading {
    /// Where a copy stands. Of the part of the source that the scan has not reached, as much is counted as
    /// left to copy as of the part that it has.
    pub(crate) fn of_copy(progress: &Progress) -> Self {
        let work_done = progress.copied + progress.shared + progress.zeroed + progress.given_up;
        let known = progress.len.saturating_sub(progress.offset).saturating_sub(progress.bulk_left);
        let scanned = progress.len.saturating_sub(progress.bulk_left);
        let share = if scanned == 0 { 1.0 } else { (work_done + known) as f64 / scanned as f64 };
        let work_left = known + (progress.bulk_left as f64 * share.min(1.0)) as u64;
        Self {
            offset: progress.offset,
            len: progress.len,
            work_done,
            work_left,
            state: progress.state.name(),
            copy: Some(CopyFigures {
                copied: progress.copied,
                zeroed: progress.zeroed,
                skipped: progress.skipped,
                shared: progress.shared,
                failed: progress.given_up,
            }),
        }
    }

    /// Where a pass over `len` bytes stands that has come to `offset`.
    pub(crate) fn of_pass(offset: u64, len: u64) -> Self {
        let work_left = len.saturating_sub(offset);
        Self { offset, len, work_done: offset, work_left, state: "running", copy: None }
    }
}

impl Reading {
    /// Where `phase` stands, for a service manager.
    pub(crate) fn status(&self, phase: Phase) -> String {
        let percent = percent(self.work_done, self.work_left);
        format!("{}: {percent}% done, {} left", phase.name(), human_size(self.work_left))
    }

    /// How much of it is behind, from 0 to 1.
    pub(crate) fn share(&self) -> f64 {
        if self.len == 0 { 1.0 } else { self.offset as f64 / self.len as f64 }
    }
}

/// Full parts of a hundred: only what is complete is 100.
pub(crate) fn percent(done: u64, left: u64) -> u64 {
    if left == 0 { 100 } else { (done as f64 / (done as f64 + left as f64) * 100.0) as u64 }
}
