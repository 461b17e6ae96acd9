//! The core of a job: every decision, no I/O.
//!
//! The engine keeps one core behind one mutex. Its threads ask [`next`](Core::next) for an action, perform it
//! without the mutex, and report to [`finished`](Core::finished). Time is an argument; nothing here waits or
//! calls a device, so that a simulator can drive the same code through any order of events. What has no
//! argument for the time happens at the time given last, by [`tick`](Core::tick) or by one that has.
//!
//! What must hold:
//! - A bit of the dirty bitmap is cleared before the scan that looks at its bytes is handed out, hence
//!   before they are read; a mark that is set again meanwhile makes the job copy the range once more.
//! - `claimed` holds, to the byte, what was taken and is not finished. Nothing is taken that overlaps it, so
//!   no two operations on one byte are ever in flight.
//! - When an operation fails its bits are set again *before* the error policy is asked.
//! - What is queued is bounded: a scan returns a capped number of extents, and no new one is begun
//!   while enough work is queued.

mod admission;
mod completion;
pub(crate) mod config;
mod counters;
mod durability;
mod ending;
mod guest_writes;
mod lifecycle;
#[cfg(test)]
mod live_tests;
mod outbox;
mod pacing;
mod queue;
mod retry;
mod scheduler;
#[cfg(test)]
mod tests;
mod verbs;

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{self as block, ByteRange};

use crate::error::Error;
use crate::granularity::GranularityError;
use crate::options::{CopyMode, SyncMode};
use crate::progress::{Event, GivenUp, Operation, Progress};
use crate::range_set::RangeSet;
use crate::scan::{CopyAction, CopyExtent, Failure};
use crate::state::JobState;
use config::Config;
use counters::Counters;
use durability::Durability;
pub(crate) use guest_writes::Admission;
use guest_writes::GuestWrites;
use lifecycle::Lifecycle;
pub(crate) use lifecycle::{MemberFailure, MemberStage, MemberView};
use outbox::Outbox;
use pacing::{GuestState, Outlook, Pacing, Situation};
use queue::Queue;
use retry::{FailedRanges, Retries};

/// Pieces that [`Core::work_left`] counts one by one.
const MAX_COUNTED: usize = 512;

/// What a thread is to do now.
#[derive(Debug)]
pub(crate) enum Next {
    /// Perform this and report.
    Do(Action),
    /// Ask again at this time, or as soon as anything was reported or changed.
    Wait(Option<Duration>),
    /// The job is over.
    Finished,
}

/// An operation to perform, and the name to report it under.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Action {
    pub(crate) id: u64,
    pub(crate) work: Work,
}

/// What is to be performed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Find out what the range needs, as much of it as fits one scan.
    Scan {
        range: ByteRange,
        /// Part of the first pass over the disk.
        first_pass: bool,
        /// No write has reached it yet: what was promised of the target still holds.
        untouched: bool,
    },
    /// Copy the range from source to target.
    Copy {
        range: ByteRange,
        /// The target reads as zeros there: zeros need not be written.
        target_zero: bool,
        /// The last try: what can be read of the source is copied block by block.
        by_block: bool,
    },
    /// Make the range zero on the target.
    Zero {
        range: ByteRange,
        /// Only if no zero bytes have to be written for it.
        metadata_only: bool,
    },
    /// Make everything written durable: the last thing to do, or so it seems.
    Flush,
    /// Make durable what was written, while other operations go on.
    PeriodicFlush,
    /// The last step of a job on a tap, for the tap to perform.
    End(Ending),
}

/// How a job on a tap ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The tap goes over to the target.
    Pivot,
    /// The target stays behind as a copy.
    Keep,
    /// The job failed.
    Fail,
}

