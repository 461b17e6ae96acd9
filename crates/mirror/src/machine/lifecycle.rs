//! Life of a job: its phase, pauses, the end that was asked for, and quiescing the guest for it.
//!
//! ```text
//!  Created -> Copying -> Ready -> Waiting -> Pending -> Concluded -> Dismissed
//!                |         |         |          |           ^
//!                +---------+---------+----------+-> Aborting
//! ```
//!
//! A pause, by the user or by an error policy, is apart from the phase. QEMU's ten states are derived from
//! both by [`job_state`](Lifecycle::job_state). Every change is one move of the table in [`JobState`] and
//! emits its event.
//!
//! Must hold: a job that is prepared in its group, or whose last step is in flight, is neither paused nor
//! aborted, and its guest stays quiesced.

mod membership;
mod quiesce;

use std::time::Duration;

use super::Ending;
use super::config::Config;
use super::outbox::Outbox;
use crate::error::Error;
use crate::progress::{Event, IoStatus};
use crate::state::{JobState, Refused, Verb};
use membership::Membership;
pub(crate) use membership::{MemberFailure, MemberStage, MemberView};
use quiesce::Quiesce;

/// How far the job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    /// The target has not been equal to the source yet.
    Copying,
    /// The target was equal and durable; what is written since is copied.
    Ready,
    /// The end was asked for.
    Waiting,
    /// The end waits for `finalize`, or for the group.
    Pending,
    /// The job fails once nothing is in flight.
    Aborting,
    Concluded,
    Dismissed,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lifecycle {
    phase: Phase,
    paused_by_user: bool,
    stopped_by_error: bool,
    io_status: IoStatus,
    /// What an aborting job will end with, or a concluded one has ended with.
    failure: Option<Error>,
    /// The end that was asked for.
    ending: Option<Ending>,
    finalizing: bool,
    /// The last step is in flight.
    end_in_flight: bool,
    /// The last step has moved the guest to the target.
    moved: bool,
    /// The job was aborted while its last step was in flight: that ends without waiting for reads.
    waits_for_no_read: bool,
    /// The last step of an aborted job, which cuts the bitmap that says what to copy, and ends the log, was
    /// not taken yet.
    cut_pending: bool,
    quiesce: Quiesce,
    /// The job ends together with others.
    membership: Option<Membership>,
}

impl Lifecycle {
    /// A job that runs.
    pub(super) fn start(config: &Config, outbox: &mut Outbox) -> Self {
        let mut life = Self {
            phase: Phase::Created,
            paused_by_user: false,
            stopped_by_error: false,
            io_status: IoStatus::Ok,
            failure: None,
            ending: None,
            finalizing: false,
            end_in_flight: false,
            moved: false,
            waits_for_no_read: false,
            cut_pending: config.cut_bitmap || config.log,
            quiesce: Quiesce::default(),
            membership: None,
        };
        outbox.push(Event::Status(life.job_state()));
        life.transition_to(Phase::Copying, outbox);
        life
    }

    /// QEMU's state of the job.
    pub(super) fn job_state(&self) -> JobState {
        match (self.phase, self.is_paused()) {
            (Phase::Created, _) => JobState::Created,
            (Phase::Copying, false) => JobState::Running,
            (Phase::Copying, true) => JobState::Paused,
            (Phase::Ready, false) => JobState::Ready,
            (Phase::Ready, true) => JobState::Standby,
            (Phase::Waiting, _) => JobState::Waiting,
            (Phase::Pending, _) => JobState::Pending,
            (Phase::Aborting, _) => JobState::Aborting,
            (Phase::Concluded, _) => JobState::Concluded,
            (Phase::Dismissed, _) => JobState::Null,
        }
    }

    /// Makes one move of the state table, and emits its event if there was one.
    fn change(&mut self, outbox: &mut Outbox, change: impl FnOnce(&mut Self)) {
        let before = self.job_state();
        change(self);
        let after = self.job_state();
        if before != after {
            debug_assert!(before.can_transition_to(after), "{before} to {after}");
            outbox.push(Event::Status(after));
        }
    }

