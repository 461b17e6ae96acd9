//! What a job reports while it runs and when it is over: figures, events, the outcome. Plain data.

use std::time::Duration;

use blockmirror_block::ByteRange;

use crate::granularity::GranularityChoice;
use crate::options::CopyMode;
use crate::state::JobState;

pub use blockmirror_job::{ErrorAction, Event, IoStatus, ModeReason, Operation};

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
    /// Bytes dealt with: copied, shared, zeroed, skipped or given up; not what sync top leaves to the
    /// target's backing file. Only grows.
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
    /// Bytes for which the target shares blocks with the source's files.
    pub shared: u64,
    /// The system calls that this took.
    pub clone_calls: u64,
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

/// A range that could not be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GivenUp {
    /// The bytes of the disk. What the target holds there is unknown.
    pub range: ByteRange,
    /// The last failure in or next to it, in one line.
    pub message: String,
    /// The system's number of that failure, if it has one.
    pub os_error: Option<i32>,
}

/// What a job that did not fail has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum JobEnd {
    /// A copy; there was no tap.
    Copied,
    /// The tap has moved to the target.
    Pivoted,
    /// A copy of one instant; the tap has stayed.
    Kept,
}

/// How a job ended that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// What it has left behind.
    pub ending: JobEnd,
    /// The granularity that was used, and why.
    pub granularity: GranularityChoice,
    /// Bytes written to the target as data.
    pub copied: u64,
    /// Bytes made zero on the target.
    pub zeroed: u64,
    /// Bytes that needed nothing.
    pub skipped: u64,
    /// Bytes for which the target shares blocks with the source's files.
    pub shared: u64,
    /// The system calls that this took.
    pub clone_calls: u64,
    /// What the `ignore` policy left out, in order of offset, neighbours merged. If this is empty the target
    /// equals the source and is durable.
    pub given_up: Vec<GivenUp>,
    /// Where the source did not say what it holds, under the `ignore` policy. It was read there.
    pub unmapped: Vec<GivenUp>,
    /// Time from start to end.
    pub elapsed: Duration,
}
