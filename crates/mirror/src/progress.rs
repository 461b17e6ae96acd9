//! What a job tells while it runs and when it is over: figures, events, the outcome. Plain data.

use std::fmt;
use std::time::Duration;

use blockmirror_block::ByteRange;

use crate::granularity::GranularityChoice;
use crate::state::JobState;

/// Whether an error policy has stopped the job, and why. Kept from the first error until the job is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum IoStatus {
    /// No error has stopped the job.
    #[default]
    Ok,
    /// An operation failed.
    Failed,
    /// Space ran out.
    NoSpace,
}

/// Figures of a running job, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Where the job stands.
    pub state: JobState,
    /// Whether an error stopped it.
    pub io_status: IoStatus,
    /// Bytes dealt with: copied, zeroed, skipped or given up. Only grows.
    pub offset: u64,
    /// `offset` and everything left. Grows when the source is written; equal to `offset` when nothing is left.
    pub len: u64,
    /// Bytes that the first pass has not looked at.
    pub bulk_left: u64,
    /// Bytes marked dirty, those of the first pass included.
    pub dirty_left: u64,
    /// Bytes that were marked dirty since the start.
    pub dirtied: u64,
    /// Bytes in operations under way.
    pub in_flight: u64,
    /// Bytes written to the target as data.
    pub copied: u64,
    /// Bytes made zero on the target.
    pub zeroed: u64,
    /// Bytes that needed nothing: they read as zeros on the target already, or are left to its backing file.
    pub skipped: u64,
    /// Bytes given up after repeated failures.
    pub given_up: u64,
    /// Bytes that the guest wrote to source and target at once (write-blocking mode).
    pub mirrored: u64,
    /// Nothing is dirty or in flight, and what the guest writes goes to the target at once: source and target are equal
    /// but for the writes under way.
    pub actively_synced: bool,
    /// Time since the start.
    pub elapsed: Duration,
}

/// The side of a job that an operation belongs to, in the words of `BLOCK_JOB_ERROR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Anything asked of the source.
    Read,
    /// Anything asked of the target, flushes included.
    Write,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// What the policy made of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The range is tried again later.
    Ignore,
    /// The job pauses.
    Stop,
    /// The range was tried too often: the job goes on without it and lists it at the end.
    GiveUp,
}

impl fmt::Display for ErrorAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::GiveUp => "give up",
        })
    }
}

/// Something that happened in a job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An operation failed.
    Error {
        /// On which side.
        operation: Operation,
        /// What happens now.
        action: ErrorAction,
        /// The bytes of the disk that it was about; empty for a flush.
        range: ByteRange,
        /// The failure in one line, with operation, file and offset.
        message: String,
    },
    /// The job has come to another state (`JOB_STATUS_CHANGE`).
    Status(JobState),
    /// The target equals the source and is durable (`BLOCK_JOB_READY`). Follows the status of that name, once.
    Ready,
    /// The job waits for [`MirrorControl::finalize`](crate::MirrorControl::finalize) (`BLOCK_JOB_PENDING`).
    Pending,
    /// The job has ended by itself or as asked (`BLOCK_JOB_COMPLETED`).
    Completed {
        /// Why it failed, in one line, if it did.
        error: Option<String>,
    },
    /// The job was given up on request (`BLOCK_JOB_CANCELLED`); the target is of no use.
    Cancelled,
}

/// A range that could not be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// The bytes of the disk. What the target holds there is unknown.
    pub range: ByteRange,
    /// The last failure in or next to it, in one line.
    pub message: String,
}

/// How a job ended that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The granularity that was used, and why.
    pub granularity: GranularityChoice,
    /// Bytes written to the target as data.
    pub copied: u64,
    /// Bytes made zero on the target.
    pub zeroed: u64,
    /// Bytes that needed nothing.
    pub skipped: u64,
    /// What the `ignore` policy left out, in order of offset, neighbours merged. If this is empty the target equals
    /// the source and is durable.
    pub given_up: Vec<GivenUp>,
    /// Time from start to end.
    pub elapsed: Duration,
}