    fn transition_to(&mut self, phase: Phase, outbox: &mut Outbox) {
        self.change(outbox, |life| life.phase = phase);
    }

    pub(super) fn allow(&self, verb: Verb) -> Result<(), Refused> {
        let state = self.job_state();
        if state.allows(verb) { Ok(()) } else { Err(Refused::State { verb, state }) }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused_by_user || self.stopped_by_error
    }

    /// Whether the job is neither aborting nor over.
    pub(super) fn is_running(&self) -> bool {
        !self.is_aborting() && !self.is_concluded()
    }

    pub(super) fn is_aborting(&self) -> bool {
        self.phase == Phase::Aborting
    }

    pub(super) fn is_concluded(&self) -> bool {
        matches!(self.phase, Phase::Concluded | Phase::Dismissed)
    }

    pub(super) fn has_been_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready | Phase::Waiting | Phase::Pending)
    }

    /// Whether the end is being performed, or about to be: nothing can stop it now.
    pub(super) fn is_ending(&self) -> bool {
        self.end_in_flight || self.is_prepared()
    }

    pub(super) fn io_status(&self) -> IoStatus {
        self.io_status
    }

    pub(super) fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    /// How the job ended, once it has; takes the error out.
    pub(super) fn take_result(&mut self) -> Option<Result<(), Error>> {
        self.is_concluded().then(|| self.failure.take().map_or(Ok(()), Err))
    }

    /// The end that was asked for.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Nothing but what is left to copy keeps the end waiting.
    pub(super) fn may_end(&self, config: &Config) -> bool {
        self.ending.is_some() && (config.auto_finalize || self.finalizing)
    }

    pub(super) fn pause(&mut self, outbox: &mut Outbox) -> Result<(), Refused> {
        self.allow(Verb::Pause)?;
        if self.is_paused() {
            return Err(Refused::Paused { verb: Verb::Pause });
        }
        if self.is_ending() {
            // The last step is in flight and does not fail.
            return Err(Refused::State { verb: Verb::Pause, state: JobState::Waiting });
        }
        self.resume_guest();
        self.change(outbox, |life| life.paused_by_user = true);
        Ok(())
    }

    pub(super) fn resume(&mut self, outbox: &mut Outbox) -> Result<(), Refused> {
        let waits_for_end = matches!(self.phase, Phase::Waiting | Phase::Pending);
        if !(self.stopped_by_error && waits_for_end) {
            self.allow(Verb::Resume)?;
        }
        if !self.is_paused() {
            return Err(Refused::NotPaused);
        }
        self.io_status = IoStatus::Ok;
        self.change(outbox, Self::clear_pause);
        Ok(())
    }

    fn clear_pause(&mut self) {
        (self.paused_by_user, self.stopped_by_error) = (false, false);
    }

    /// An error policy stops the job.
    pub(super) fn stop(&mut self, no_space: bool, outbox: &mut Outbox) {
        if !self.stopped_by_error {
            self.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
        }
        self.change(outbox, |life| life.stopped_by_error = true);
    }

    pub(super) fn complete(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Complete)?;
        self.ending.get_or_insert(Ending::Pivot);
        Ok(())
    }

    /// Asks for the end without the pivot if the job has been ready; whether it is to be aborted instead.
    pub(super) fn cancel(&mut self) -> Result<bool, Refused> {
        self.allow(Verb::Cancel)?;
        if self.is_paused() {
            return Err(Refused::Paused { verb: Verb::Cancel });
        }
        if !self.has_been_ready() {
            return Ok(true);
        }
        if !self.is_ending() {
            self.ending = Some(Ending::Keep);
        }
        Ok(false)
    }

    /// The end need not wait for anything but what is left. Not while an error stops the job: the user has to
    /// see that first.
    pub(super) fn finalize(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Finalize)?;
        if self.is_paused() {
            return Err(Refused::Paused { verb: Verb::Finalize });
        }
        self.finalizing = true;
        Ok(())
    }

    pub(super) fn dismiss(&mut self, outbox: &mut Outbox) -> Result<(), Refused> {
        self.allow(Verb::Dismiss)?;
        self.transition_to(Phase::Dismissed, outbox);
        Ok(())
    }

    /// The target equals the source and is durable for the first time.
    pub(super) fn reach_ready(&mut self, outbox: &mut Outbox) {
        if self.phase != Phase::Copying {
            return;
        }
        // Of a job that was paused during the flush: the table has no move from `paused` to `standby`.
        let pause = (self.paused_by_user, self.stopped_by_error);
        self.change(outbox, Self::clear_pause);
        self.transition_to(Phase::Ready, outbox);
        outbox.push(Event::Ready);
        self.change(outbox, |life| (life.paused_by_user, life.stopped_by_error) = pause);
    }

    /// The end waits for `finalize`: `always` emits the event of that, else only if the job's own options say
    /// so.
    pub(super) fn enter_pending(&mut self, emit: bool, outbox: &mut Outbox) {
        if self.is_paused() || !matches!(self.phase, Phase::Copying | Phase::Ready) {
            return;
        }
        self.transition_to(Phase::Waiting, outbox);
        self.transition_to(Phase::Pending, outbox);
        if emit {
            outbox.push(Event::Pending);
        }
    }

    /// Whether the job is ready, and its end does not wait for anything yet.
    pub(super) fn is_ready(&self) -> bool {
        self.phase == Phase::Ready && !self.is_paused()
    }

    /// The last step begins.
    pub(super) fn end_begins(&mut self) {
        self.end_in_flight = true;
    }

    /// The last step has moved the guest to the target, and is not over.
    pub(super) fn guest_moves(&mut self) {
        self.moved = true;
    }

    pub(super) fn has_moved(&self) -> bool {
        self.moved
    }

    /// The job is aborted, and its last step may be in flight.
    pub(super) fn wait_for_no_read(&mut self) {
        self.waits_for_no_read |= self.end_in_flight;
    }

    pub(super) fn waits_for_no_read(&self) -> bool {
        self.waits_for_no_read
    }

    /// The last step was performed.
    pub(super) fn ended(&mut self, config: &Config, outbox: &mut Outbox) {
        self.end_in_flight = false;
        self.cut_pending = false;
        self.conclude(config, outbox);
    }

    /// Aborts the job with `error`, which replaces one that it was aborting with.
    pub(super) fn fail(&mut self, error: Error, outbox: &mut Outbox) {
        self.note_failure(&error);
        self.failure = Some(error);
        self.resume_guest();
        self.transition_to(Phase::Aborting, outbox);
    }

    /// Aborts the job unless it is ending, aborting or over; whether it did.
    pub(super) fn abort(&mut self, error: Error, outbox: &mut Outbox) -> bool {
        let deferred = match &mut self.membership {
            Some(membership) => membership.defer_abort(error),
            None => Some(error),
        };
        let Some(error) = deferred.filter(|_| self.is_running() && !self.is_ending()) else { return false };
        self.fail(error, outbox);
        true
    }

    /// An aborted job leaves the bitmap that says what to copy as it is, and the log.
    pub(super) fn forget_cut(&mut self) {
        self.cut_pending = false;
    }

    /// Whether an aborted job has to take its last step.
    pub(super) fn is_cut_pending(&self) -> bool {
        self.cut_pending
    }

    /// The job is over: as it was asked to, or with the failure that it aborts with.
    pub(super) fn conclude(&mut self, config: &Config, outbox: &mut Outbox) {
        self.resume_guest();
        if self.phase == Phase::Aborting {
            outbox.push(match &self.failure {
                Some(Error::Cancelled | Error::Group { .. }) => Event::Cancelled,
                failure => Event::Completed { error: failure.as_ref().map(ToString::to_string) },
            });
        } else {
            // A job that ends by itself may do so while it is paused, if its last flush was in flight.
            self.change(outbox, Self::clear_pause);
            self.enter_pending(false, outbox);
            outbox.push(Event::Completed { error: None });
        }
        self.transition_to(Phase::Concluded, outbox);
        if config.live && config.auto_dismiss {
            self.transition_to(Phase::Dismissed, outbox);
        }
    }

    fn note_failure(&mut self, error: &Error) {
        if let Some(membership) = &mut self.membership {
            membership.fail(error);
        }
    }
}

