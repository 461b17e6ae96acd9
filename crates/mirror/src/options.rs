//! What a caller can ask of a mirror job, and the checks on it.
//!
//! A [`MirrorOptions`] is data: building one fails never, [`check`](MirrorOptions::check) says what is wrong
//! with it, and [`MirrorJob::start`](crate::MirrorJob::start) checks before it touches anything, so that a
//! caller who checks first leaves no file behind.

use std::num::NonZeroUsize;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;

use crate::error::Error;
use crate::granularity::{GranularityChoice, GranularityReason, check_granularity};
use crate::region_log::LiveLog;

pub use blockmirror_job::{CopyMode, OnError};

/// Bytes that may be in flight when the caller does not say: 16 MiB.
pub const DEFAULT_BUF_SIZE: u64 = 16 << 20;
/// The largest accepted buffer, 1 GiB.
pub const MAX_BUF_SIZE: u64 = 1 << 30;
/// Operations in flight when the caller does not say.
pub const DEFAULT_MAX_IN_FLIGHT: usize = 16;
/// The most operations in flight, each with a thread of its own.
pub const MAX_IN_FLIGHT: usize = 256;
/// The shortest run of zero bytes inside data that is not written as data, when the caller does not say: 4
/// KiB.
pub const DEFAULT_MIN_ZERO_RUN: u64 = 4096;

/// What a job in [`CopyMode::Auto`] may add to a write of the guest when the caller does not say: 20 ms.
pub const DEFAULT_LATENCY_BUDGET: Duration = Duration::from_millis(20);
/// How long the flush of an aborted job with [`BitmapMode::Always`] may take.
pub const DEFAULT_FINAL_FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// The smallest accepted latency budget: 100 microseconds.
pub const MIN_LATENCY_BUDGET: Duration = Duration::from_micros(100);

/// Which part of the source is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum SyncMode {
    /// Everything that the chain of images holds.
    #[default]
    Full,
    /// Only what the top image itself decides, its zero clusters included. What it does not hold is left
    /// alone on the target, so that the target's backing file shows through.
    Top,
    /// Nothing but what is written from now on. Needs a [`Tap`](crate::Tap).
    None,
    /// What a named bitmap of the [`Tap`](crate::Tap) says has changed; the bitmap starts anew if the job
    /// succeeds and keeps everything if it does not.
    Incremental,
    /// The same with a choice of what becomes of the bitmap: [`BitmapMode`].
    Bitmap,
}

/// What becomes of the bitmap that says what a job copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BitmapMode {
    /// It is left as it is: it goes on to collect.
    Never,
    /// It starts anew at the instant at which the target equals the source; after a failure it is as if the
    /// job had not been.
    #[default]
    OnSuccess,
    /// As [`OnSuccess`](Self::OnSuccess); after a failure or a cancellation it keeps what the target does not
    /// have durably. For that the job flushes the target once more ([`MirrorOptions::final_flush_timeout`]).
    Always,
}

/// Whether the target shares blocks with the source's files (reflinks) where both lie in one file system that
/// does that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Reflink {
    /// All data is copied.
    #[default]
    Never,
    /// What can be shared is; a job on a [`Tap`](crate::Tap) copies all, as guest writes to a shared block
    /// allocate a new one.
    Auto,
    /// What can be shared is, in a job on a tap too. A source and a target that cannot share at all are
    /// refused.
    Always,
}

/// The options of a mirror job. Setters take and return it by value:
///
/// ```
/// use blockmirror_mirror::{MirrorOptions, SyncMode};
/// let options = MirrorOptions::new().sync(SyncMode::Top).granularity(64 << 10).speed(10 << 20);
/// options.check()?;
/// # Ok::<(), blockmirror_mirror::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorOptions {
    pub(crate) sync: SyncMode,
    pub(crate) top_layers: u32,
    pub(crate) target_is_below: bool,
    pub(crate) granularity: Option<u64>,
    pub(crate) buf_size: u64,
    pub(crate) speed: u64,
    pub(crate) max_in_flight: usize,
    pub(crate) threads: Option<NonZeroUsize>,
    pub(crate) on_source_error: OnError,
    pub(crate) on_target_error: OnError,
    pub(crate) unmap: bool,
    pub(crate) min_zero_run: u64,
    pub(crate) allocate: bool,
    pub(crate) target_is_zero: bool,
    pub(crate) longer_target: bool,
    pub(crate) whole_clusters: bool,
    pub(crate) only: Option<DirtyBitmap>,
    pub(crate) reflink: Reflink,
    pub(crate) copy_mode: CopyMode,
    pub(crate) latency_budget: Option<Duration>,
    pub(crate) bitmap: Option<(String, BitmapMode)>,
    pub(crate) final_flush_timeout: Duration,
    pub(crate) live_log: Option<LiveLog>,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        Self {
            sync: SyncMode::Full,
            top_layers: 1,
            target_is_below: false,
            granularity: None,
            buf_size: 0,
            speed: 0,
            max_in_flight: DEFAULT_MAX_IN_FLIGHT,
            threads: None,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: true,
            min_zero_run: DEFAULT_MIN_ZERO_RUN,
            allocate: false,
            target_is_zero: false,
            longer_target: false,
            whole_clusters: false,
            only: None,
            reflink: Reflink::Never,
            copy_mode: CopyMode::Background,
            latency_budget: None,
            bitmap: None,
            final_flush_timeout: DEFAULT_FINAL_FLUSH_TIMEOUT,
            live_log: None,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }
}