/// What came of an action.
#[derive(Debug)]
pub(crate) enum Done {
    /// The extents cover a prefix of what was asked.
    Scanned(Vec<CopyExtent>),
    /// Copied; the sum is the length of the range.
    Copied(Moved),
    /// Copied but for the blocks that the source does not give, each with why; the sum is the rest of the
    /// range.
    Salvaged(Moved, Vec<(ByteRange, block::Error)>),
    /// Made zero.
    Zeroed,
    /// Could not be made zero without writing; nothing was done.
    ZeroUnsupported,
    /// Durable.
    Flushed,
    /// The last step was performed.
    Ended,
}

/// Where the bytes of a copy went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) copied: u64,
    pub(crate) zeroed: u64,
    pub(crate) skipped: u64,
}

/// A range taken from the dirty bitmap that has not been scanned to its end.
#[derive(Clone, Copy, Debug)]
struct ScanCursor {
    range: ByteRange,
    tries: u32,
    /// Part of the first pass over the disk.
    first_pass: bool,
}

/// A scanned extent that waits for its turn.
#[derive(Clone, Copy, Debug)]
struct QueuedExtent {
    range: ByteRange,
    action: CopyAction,
    tries: u32,
    first_pass: bool,
}

/// An operation under way.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    id: u64,
    work: Work,
    tries: u32,
    begun: Duration,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Core {
    config: Config,
    lifecycle: Lifecycle,
    /// The latest time that was given.
    clock: Duration,
    pacing: Pacing,

    dirty: DirtyBitmap,
    /// With [`SyncMode::Top`]: where the guest has written since the start, so that what lies there is copied
    /// even where the top image does not decide it.
    guest_written: Option<DirtyBitmap>,
    /// Where to look for dirt next.
    cursor: u64,
    in_progress: RangeSet,
    scans: VecDeque<ScanCursor>,
    queue: Queue,
    in_flight: Vec<InFlight>,
    next_id: u64,

    retries: Retries,
    failed_ranges: FailedRanges,
    durability: Durability,

    guests: GuestWrites,
    /// The guest has written to the target: promises about it do not hold any more.
    target_written: bool,
    /// Where the guest has written to the target while scans were under way.
    written_during_scan: RangeSet,
    /// None of the answers to scans before this one can be trusted.
    scans_valid_from: u64,

    counters: Counters,
    outbox: Outbox,
}

impl Core {
    /// A core whose first pass over the disk has not begun.
    ///
    /// # Errors
    /// The detail in `config` is no granularity of a bitmap.
    pub(crate) fn new(config: Config) -> Result<Self, GranularityError> {
        let bitmap = || {
            DirtyBitmap::new(config.len, config.detail)
                .map_err(|_| GranularityError::OutOfRange(config.detail))
        };
        let guest_written = match config.sync {
            SyncMode::Top => Some(bitmap()?),
            _ => None,
        };
        let disk = ByteRange::new(0, config.len);
        let mut outbox = Outbox::default();
        let mut core = Self {
            dirty: bitmap()?,
            guest_written,
            lifecycle: Lifecycle::start(&config, &mut outbox),
            clock: Duration::ZERO,
            pacing: Pacing::new(&config),
            cursor: 0,
            in_progress: RangeSet::default(),
            scans: VecDeque::new(),
            queue: Queue::default(),
            in_flight: Vec::new(),
            next_id: 0,
            retries: Retries::default(),
            failed_ranges: FailedRanges::default(),
            durability: Durability::new(bitmap()?, config.flush_interval),
            guests: GuestWrites::default(),
            target_written: false,
            written_during_scan: RangeSet::default(),
            scans_valid_from: 0,
            counters: Counters::default(),
            outbox,
            config,
        };
        if !matches!(core.config.sync, SyncMode::Full | SyncMode::Top) {
            return Ok(core);
        }
        // Everything is taken at once: bits need not be set to be cleared again. Dirt that appears ahead of
        // the walk is cleared when the walk gets there.
        core.in_progress.insert(disk);
        if !disk.is_empty() {
            core.scans.push_back(ScanCursor { range: disk, tries: 0, first_pass: true });
        }
        Ok(core)
    }

    /// What is set in `bitmap` has to be copied.
    pub(crate) fn seed(&mut self, bitmap: &DirtyBitmap) {
        self.dirty.merge(bitmap);
    }