/// Quiescing the guest.
impl Lifecycle {
    /// Whether no guest write is admitted.
    pub(super) fn is_quiesced(&self) -> bool {
        self.quiesce.is_active()
    }

    pub(super) fn quiesce(&mut self, now: Duration) {
        self.quiesce.begin(now);
    }

    pub(super) fn resume_guest(&mut self) {
        self.quiesce.end();
    }

    /// When writes that wait need not wait any longer.
    pub(super) fn quiesce_deadline(&self) -> Option<Duration> {
        self.quiesce.deadline().filter(|_| !self.is_ending())
    }

    /// Resumes the guest because writes have waited too long.
    pub(super) fn resume_overdue(&mut self, now: Duration) {
        self.quiesce.end_overdue(now);
    }

    /// The guest is not quiesced before this.
    pub(super) fn backoff_until(&self) -> Duration {
        self.quiesce.backoff_until()
    }

    /// A flush begins while nothing is dirty; `drained`: no guest write is under way.
    pub(super) fn flush_begins(&mut self, drained: bool) {
        self.quiesce.flush_begins(drained);
    }

    /// A flush has succeeded, and nothing is dirty.
    pub(super) fn flush_succeeded(&mut self) {
        self.quiesce.flush_succeeded();
    }

    /// The target was flushed since the guest is quiesced and no write was under way.
    pub(super) fn is_flushed(&self) -> bool {
        self.quiesce.is_flushed()
    }
}