impl MirrorOptions {
    /// The defaults that each setter names.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which part of the source is copied. Default: [`SyncMode::Full`].
    #[must_use]
    pub fn sync(mut self, sync: SyncMode) -> Self {
        self.sync = sync;
        self
    }

    /// With [`SyncMode::Top`]: how many images from the top down count as top, at least 1. Default: 1. With
    /// more, a part of a backing chain is copied, for instance into the image below it.
    #[must_use]
    pub fn top_layers(mut self, layers: u32) -> Self {
        self.top_layers = layers.max(1);
        self
    }

    /// Says that the target is a layer of the source's own chain, to which those above it are committed. What
    /// it hides or may show later is then what the source hides or may show. Default: false.
    #[must_use]
    pub fn target_is_below(mut self, below: bool) -> Self {
        self.target_is_below = below;
        self
    }

    /// How many images from the top down decide what is copied; `None` for the whole chain.
    pub fn counted_layers(&self) -> Option<u32> {
        (self.sync == SyncMode::Top).then_some(self.top_layers)
    }

    /// Bytes per bit of the dirty bitmap: a power of two from 512 bytes to 64 MiB. `None` and 0, the default,
    /// follow the target's clusters. Within, the job keeps finer account: to 4 KiB, coarser on disks of more
    /// than 1 TiB so that a bitmap never takes 40 MiB (32 KiB at 8 TiB), then also coarser than what was
    /// asked for.
    #[must_use]
    pub fn granularity(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.granularity = bytes.into().filter(|&bytes| bytes != 0);
        self
    }

    /// Bytes that may be in flight together, rounded up to a multiple of the granularity; at least 64 KiB are
    /// meant, and at most 1 GiB may be. 0, the default, means 16 MiB.
    #[must_use]
    pub fn buf_size(mut self, bytes: u64) -> Self {
        self.buf_size = bytes;
        self
    }

    /// Bytes per second until the job is ready; 0, the default, is as fast as it goes. What the guest writes
    /// once the job is ready is copied at once.
    #[must_use]
    pub fn speed(mut self, bytes_per_second: u64) -> Self {
        self.speed = bytes_per_second;
        self
    }

    /// Operations that may be in flight together, 1 to 256. Default: 16.
    #[must_use]
    pub fn max_in_flight(mut self, operations: usize) -> Self {
        self.max_in_flight = operations;
        self
    }

    /// Threads that move data. `None`, the default, follows the number of processors and `max_in_flight`.
    #[must_use]
    pub fn threads(mut self, threads: impl Into<Option<NonZeroUsize>>) -> Self {
        self.threads = threads.into();
        self
    }

    /// What happens when the source cannot be read. Default: [`OnError::Report`].
    #[must_use]
    pub fn on_source_error(mut self, policy: OnError) -> Self {
        self.on_source_error = policy;
        self
    }

    /// What happens when the target cannot be written, zeroed or flushed. Default: [`OnError::Report`].
    #[must_use]
    pub fn on_target_error(mut self, policy: OnError) -> Self {
        self.on_target_error = policy;
        self
    }

    /// Whether zeros may give space back on the target. Default: true.
    #[must_use]
    pub fn unmap(mut self, unmap: bool) -> Self {
        self.unmap = unmap;
        self
    }

    /// The shortest run of zero bytes inside data that is left out or zeroed instead of being written; 0
    /// writes data as it is. Default: 4 KiB. Runs count in units that the target can hold as zeros.
    #[must_use]
    pub fn min_zero_run(mut self, bytes: u64) -> Self {
        self.min_zero_run = bytes;
        self
    }

    /// Whether the source's zeros are written as data where its maps tell of them, so that the target is
    /// allocated in full; together with [`min_zero_run`](Self::min_zero_run) 0 no zeros are left out at all.
    /// Default: false.
    #[must_use]
    pub fn allocate(mut self, allocate: bool) -> Self {
        self.allocate = allocate;
        self
    }

