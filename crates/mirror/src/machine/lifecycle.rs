//! The life of a job: its verbs, READY, and how it ends.
//!
//! A job on a tap goes on when it is ready, until its end is asked for. Then it waits until little is left,
//! holds the guest's writes, lets those under way land, copies what is left, flushes the target, and looks
//! again: if anything became dirty or the flush failed, it resumes the guest and goes on; else the end is
//! performed while the guest is still held, so that no write falls between the last look and the pivot.

use std::time::Duration;

use blockmirror_block::ByteRange;

use super::{Core, Ending, Next, Phase, Work};
use crate::error::Error;
use crate::options::CopyMode;
use crate::progress::{Event, IoStatus};
use crate::state::{JobState, Refused, Verb};

impl Core {
    /// Makes a move of the state table, and tells.
    pub(super) fn transition_to(&mut self, next: JobState) {
        debug_assert!(self.state.can_transition_to(next), "{} to {next}", self.state);
        self.state = next;
        self.outbox.push(Event::Status(next));
    }

    pub(super) fn allow(&self, verb: Verb) -> Result<(), Refused> {
        if self.state.allows(verb) { Ok(()) } else { Err(Refused::State { verb, state: self.state }) }
    }

    /// Shows in the state whether the job is paused, where the state tells.
    pub(super) fn publish_pause(&mut self) {
        match (self.state, self.is_paused()) {
            (JobState::Running, true) => self.transition_to(JobState::Paused),
            (JobState::Paused, false) => self.transition_to(JobState::Running),
            (JobState::Ready, true) => self.transition_to(JobState::Standby),
            (JobState::Standby, false) => self.transition_to(JobState::Ready),
            _ => {}
        }
    }

