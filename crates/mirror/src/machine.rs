//! The core of a job: every decision, no I/O.
//!
//! The engine keeps one core behind one mutex. Its workers ask [`next`](Core::next) for an action, perform it
//! without the mutex, and report to [`on_completion`](Core::on_completion); guest writes ask for
//! [admission](Core::guest_admit). Time is an argument; nothing here waits or calls a device, so that a
//! simulator drives the same code through any order of events. What has no argument for the time happens at
//! the time given last.
//!
//! ```text
//!  workers: next, on_completion     guest writes: on_guest_write, ..     users: pause, complete, ..
//!        |                              |                                      |
//!  scheduler, completion,           admission                               verbs, ending
//!  error_policy
//!        +------------------------------+--------------------------------------+
//!        v            v            v            v            v           v          v
//!    WorkTracker  Durability  GuestWrites    Pacing     Lifecycle    Counters    Outbox
//! ```
//!
//! Each rule has one owner with private fields. An owner gets another only as an argument: `Outbox` for
//! events, `Counters` for bytes. The core has the configuration and the clock, and brings the owners
//! together.

mod action;
mod admission;
mod checkpoint_clock;
mod completion;
pub(crate) mod config;
mod counters;
mod durability;
mod ending;
mod error_policy;
mod guest_writes;
mod lifecycle;
#[cfg(test)]
mod live_tests;
mod outbox;
mod pacing;
mod refused_polls;
mod scheduler;
#[cfg(test)]
mod tests;
mod verbs;
mod work;

use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{self as block, ByteRange};

use crate::error::Error;
use crate::granularity::GranularityError;
use crate::options::CopyMode;
use crate::progress::{Event, GivenUp, Operation, Progress};
use crate::scan::Failure;
use crate::state::JobState;
pub(crate) use action::{Action, Cloned, Done, Ending, Moved, Next, Work};
pub(crate) use admission::AdmissionView;
use config::Config;
use counters::Counters;
use durability::Durability;
use guest_writes::GuestWrites;
pub(crate) use guest_writes::{Admission, TargetWriter};
use lifecycle::Lifecycle;
pub(crate) use lifecycle::{MemberFailure, MemberStage, MemberView};
use outbox::Outbox;
use pacing::{GuestState, Outlook, Pacing, Situation};
use work::{WorkTracker, empty_bitmap};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Core {
    config: Config,
    /// The latest time that was given.
    clock: Duration,
    lifecycle: Lifecycle,
    work: WorkTracker,
    durability: Durability,
    guests: GuestWrites,
    pacing: Pacing,
    counters: Counters,
    outbox: Outbox,
}

impl Core {
    /// A core whose first pass over the disk has not begun.
    ///
    /// # Errors
    /// The detail in `config` is no granularity of a bitmap.
    pub(crate) fn new(config: Config) -> Result<Self, GranularityError> {
        let mut outbox = Outbox::default();
        Ok(Self {
            clock: Duration::ZERO,
            lifecycle: Lifecycle::start(&config, &mut outbox),
            work: WorkTracker::new(&config)?,
            durability: Durability::new(
                empty_bitmap(&config)?,
                config.flush_interval,
                config.checkpoint_interval,
            ),
            guests: GuestWrites::default(),
            pacing: Pacing::new(&config),
            counters: Counters::default(),
            outbox,
            config,
        })
    }

    /// What is set in `bitmap` has to be copied.
    pub(crate) fn seed(&mut self, bitmap: &DirtyBitmap) {
        self.work.merge(bitmap);
    }

    /// The source has changed in `range`: called after the write has finished, whether or not it succeeded.
    pub(crate) fn mark_dirty(&mut self, range: ByteRange) {
        self.work.mark_dirty(range, &mut self.counters);
    }

    /// Time has come to `now`: takes a sample and decides on the copy mode when it is time to. Whether
    /// anything has changed that concerns waiting threads.
    pub(crate) fn on_timer(&mut self, now: Duration) -> bool {
        self.clock = self.clock.max(now);
        let probe_ended = self.pacing.end_probe(self.clock);
        if !self.pacing.step(&self.config, self.clock, self.counters.totals(), self.guests.count()) {
            return probe_ended;
        }
        self.decide_copy_mode() || probe_ended
    }

    fn decide_copy_mode(&mut self) -> bool {
        let stands = self.is_standing() || self.lifecycle.is_quiesced() || self.lifecycle.is_ending();
        let suspended = stands || (!self.pacing.is_through(CopyMode::Auto) && self.work.in_first_pass());
        if !self.pacing.may_decide(self.clock, suspended) || self.config.copy_mode != CopyMode::Auto {
            return false;
        }
        let situation = Situation {
            now: self.clock,
            totals: self.counters.totals(),
            work_left: self.work.work_left(),
            has_been_ready: self.lifecycle.has_been_ready(),
            longest_target_wait: self.guests.longest_target_wait(self.clock),
        };
        let Some(event) = self.pacing.decide(&self.config, &situation) else { return false };
        self.outbox.push(event);
        true
    }

    fn guest_state(&self) -> GuestState {
        GuestState { writes_through: self.writes_through(), quiesced: self.lifecycle.is_quiesced() }
    }

    /// Performing the action `id` panicked: what it left behind is unknown.
    pub(crate) fn panicked(&mut self, now: Duration, id: u64) {
        if self.lifecycle.is_ending() {
            self.lifecycle.fail(Error::Panicked, &mut self.outbox);
        }
        self.abort(Error::Panicked);
        let error = block::Error::new(block::ErrorKind::Poisoned, "copy");
        self.on_completion(now, id, Err(Failure { operation: Operation::Write, error }));
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

    /// Bytes that the target does not have, or may not have.
    pub(crate) fn left(&self) -> u64 {
        self.work.left()
    }

    /// The figures, `now` after the start.
    pub(crate) fn progress(&self, now: Duration) -> Progress {
        let left = self.work.left();
        let in_flight = self.work.operations().bytes();
        let work_left = self.work.work_left();
        let Outlook { copy_rate, dirty_rate, convergence, eta } =
            self.pacing.outlook(now, self.counters.totals(), work_left, self.is_standing());
        let Moved { copied, zeroed, skipped, shared } = self.counters.moved();
        Progress {
            state: self.lifecycle.job_state(),
            io_status: self.lifecycle.io_status(),
            offset: self.counters.offset(),
            len: self.counters.offset() + left,
            bulk_left: self.work.bulk_left(),
            dirty_left: left - in_flight,
            dirtied: self.counters.bytes_dirtied(),
            in_flight,
            copied,
            zeroed,
            skipped,
            shared,
            clone_calls: self.counters.clone_calls(),
            given_up: self.work.failed_bytes(),
            mirrored: self.counters.bytes_mirrored(),
            actively_synced: left == 0 && self.writes_through() && self.guests.all_reach_target(),
            copy_mode: self.config.copy_mode,
            writes_through: self.writes_through(),
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

    /// The oldest event that was not taken.
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

    /// The failed ranges so far.
    pub(crate) fn given_up(&self) -> Vec<GivenUp> {
        self.work.failed_ranges()
    }

    /// What the source did not map.
    pub(crate) fn unmapped(&self) -> Vec<GivenUp> {
        self.work.unmapped()
    }

    /// `range` in whole granules of the dirty bitmap.
    #[cfg(any(test, feature = "simulate"))]
    pub(crate) fn whole_granules(&self, range: ByteRange) -> ByteRange {
        self.work.granules().round(range)
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
