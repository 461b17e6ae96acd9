//! Region logs: what is on stable storage of a live job, so that another one goes on where it was killed.
//!
//! A [`RegionLog`] says durably in which regions source and target may differ. A [`LiveLog`] hands one to a
//! job ([`MirrorOptions::live_log`]); from the job's beginning it belongs to the job's [`Tap`]. A guest write
//! waits until its regions are marked ([`WriteLog`]); the job clears regions that are equal and durable on
//! both sides after its flushes ([`active::ActiveRegions`]). When the job is over the log has ended, unless
//! the process is about to end ([`MirrorControl::keep_log`]).
//!
//! [`MirrorOptions::live_log`]: crate::MirrorOptions::live_log
//! [`MirrorControl::keep_log`]: crate::MirrorControl::keep_log
//! [`Tap`]: crate::Tap

mod active;
mod write_log;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use blockmirror_block::{ByteRange, Result};

pub(crate) use active::Moment;
#[cfg(any(test, feature = "simulate"))]
pub(crate) use active::{ActiveRegions, Update};
pub(crate) use write_log::{Entry, LogPin, WriteLog};

/// Regions that may be active when the caller does not say.
pub const DEFAULT_ACTIVE_REGIONS: usize = 4096;
/// Bytes of data from one flush of a job with a log to the next when the caller does not say: 256 MiB.
pub const DEFAULT_LOG_INTERVAL: u64 = 256 << 20;

/// What a log says when it is attached to a tap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogStart {
    /// Where source and target may differ, in whole regions.
    pub marked: Vec<ByteRange>,
    /// An earlier job has had it: the target holds what that has written, whatever else the options promise.
    pub resumed: bool,
}

impl LogStart {
    /// A log that was made for this job: the target has nothing yet of a disk of `len` bytes.
    pub fn new_log(len: u64) -> Self {
        Self { marked: vec![ByteRange::new(0, len)], resumed: false }
    }

    /// A log that an earlier job has had.
    pub fn resumed(marked: Vec<ByteRange>) -> Self {
        Self { marked, resumed: true }
    }
}

/// Keeps durably in which regions of a disk source and target may differ. Calls come one at a time.
pub trait RegionLog: fmt::Debug + Send + Sync {
    /// What messages call it.
    fn name(&self) -> &str;

    /// Bytes of a region; does not change.
    fn region_size(&self) -> u64;

    /// The log is attached to the tap in front of the source: no write is under way there, and from now on
    /// none begins that is not marked. Where the source was written without the log before, it may differ.
    ///
    /// # Errors
    /// Any: the job does not start.
    fn attach(&self) -> Result<LogStart>;

    /// Marks the regions with numbers in `mark` and clears those in `clear`, durably when it returns. The two
    /// have no region in common.
    ///
    /// # Errors
    /// Any: the job fails, and the log is [invalidated](Self::invalidate).
    fn update(&self, mark: &[Range<u64>], clear: &[Range<u64>]) -> Result<()>;

    /// The job ends, and the target may take the source's place: a later job must not go on from this log.
    /// Durable when it returns.
    ///
    /// # Errors
    /// Any: the log is [invalidated](Self::invalidate).
    fn end(&self) -> Result<()>;

    /// Nothing is known any more, because another call has failed and guest writes go on. Durable when it
    /// returns.
    ///
    /// # Errors
    /// Any: it is reported. There is nothing else that could be done.
    fn invalidate(&self) -> Result<()>;
}

/// A log for a live job, and its bounds.
#[derive(Clone, Debug)]
pub struct LiveLog {
    pub(crate) log: Arc<dyn RegionLog>,
    pub(crate) active: usize,
    pub(crate) interval: u64,
}

impl LiveLog {
    /// With the default bounds.
    pub fn new(log: Arc<dyn RegionLog>) -> Self {
        Self { log, active: DEFAULT_ACTIVE_REGIONS, interval: DEFAULT_LOG_INTERVAL }
    }

    /// How many regions may be active: marked because the guest writes there, though the target has all of
    /// it. A write to yet another region waits until one is cleared, which takes a flush of both disks; not
    /// while the job is paused or over. One write may add more than that. At least 1; default:
    /// [`DEFAULT_ACTIVE_REGIONS`].
    #[must_use]
    pub fn active_regions(mut self, regions: usize) -> Self {
        self.active = regions.max(1);
        self
    }

    /// Bytes of data that are copied from one flush of both disks to the next, after which regions are
    /// cleared. Default: [`DEFAULT_LOG_INTERVAL`].
    #[must_use]
    pub fn interval(mut self, bytes: u64) -> Self {
        self.interval = bytes;
        self
    }
}

/// Two are the same if their log is one object.
impl PartialEq for LiveLog {
    fn eq(&self, other: &Self) -> bool {
        let bounds = (self.active, self.interval) == (other.active, other.interval);
        bounds && Arc::ptr_eq(&self.log, &other.log)
    }
}

impl Eq for LiveLog {}
