//! The mirror job: copies one disk onto another in the unit that fits the target.
//!
//! Any [`BlockDevice`](blockmirror_block::BlockDevice) can be source or target; this crate knows no format
//! and no file.
//!
//! - [`GranularityChoice`] says how many bytes one bit of the dirty bitmap stands for, and why.
//! - [`MirrorOptions`] is what a caller can ask for.
//! - [`plan()`] says what a job would do, without doing it; [`plan_until`] can be stopped.
//! - [`Tap`] stands in front of a disk that is written while it is copied; [`GuestQueue`] is a caller of it
//!   that never waits.
//! - [`MirrorJob`] does it, on threads of its own; [`MirrorControl`] controls and observes it.
//! - [`MirrorGroup`] does it to several disks that end at one instant.
//!
//! ```text
//!      writes of the guest
//!             |
//!            Tap ------ marks -----> dirty bitmap
//!             |                          |
//!             v                          v
//!          source ---- is read by ---> MirrorJob ---- writes to ---> target
//!                                        |
//!                         ready, then complete: the tap moves to the target
//! ```
//!
//! ```
//! use std::sync::Arc;
//! use blockmirror_block::{BlockDevice, WriteFlags, testing::MemoryDisk};
//! use blockmirror_mirror::{Event, MirrorJob, MirrorOptions, Tap};
//!
//! let tap = Tap::new(Arc::new(MemoryDisk::new(1 << 20)));
//! let target = Arc::new(MemoryDisk::new(1 << 20));
//! let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new())?;
//! tap.write_at(b"while it runs", 4096, WriteFlags::NONE)?;
//! while job.control().next_event(None) != Some(Event::Ready) {}
//! job.control().complete()?;
//! job.wait()?;
//! assert_eq!(&target.contents()?[4096..][..13], b"while it runs");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod batch;
mod checkpoint;
mod cow_target;
mod distinct;
mod engine;
mod error;
mod granularity;
mod group;
mod job;
mod machine;
mod mover;
mod notify;
mod options;
mod plan;
mod progress;
mod range_map;
mod range_set;
mod reflink;
mod region_log;
mod scan;
#[cfg(any(test, feature = "simulate"))]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a schedule that cannot go on is a finding")]
mod sim;
mod state;
mod tap;
mod wakers;

/// For development: the simulator, which runs the core of real jobs on a virtual clock.
///
/// ```
/// use blockmirror_mirror::simulate::Scenario;
///
/// for seed in 0..20 {
///     Scenario::of_seed(seed).run(seed).unwrap();
/// }
/// ```
#[cfg(any(test, feature = "simulate"))]
pub mod simulate {
    pub use crate::sim::closed_loop::{Devices, ThroughputReport, model_throughput};
    pub use crate::sim::{End, Scenario, SeedRun, Violation};
}

pub use blockmirror_bitmap::DirtyBitmap;
pub use checkpoint::{CheckpointSink, Checkpoints};
pub use error::{Error, ErrorKind};
pub use granularity::{
    GranularityChoice, GranularityError, GranularityReason, MAX_DEFAULT_GRANULARITY, MAX_GRANULARITY,
    MIN_DEFAULT_GRANULARITY, MIN_GRANULARITY, check_granularity,
};
pub use group::{GroupControl, GroupEvent, GroupMember, MirrorGroup};
pub use job::{MirrorControl, MirrorJob, PreparedJob};
pub use options::{
    BitmapMode, CopyMode, DEFAULT_BUF_SIZE, DEFAULT_FINAL_FLUSH_TIMEOUT, DEFAULT_LATENCY_BUDGET,
    DEFAULT_MAX_IN_FLIGHT, DEFAULT_MIN_ZERO_RUN, MAX_BUF_SIZE, MAX_IN_FLIGHT, MIN_LATENCY_BUDGET,
    MirrorOptions, OnError, Reflink, SyncMode,
};
pub use plan::{GranularityCost, Plan, PlanTarget, SMALL_WRITE, plan, plan_until};
pub use progress::{
    Convergence, ErrorAction, Event, GivenUp, IoStatus, JobEnd, ModeReason, Operation, Outcome, Progress,
};
pub use reflink::check_shared;
pub use region_log::{DEFAULT_ACTIVE_REGIONS, DEFAULT_LOG_INTERVAL, LiveLog, LogStart, RegionLog};
pub use state::{JobState, Refused, Verb};
pub use tap::{
    Begin, BitmapInfo, BitmapUse, Change, Drained, GuestQueue, MAX_BITMAPS, ReadTicket, Tap, WriteTicket,
};