    /// The source has changed in `range`: called after the write has finished, whether or not it succeeded.
    pub(crate) fn mark_dirty(&mut self, range: ByteRange) {
        let marked = self.dirty.set(range.start()..range.end());
        let new_work = !self.is_ahead(range);
        self.counters.dirtied(marked, new_work);
        if let Some(written) = &mut self.guest_written {
            written.set(range.start()..range.end());
        }
    }

    /// Time has come to `now`: takes a sample and decides on the copy mode when it is time to. Whether
    /// anything has changed that concerns waiting threads.
    pub(crate) fn tick(&mut self, now: Duration) -> bool {
        self.clock = self.clock.max(now);
        let probe_ended = self.pacing.end_probe(self.clock);
        if !self.pacing.step(&self.config, self.clock, self.counters.totals(), self.guests.count()) {
            return probe_ended;
        }
        self.decide_copy_mode() || probe_ended
    }

    fn decide_copy_mode(&mut self) -> bool {
        let stands = self.is_standing() || self.lifecycle.is_quiesced() || self.lifecycle.is_ending();
        let suspended = stands || (!self.pacing.is_through(CopyMode::Auto) && self.in_first_pass());
        if !self.pacing.may_decide(self.clock, suspended) || self.config.copy_mode != CopyMode::Auto {
            return false;
        }
        let situation = Situation {
            now: self.clock,
            totals: self.counters.totals(),
            work_left: self.work_left(),
            has_been_ready: self.lifecycle.has_been_ready(),
            longest_target_wait: self.guests.longest_target_wait(self.clock),
        };
        let Some(event) = self.pacing.decide(&self.config, &situation) else { return false };
        self.outbox.push(event);
        true
    }

    fn guest_state(&self) -> GuestState {
        GuestState { writes_through: self.is_blocking(), quiesced: self.lifecycle.is_quiesced() }
    }

    /// Whether all of `range` is taken but not begun: what is marked there is copied without more work.
    fn is_ahead(&self, range: ByteRange) -> bool {
        let taken = self.in_progress.first_overlap(range).is_some_and(|run| run.contains_range(range));
        taken && !self.in_flight.iter().any(|op| op.moves().overlaps(range))
    }

    /// Bytes left, those that are taken and marked again counted once. (Where very many pieces are taken,
    /// twice.)
    fn work_left(&self) -> u64 {
        if self.in_progress.count() > MAX_COUNTED {
            return self.left();
        }
        let dirty = |range: ByteRange| self.dirty.dirty_bytes_in(range.start()..range.end());
        let taken: u64 = self.in_progress.iter().map(dirty).sum();
        let begun: u64 = self.in_flight.iter().map(|op| dirty(op.moves())).sum();
        self.left().saturating_sub(taken.saturating_sub(begun))
    }

    fn in_first_pass(&self) -> bool {
        self.scans.iter().any(|scan| scan.first_pass)
            || self.queue.iter().any(|queued| queued.first_pass)
            || self.in_flight.iter().any(|op| matches!(op.work, Work::Scan { first_pass: true, .. }))
    }

    /// Performing the action `id` panicked: what it left behind is unknown.
    pub(crate) fn panicked(&mut self, now: Duration, id: u64) {
        if self.lifecycle.is_ending() {
            self.lifecycle.fail(Error::Panicked, &mut self.outbox);
        }
        self.abort(Error::Panicked);
        let error = block::Error::new(block::ErrorKind::Poisoned, "copy");
        self.finished(now, id, Err(Failure { operation: Operation::Write, error }));
    }

    /// How the job ended, once it has; takes the error out.
    pub(crate) fn take_result(&mut self) -> Option<Result<(), Error>> {
        self.lifecycle.take_result()
    }

    /// Why the job fails, or has failed, until [`take_result`](Self::take_result) takes it.
    pub(crate) fn failure(&self) -> Option<&Error> {
        self.lifecycle.failure()
    }