    /// What [`min_zero_run`](Self::min_zero_run) and [`allocate`](Self::allocate) have set.
    pub fn sparseness(&self) -> (u64, bool) {
        (self.min_zero_run, self.allocate)
    }

    /// Promises that the whole target reads as zeros, so that it is not asked. Default: false.
    #[must_use]
    pub fn target_is_zero(mut self, zero: bool) -> Self {
        self.target_is_zero = zero;
        self
    }

    /// Accepts a target that is longer than the source, of a disk that is not written meanwhile: what lies
    /// past the source's end stays as it is. Default: false, the lengths must be equal.
    #[must_use]
    pub fn longer_target(mut self, accept: bool) -> Self {
        self.longer_target = accept;
        self
    }

    /// Copies no less than a cluster of the target at once where the source's extents are whole clusters of
    /// it: for a target that stores clusters compressed. The granularity is a cluster at least. Default:
    /// false.
    #[must_use]
    pub fn whole_clusters(mut self, whole: bool) -> Self {
        self.whole_clusters = whole;
        self
    }

    /// Copies nothing but what is dirty in `only`, in whole units of 4 KiB or of the bitmap that is
    /// coarser; the sync mode still decides what of it. On a [`Tap`](crate::Tap) what is written meanwhile is
    /// copied as well, and a pivot trusts that the target has the rest. `None`, the default, copies
    /// the whole disk.
    #[must_use]
    pub fn only(mut self, only: impl Into<Option<DirtyBitmap>>) -> Self {
        self.only = only.into();
        self
    }

    /// Whether the target shares blocks with the source's files. Whole blocks and clusters of data that lie
    /// in a file as they are can be shared; the rest is copied. Zeros that were written are shared as they
    /// are, not looked for. With [`allocate`](Self::allocate) nothing is shared. Default:
    /// [`Reflink::Never`].
    #[must_use]
    pub fn reflink(mut self, reflink: Reflink) -> Self {
        self.reflink = reflink;
        self
    }

    /// Whether a job may succeed although ranges have failed.
    pub fn may_leave_gaps(&self) -> bool {
        [self.on_source_error, self.on_target_error].contains(&OnError::Ignore)
    }

    /// Whether ranges of the source that cannot be read are left out.
    pub fn ignores_source_errors(&self) -> bool {
        self.on_source_error == OnError::Ignore
    }

    /// The granularity for a target with clusters of `cluster_size`, if it has any.
    ///
    /// # Errors
    /// [`Error::Granularity`] for one that was asked for and is invalid.
    pub(crate) fn choose_granularity(&self, cluster_size: Option<u64>) -> Result<GranularityChoice, Error> {
        let choice = GranularityChoice::new(self.granularity, cluster_size)?;
        Ok(match cluster_size.filter(|cluster| self.whole_clusters && *cluster > choice.bytes) {
            None => choice,
            Some(cluster_size) => GranularityChoice {
                bytes: cluster_size,
                reason: GranularityReason::TargetCluster { cluster_size, clamped: false },
            },
        })
    }

    /// When the target gets what the guest writes. Default: [`CopyMode::Background`].
    #[must_use]
    pub fn copy_mode(mut self, mode: CopyMode) -> Self {
        self.copy_mode = mode;
        self
    }

    /// What the job may add to a write of the guest: 99 of 100 writes are to take no longer than this because
    /// of the job. At least 100 microseconds. `None`, the default, is 20 ms in [`CopyMode::Auto`] and no
    /// bound in the other modes.
    ///
    /// With a budget the job is silent for some milliseconds every five seconds while the guest writes, to
    /// see what writes take without it; from then on it has as many bytes under way as they bear: by default
    /// until they take a third longer, with a budget that was asked for until one in a hundred takes longer
    /// by more than that. Where the guest has written lately copies are smaller. A write that has waited that
    /// long for the job to let it in goes to the source alone and is copied later, also in write-blocking
    /// mode. In auto mode a target that makes writes take longer sends the job back to background.
    #[must_use]
    pub fn latency_budget(mut self, budget: impl Into<Option<Duration>>) -> Self {
        self.latency_budget = budget.into();
        self
    }

    /// The bitmap of the tap that says what to copy, for [`SyncMode::Incremental`] and [`SyncMode::Bitmap`],
    /// and what becomes of it. Default: none.
    #[must_use]
    pub fn bitmap(mut self, name: impl Into<String>, mode: BitmapMode) -> Self {
        self.bitmap = Some((name.into(), mode));
        self
    }

    /// With [`BitmapMode::Always`]: how long the one flush of the target may take that a cancelled or failed
    /// job begins, so that the bitmap keeps what is really missing. Calls that still block then are
    /// cancelled, and the bitmap keeps everything that was written since the last good flush, as it does with
    /// zero, which is no flush. Default: 2 s.
    #[must_use]
    pub fn final_flush_timeout(mut self, timeout: Duration) -> Self {
        self.final_flush_timeout = timeout;
        self
    }