/// Membership in a group.
impl Lifecycle {
    /// From now on the job is a member of a group.
    pub(super) fn join_group(&mut self) {
        self.membership = Some(Membership::default());
    }

    pub(super) fn is_grouped(&self) -> bool {
        self.membership.is_some()
    }

    pub(super) fn is_prepared(&self) -> bool {
        self.membership.as_ref().is_some_and(Membership::is_prepared)
    }

    pub(super) fn prepare(&mut self) {
        if let Some(membership) = &mut self.membership {
            membership.prepare();
        }
    }

    pub(super) fn commit(&mut self) {
        if let Some(membership) = &mut self.membership {
            membership.commit();
        }
    }

    /// The last step, if the group has committed and it was not taken yet.
    pub(super) fn take_commit(&mut self) -> Option<Ending> {
        let ending = self.ending?;
        self.membership.as_mut()?.take_commit().then_some(ending)
    }

    /// The group's attempt has failed: the guest is resumed. An abort that came while the job was prepared.
    pub(super) fn roll_back(&mut self, now: Duration) -> Option<Error> {
        let deferred = self.membership.as_mut()?.roll_back();
        if deferred.is_none() && self.is_quiesced() {
            self.quiesce.end_with_backoff(now);
        }
        deferred
    }

    /// Why the job ends without the others of its group, if it does.
    pub(super) fn member_failure(&self) -> Option<&MemberFailure> {
        self.membership.as_ref()?.failure()
    }

    /// What the coordinator sees; `near` and `settled` are what the ranges left say.
    pub(super) fn view(&self, config: &Config, near: bool, settled: bool) -> MemberView {
        let stage = match self.phase {
            _ if self.member_failure().is_some() || self.is_aborting() => MemberStage::Failed,
            _ if self.is_concluded() => MemberStage::Ended,
            _ if self.is_prepared() => MemberStage::Prepared,
            _ if settled && self.is_flushed() => MemberStage::Settled,
            _ if self.is_quiesced() => MemberStage::Quiesced,
            _ if near && self.ending.is_some() && !self.is_paused() => MemberStage::Near,
            _ => MemberStage::Busy,
        };
        MemberView {
            stage,
            over: self.is_concluded(),
            has_been_ready: self.has_been_ready(),
            is_paused: self.is_paused(),
            auto_finalize: config.auto_finalize,
            finalizing: self.finalizing,
            pending: self.phase == Phase::Pending,
        }
    }
}
