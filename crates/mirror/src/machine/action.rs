//! What passes between the core and a worker: actions out, results back.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use crate::scan::CopyExtent;

/// The answer to a worker that asks for work.
#[derive(Debug)]
pub(crate) enum Next {
    /// Perform this and report.
    Do(Action),
    /// Ask again at this time, or as soon as anything was reported or changed.
    Wait(Option<Duration>),
    /// The job is over.
    Finished,
}

/// An operation to perform, and the id to report it under.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Action {
    pub(crate) id: u64,
    pub(crate) work: Work,
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Scan the extents of the range, as much of it as fits one scan.
    Scan {
        range: ByteRange,
        /// Part of the first pass over the disk.
        first_pass: bool,
        /// No write has reached it yet: what was promised of the target still holds.
        untouched: bool,
        /// The last try: blocks of the source that it does not map count as data.
        by_block: bool,
    },
    /// Copy the range from source to target.
    Copy {
        range: ByteRange,
        /// The target reads as zeros there: zeros need not be written.
        target_zero: bool,
        /// The last try: what can be read of the source is copied block by block.
        by_block: bool,
    },
    /// Share the blocks of the source's files that hold the range.
    Clone {
        range: ByteRange,
        /// As of a copy, for what cannot be cloned.
        target_zero: bool,
    },
    /// Make the range zero on the target.
    Zero {
        range: ByteRange,
        /// Only if no zero bytes have to be written for it.
        metadata_only: bool,
    },
    /// Make everything written durable: the last operation before the end, if nothing becomes dirty
    /// meanwhile.
    Flush,
    /// Make durable what was written, while other operations go on.
    PeriodicFlush,
    /// The last step of a job on a tap, for the tap to perform.
    End(Ending),
}

impl Work {
    /// Its bytes of the disk.
    pub(crate) fn range(self) -> ByteRange {
        match self {
            Self::Scan { range, .. }
            | Self::Copy { range, .. }
            | Self::Clone { range, .. }
            | Self::Zero { range, .. } => range,
            Self::Flush | Self::PeriodicFlush | Self::End(_) => ByteRange::default(),
        }
    }

    /// Whether it makes durable what was written before it began.
    pub(crate) fn is_flush(self) -> bool {
        matches!(self, Self::Flush | Self::PeriodicFlush)
    }
}

/// How a job on a tap ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The tap moves to the target.
    Pivot,
    /// The target stays behind as a copy.
    Keep,
    /// The job failed.
    Fail,
}

/// The result of an action that did not fail.
#[derive(Debug)]
pub(crate) enum Done {
    /// The extents cover a prefix of what was asked.
    Scanned(Vec<CopyExtent>),
    /// The same, with the blocks that the source does not map, each with its error. They count as data.
    ScannedInPart(Vec<CopyExtent>, Vec<(ByteRange, block::Error)>),
    /// Copied; the sum is the length of the range.
    Copied(Moved),
    /// Copied but for the blocks that cannot be read from the source, each with its error; the sum is the
    /// rest of the range.
    Salvaged(Moved, Vec<(ByteRange, block::Error)>),
    /// Cloned, a prefix of what was asked.
    Cloned(Cloned),
    /// Made zero.
    Zeroed,
    /// Could not be made zero without writing; nothing was done.
    ZeroUnsupported,
    /// Durable.
    Flushed,
    /// The last step was performed.
    Ended,
    /// It was, and reads are under way at the disk that the tap has left. It is reported once more when they
    /// have ended.
    StillRead,
    /// The job is to end without it, or was to: the log has failed.
    LogNotEnded(Arc<block::Error>),
}

/// What a clone has done: what lies before `end` is cloned, but for `rest`, which has to be copied.
#[derive(Debug, Default)]
pub(crate) struct Cloned {
    pub(crate) end: u64,
    /// In order, neighbours merged.
    pub(crate) rest: Vec<ByteRange>,
    /// The system calls that it took.
    pub(crate) calls: u64,
}

/// Where the bytes of a copy went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) copied: u64,
    pub(crate) zeroed: u64,
    pub(crate) skipped: u64,
    pub(crate) shared: u64,
}