    /// Whether the job fails, and waits for what is in flight.
    pub(crate) fn is_aborting(&self) -> bool {
        self.lifecycle.is_aborting()
    }

    /// Whether the job is over.
    pub(crate) fn is_concluded(&self) -> bool {
        self.lifecycle.is_concluded()
    }

    /// The figures, `now` after the start.
    pub(crate) fn progress(&self, now: Duration) -> Progress {
        let left = self.dirty.dirty_bytes() + self.in_progress.bytes();
        let in_flight = self.in_flight.iter().map(InFlight::bytes).sum();
        let unscanned = self.scans.iter().filter(|w| w.first_pass).map(|w| w.range.len());
        let in_scan = self.in_flight.iter().map(|op| match op.work {
            Work::Scan { range, first_pass: true, .. } => range.len(),
            _ => 0,
        });
        let stands = self.is_standing();
        let Outlook { copy_rate, dirty_rate, convergence, eta } =
            self.pacing.outlook(now, self.counters.totals(), self.work_left(), stands);
        let Moved { copied, zeroed, skipped } = self.counters.moved();
        Progress {
            state: self.lifecycle.job_state(),
            io_status: self.lifecycle.io_status(),
            offset: self.counters.offset(),
            len: self.counters.offset() + left,
            bulk_left: unscanned.chain(in_scan).sum(),
            dirty_left: left - in_flight,
            dirtied: self.counters.bytes_dirtied(),
            in_flight,
            copied,
            zeroed,
            skipped,
            given_up: self.failed_ranges.bytes(),
            mirrored: self.counters.bytes_mirrored(),
            actively_synced: left == 0 && self.is_blocking() && self.guests.all_reach_target(),
            copy_mode: self.config.copy_mode,
            writes_through: self.is_blocking(),
            copy_rate,
            dirty_rate,
            convergence,
            eta,
            guest_delay: self.pacing.guest_delay(),
            elapsed: now,
        }
    }

    /// The events since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        self.outbox.take_all()
    }

    /// The oldest event that has not been taken.
    pub(crate) fn take_event(&mut self) -> Option<Event> {
        self.outbox.take()
    }

    /// Whether there is an event to take.
    pub(crate) fn has_events(&self) -> bool {
        self.outbox.has_events()
    }

    /// Whether nothing can happen any more: the job is over, and dismissed if it has to be.
    pub(crate) fn is_null(&self) -> bool {
        self.lifecycle.job_state() == JobState::Null || (self.is_concluded() && !self.config.live)
    }

    /// What was given up so far.
    pub(crate) fn given_up(&self) -> Vec<GivenUp> {
        self.failed_ranges.to_vec()
    }

    /// Whether calls blocked at the devices may be cancelled at `now`.
    pub(crate) fn may_cancel_calls(&self, now: Duration) -> bool {
        self.durability.may_cancel_calls(now)
    }

    /// Whether the job is paused, aborting or over.
    fn is_standing(&self) -> bool {
        self.lifecycle.is_paused() || !self.lifecycle.is_running()
    }
}

impl Work {
    /// Whether it makes durable what was written before it began.
    fn is_flush(self) -> bool {
        matches!(self, Self::Flush | Self::PeriodicFlush)
    }
}

impl InFlight {
    /// The bytes that are being moved or zeroed.
    fn moves(&self) -> ByteRange {
        match self.work {
            Work::Copy { range, .. } | Work::Zero { range, .. } => range,
            Work::Scan { .. } | Work::Flush | Work::PeriodicFlush | Work::End(_) => ByteRange::default(),
        }
    }

    /// How many.
    fn bytes(&self) -> u64 {
        self.moves().len()
    }

    /// How many of them are zeroed.
    fn zeroes(&self) -> u64 {
        match self.work {
            Work::Zero { range, .. } => range.len(),
            _ => 0,
        }
    }

    /// Bytes of buffer it holds.
    fn buffer(&self) -> u64 {
        match self.work {
            Work::Copy { range, .. } => range.len(),
            _ => 0,
        }
    }
}
