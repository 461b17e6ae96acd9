//! What a job reports while it runs and when it is over: figures, events, the outcome. Plain data.

use std::fmt;
use std::time::Duration;

use blockmirror_block::ByteRange;

use crate::granularity::GranularityChoice;
use crate::options::CopyMode;
use crate::state::JobState;

/// Whether an error policy has stopped the job, and why. Kept from the first error until the job is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
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

/// Whether a job converges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Convergence {
    /// It has not been watched for long enough (a quarter of a second), or stands still: paused, or over.
    Unknown,
    /// Nothing is left but what the guest is writing at this moment.
    Equal,
    /// What is left gets less: [`Progress::eta`] says when it will be nothing.
    Converging,
    /// What is left does not get less: the guest makes work at least as fast as the job does it, or the job
    /// does none.
    NotConverging,
}

/// Figures of a running job, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub struct Progress {
    /// Where the job stands.
    pub state: JobState,
    /// Whether an error stopped it.
    pub io_status: IoStatus,
    /// Bytes dealt with: copied, zeroed, skipped or given up; not what sync top leaves to the target's
    /// backing file. Only grows.
    pub offset: u64,
    /// `offset` and everything left. Grows when the source is written, and shrinks when the first pass finds
    /// what sync top leaves out; equal to `offset` when nothing is left.
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
    /// Nothing is dirty or in flight, and what the guest writes goes to the target at once: source and target
    /// are equal but for the writes under way.
    pub actively_synced: bool,
    /// The copy mode that was asked for.
    pub copy_mode: CopyMode,
    /// Whether the target gets what the guest writes at once, as things are: in write-blocking mode, and at
    /// times in auto mode; not while the job is paused.
    pub writes_through: bool,
    /// Bytes dealt with per second, over the last two seconds.
    pub copy_rate: u64,
    /// Bytes of work that the guest made per second, over the last two seconds: what became dirty behind the
    /// copy.
    pub dirty_rate: u64,
    /// Whether what is left gets less.
    pub convergence: Convergence,
    /// When nothing will be left if both rates stay as they are; `None` unless the job converges.
    #[cfg_attr(feature = "serde", serde(serialize_with = "optional_seconds"))]
    pub eta: Option<Duration>,
    /// The p99 of the delays of the guest's latest writes, where they waited for admission or for the target;
    /// `None` without a latency budget, and if there were too few.
    #[cfg_attr(feature = "serde", serde(serialize_with = "optional_seconds"))]
    pub guest_delay: Option<Duration>,
    /// Time since the start.
    #[cfg_attr(feature = "serde", serde(serialize_with = "seconds"))]
    pub elapsed: Duration,
}

/// Durations are written as seconds, with a fraction.
#[cfg(feature = "serde")]
fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

#[cfg(feature = "serde")]
fn optional_seconds<S: serde::Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => serializer.serialize_some(&duration.as_secs_f64()),
        None => serializer.serialize_none(),
    }
}

/// Why a job in auto mode changed when the target gets what the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "kind"))]
#[non_exhaustive]
pub enum ModeReason {
    /// To write-blocking: the guest makes work as fast as the job does it.
    #[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
    NotConverging {
        /// Bytes left.
        left: u64,
        /// Bytes of work that the guest made per second.
        dirty_rate: u64,
        /// Bytes that the job dealt with per second.
        copy_rate: u64,
    },
    /// To background: writes of the guest wait too long for the target.
    #[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
    TargetStalls {
        /// What one write waited, or what one in a hundred did.
        #[cfg_attr(feature = "serde", serde(serialize_with = "seconds"))]
        delay: Duration,
        /// The bound that this is over.
        #[cfg_attr(feature = "serde", serde(serialize_with = "seconds"))]
        bound: Duration,
    },
}

impl fmt::Display for ModeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConverging { left, dirty_rate, copy_rate } => write!(
                f,
                "{left} bytes are left, {dirty_rate} bytes/s become dirty and {copy_rate} bytes/s are copied"
            ),
            Self::TargetStalls { delay, bound } => {
                write!(f, "the guest waits {delay:?} for the target, more than {bound:?}")
            }
        }
    }
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
    /// A job in auto mode has changed when the target gets what the guest writes.
    CopyMode {
        /// [`CopyMode::WriteBlocking`] or [`CopyMode::Background`].
        mode: CopyMode,
        /// Why, with figures. `Display` gives them in one line.
        reason: ModeReason,
    },
    /// The job has come to another state (`JOB_STATUS_CHANGE`).
    Status(JobState),
    /// The target equals the source and is durable (`BLOCK_JOB_READY`). Follows the status of that name,
    /// once.
    Ready,
    /// The job waits for [`MirrorControl::finalize`](crate::MirrorControl::finalize) (`BLOCK_JOB_PENDING`).
    Pending,
    /// The job has ended by itself or as asked (`BLOCK_JOB_COMPLETED`).
    Completed {
        /// Why it failed, in one line, if it did.
        error: Option<String>,
    },
    /// The job was cancelled (`BLOCK_JOB_CANCELLED`); the target is of no use.
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
    /// What the `ignore` policy left out, in order of offset, neighbours merged. If this is empty the target
    /// equals the source and is durable.
    pub given_up: Vec<GivenUp>,
    /// Time from start to end.
    pub elapsed: Duration,
}