    /// The log of a job on a tap, with which another job goes on should the process be killed; the sync mode
    /// is [`SyncMode::Full`] then. From the job's beginning it belongs to the tap, and stays with that when
    /// the job is over. What an earlier job with the log has written to the target must be there: only what
    /// the log marks is copied. Default: none.
    #[must_use]
    pub fn live_log(mut self, log: impl Into<Option<LiveLog>>) -> Self {
        self.live_log = log.into();
        self
    }

    /// Whether a job on a tap ends as soon as it can once its end was asked for; otherwise it waits for
    /// [`MirrorControl::finalize`](crate::MirrorControl::finalize). Default: true.
    #[must_use]
    pub fn auto_finalize(mut self, auto: bool) -> Self {
        self.auto_finalize = auto;
        self
    }

    /// Whether a job on a tap that is over goes on to [`JobState::Null`](crate::JobState::Null) by itself;
    /// otherwise it waits for [`MirrorControl::dismiss`](crate::MirrorControl::dismiss). Default: true.
    #[must_use]
    pub fn auto_dismiss(mut self, auto: bool) -> Self {
        self.auto_dismiss = auto;
        self
    }

    /// The bitmap that says what to copy.
    ///
    /// # Errors
    /// A bitmap without a sync mode that takes one, or the other way round.
    pub(crate) fn sync_bitmap(&self) -> Result<Option<&(String, BitmapMode)>, Error> {
        let wants = matches!(self.sync, SyncMode::Incremental | SyncMode::Bitmap);
        match &self.bitmap {
            Some((_, mode)) if self.sync == SyncMode::Incremental && *mode != BitmapMode::OnSuccess => {
                Err(Error::SyncBitmap { why: "with sync=incremental the bitmap mode is on-success" })
            }
            None if wants => Err(Error::SyncBitmap { why: "this sync mode needs the name of a bitmap" }),
            Some(_) if !wants => Err(Error::SyncBitmap { why: "this sync mode takes no bitmap" }),
            bitmap => Ok(bitmap.as_ref()),
        }
    }

    /// Tests what can be tested without devices.
    ///
    /// # Errors
    /// [`Error::Granularity`] for an invalid granularity, [`Error::InvalidOption`] for the rest.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(bytes) = self.granularity {
            check_granularity(bytes)?;
        }
        if self.buf_size > MAX_BUF_SIZE {
            return Err(Error::InvalidOption {
                option: "buf-size",
                value: self.buf_size,
                expected: "at most 1 GiB",
            });
        }
        let in_range = |option, n: usize| {
            if (1..=MAX_IN_FLIGHT).contains(&n) {
                return Ok(());
            }
            let value = u64::try_from(n).unwrap_or(u64::MAX);
            Err(Error::InvalidOption { option, value, expected: "between 1 and 256" })
        };
        self.sync_bitmap()?;
        if self.live_log.is_some() && self.sync != SyncMode::Full {
            return Err(Error::LogSync);
        }
        if let Some(budget) = self.latency_budget.filter(|&budget| budget < MIN_LATENCY_BUDGET) {
            return Err(Error::InvalidOption {
                option: "latency-budget",
                value: u64::try_from(budget.as_micros()).unwrap_or(u64::MAX),
                expected: "at least 100 microseconds",
            });
        }
        in_range("max-in-flight", self.max_in_flight)?;
        self.threads.map_or(Ok(()), |threads| in_range("threads", threads.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        MirrorOptions::new().check().unwrap();
    }

    #[test]
    fn each_bad_option_is_named_with_its_value() {
        let message = |o: MirrorOptions| o.check().unwrap_err().to_string();
        assert_eq!(
            message(MirrorOptions::new().granularity(3000)),
            "granularity 3000: must be a power of two"
        );
        assert_eq!(
            message(MirrorOptions::new().buf_size(MAX_BUF_SIZE + 1)),
            "buf-size 1073741825: must be at most 1 GiB"
        );
        assert_eq!(
            message(MirrorOptions::new().max_in_flight(0)),
            "max-in-flight 0: must be between 1 and 256"
        );
        assert_eq!(
            message(MirrorOptions::new().threads(NonZeroUsize::new(257))),
            "threads 257: must be between 1 and 256"
        );
        assert_eq!(
            message(MirrorOptions::new().latency_budget(Duration::from_micros(99))),
            "latency-budget 99: must be at least 100 microseconds"
        );
    }

    #[test]
    fn a_granularity_of_zero_means_choose() {
        assert_eq!(MirrorOptions::new().granularity(0).granularity, None);
    }
}
