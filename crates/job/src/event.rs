//! What happens in a job, as its user hears of it: events, and the words in them. Plain data.
//!
//! One list serves all jobs, as in QEMU's `JOB_*` and `BLOCK_JOB_*` events; only a mirror changes its copy
//! mode.

use std::fmt;
use std::time::Duration;

use blockmirror_block::ByteRange;

use crate::state::JobState;

/// Something that happened in a job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
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
    /// The job waits for [`Verb::Finalize`](crate::Verb::Finalize) (`BLOCK_JOB_PENDING`).
    Pending,
    /// The job has ended by itself or as asked (`BLOCK_JOB_COMPLETED`).
    Completed {
        /// Why it failed, in one line, if it did.
        error: Option<String>,
    },
    /// The job was given up on request (`BLOCK_JOB_CANCELLED`); the target is of no use.
    Cancelled,
}

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

/// The side of a job that an operation belongs to, in the words of `BLOCK_JOB_ERROR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
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
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
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

/// When the target gets what the guest writes while a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum CopyMode {
    /// Later: the write goes to the source and its range is copied when its turn comes.
    #[default]
    Background,
    /// At once: the guest's write ends when source and target have it. The job converges whatever the guest
    /// does.
    WriteBlocking,
    /// Whichever serves: background for the bulk; write-blocking once the guest makes work as fast as the job
    /// does it, so that the job becomes ready whatever the guest does; background again when the target keeps
    /// the guest waiting. Each change emits [`Event::CopyMode`](crate::Event::CopyMode).
    Auto,
}

impl CopyMode {
    /// The wire name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
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

/// Durations are written as seconds, with a fraction.
#[cfg(feature = "serde")]
fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}