    /// Starts nothing new until [`resume`](Self::resume). The guest is not held meanwhile.
    pub(crate) fn pause(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Pause)?;
        if self.is_paused() {
            return Err(Refused::Paused { verb: Verb::Pause });
        }
        if self.is_ending() {
            // The last step is under way and does not fail.
            return Err(Refused::State { verb: Verb::Pause, state: JobState::Waiting });
        }
        self.paused_by_user = true;
        self.resume_guest();
        self.publish_pause();
        Ok(())
    }

    /// Goes on, also after an error policy stopped the job; its errors are forgotten. A job that waits to be
    /// finalized cannot be paused, but an error can stop it, and then this is the way on.
    pub(crate) fn resume(&mut self) -> Result<(), Refused> {
        if !(self.stopped_by_error && matches!(self.state, JobState::Waiting | JobState::Pending)) {
            self.allow(Verb::Resume)?;
        }
        if !self.is_paused() {
            return Err(Refused::NotPaused);
        }
        self.paused_by_user = false;
        self.stopped_by_error = false;
        self.io_status = IoStatus::Ok;
        self.publish_pause();
        Ok(())
    }

    /// Changes the speed; waiting threads must ask again.
    pub(crate) fn set_speed(&mut self, now: Duration, bytes_per_second: u64) -> Result<(), Refused> {
        self.allow(Verb::SetSpeed)?;
        self.pacing.set_speed(now, bytes_per_second);
        Ok(())
    }

    /// Changes when the target gets what the guest writes. Writes under way end as they began.
    pub(crate) fn change(&mut self, mode: CopyMode) -> Result<(), Refused> {
        self.allow(Verb::Change)?;
        self.pacing.mode_asked(self.config.copy_mode, self.clock);
        self.config.copy_mode = mode;
        Ok(())
    }

    /// Asks for the end with the pivot.
    pub(crate) fn complete(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Complete)?;
        self.ending.get_or_insert(Ending::Pivot);
        Ok(())
    }

    /// Asks for the end without the pivot if the job has been ready, and gives it up otherwise.
    pub(crate) fn cancel(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Cancel)?;
        match self.state {
            _ if self.is_paused() => return Err(Refused::Paused { verb: Verb::Cancel }),
            JobState::Ready | JobState::Waiting | JobState::Pending if !self.is_ending() => {
                self.ending = Some(Ending::Keep);
            }
            JobState::Ready | JobState::Waiting | JobState::Pending => {}
            _ => self.abort(Error::Cancelled),
        }
        Ok(())
    }

    /// Gives the job up.
    pub(crate) fn force_cancel(&mut self) -> Result<(), Refused> {
        self.allow(Verb::ForceCancel)?;
        self.abort(Error::Cancelled);
        Ok(())
    }

    /// Ends now what waits to be ended. Not while an error stops it: the user has to see that first.
    pub(crate) fn finalize(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Finalize)?;
        if self.is_paused() {
            return Err(Refused::Paused { verb: Verb::Finalize });
        }
        self.finalizing = true;
        Ok(())
    }

    /// Forgets the job.
    pub(crate) fn dismiss(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Dismiss)?;
        self.transition_to(JobState::Null);
        Ok(())
    }

    /// Whether the end is being performed, or about to be: nothing can stop it now.
    pub(super) fn is_ending(&self) -> bool {
        self.is_prepared() || self.in_flight.iter().any(|op| matches!(op.work, Work::End(_)))
    }

    /// Bytes that the target does not have, or may not have.
    pub(super) fn left(&self) -> u64 {
        self.dirty.dirty_bytes() + self.in_progress.bytes()
    }

    /// Nothing is queued, in flight, waiting for another try, or dirty.
    pub(super) fn when_clean(&mut self) -> Next {
        let Some(ending) = self.ending else {
            if self.has_been_ready() {
                let until = self.durability.next_check(self.clock);
                return self.outbox.wait_for_dirt(until);
            }
            return self.begin(Work::Flush, 0);
        };
        if !self.quiesced {
            if self.is_grouped() || self.may_end() {
                return Next::Wait(self.backoff_until());
            }
            // Not to be finalized by itself: the end waits for its word, and the copy goes on.
            if self.state == JobState::Ready {
                self.transition_to(JobState::Waiting);
                self.transition_to(JobState::Pending);
                self.outbox.push(Event::Pending);
            }
            return Next::Wait(None);
        }
        if !self.guests.are_drained() {
            return Next::Wait(None);
        }
        if self.is_flushed() {
            if self.is_grouped() {
                // The others may not be as far.
                return Next::Wait(None);
            }
            return self.begin(Work::End(ending), 0);
        }
        self.flush_begins();
        self.begin(Work::Flush, 0)
    }

    pub(super) fn has_been_ready(&self) -> bool {
        matches!(self.state, JobState::Ready | JobState::Standby | JobState::Waiting | JobState::Pending)
    }

    /// A flush of the target has succeeded. Nothing was dirty when it began.
    pub(super) fn flushed(&mut self) {
        if !self.dirty.is_clean() {
            self.resume_guest();
        } else if !self.config.live {
            self.conclude(Ok(()));
        } else if self.quiesced {
            self.flush_ended();
        } else if self.state == JobState::Running {
            self.transition_to(JobState::Ready);
            self.outbox.push(Event::Ready);
        } else if self.state == JobState::Paused {
            // Paused while the flush was under way: ready, and paused.
            self.transition_to(JobState::Running);
            self.transition_to(JobState::Ready);
            self.outbox.push(Event::Ready);
            self.transition_to(JobState::Standby);
        }
    }

    /// Ends the job with `error` once nothing is in flight, unless it is ending already.
    pub(crate) fn abort(&mut self, error: Error) {
        let Some(error) = self.defer_abort_while_prepared(error) else { return };
        if matches!(self.phase, Phase::Running) && !self.is_ending() {
            self.begin_to_fail(error);
            self.conclude_if_idle();
        }
    }

    /// Ends a job that has not begun anything and has no worker.
    pub(crate) fn abandon(&mut self) {
        self.config.cut_bitmap = false;
        self.abort(Error::Cancelled);
    }

    pub(super) fn begin_to_fail(&mut self, error: Error) {
        self.note_member_failure(&error);
        self.phase = Phase::Aborting(error);
        self.resume_guest();
        self.transition_to(JobState::Aborting);
    }

    /// Ends a job that is being given up if nothing is in flight any more, the guest's own writes to the
    /// target included.
    pub(super) fn conclude_if_idle(&mut self) {
        let aborting = matches!(self.phase, Phase::Aborting(_));
        if !aborting || !self.in_flight.is_empty() || self.config.cut_bitmap || self.guests.any_at_target() {
            return;
        }
        if let Phase::Aborting(error) = std::mem::replace(&mut self.phase, Phase::Running) {
            self.conclude(Err(error));
        }
    }

    /// What is left to do for a job that is being given up.
    pub(super) fn next_while_aborting(&mut self) -> Next {
        if !self.config.cut_bitmap || !self.in_flight.is_empty() || self.guests.any_at_target() {
            return Next::Wait(None);
        }
        match self.durability.begin_final_flush(self.clock, self.config.final_flush_timeout) {
            true => self.begin(Work::Flush, 0),
            false => self.begin(Work::End(Ending::Fail), 0),
        }
    }

    /// The last action was performed.
    pub(super) fn ended(&mut self) {
        self.config.cut_bitmap = false;
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Aborting(error) => self.conclude(Err(error)),
            _ => self.conclude(Ok(())),
        }
    }

    fn conclude(&mut self, result: Result<(), Error>) {
        self.resume_guest();
        match &result {
            Ok(()) => {
                // A job that ends by itself may do so while it is paused, if its last flush was under way.
                for next in [JobState::Running, JobState::Waiting, JobState::Pending] {
                    if self.state.can_transition_to(next) {
                        self.transition_to(next);
                    }
                }
                self.outbox.push(Event::Completed { error: None });
            }
            Err(error) => {
                self.note_member_failure(error);
                self.outbox.push(match error {
                    Error::Cancelled | Error::Group { .. } => Event::Cancelled,
                    error => Event::Completed { error: Some(error.to_string()) },
                });
            }
        }
        self.transition_to(JobState::Concluded);
        self.phase = Phase::Concluded(result);
        if self.config.live && self.config.auto_dismiss {
            self.transition_to(JobState::Null);
        }
    }

    /// The ranges that the target does not have, or would not have after a crash. In no order, and some
    /// twice.
    pub(crate) fn missing(&self) -> Vec<ByteRange> {
        let dirty = self.dirty.runs().map(|run| ByteRange::new(run.start, run.end));
        dirty.chain(self.in_progress.iter()).chain(self.durability.uncovered()).collect()
    }
}
