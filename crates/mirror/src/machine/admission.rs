//! Admission of guest writes: which may begin now, whether the target gets it at once, what is dirty after.
//!
//! [`Core::guest_admit`] decides. The tap calls it by way of `Engine::begin_write`; the thread waits in
//! `Engine::wait_for_admission` (both `engine/observer.rs`). `Engine::wake_waiters` (`engine.rs`) has it ask
//! again whenever a worker, the end of another write or a command has changed the core.
//!
//! Must hold:
//! - A range is marked after its write has finished, whether or not it succeeded.
//! - A write to both sides begins when no copy or zeroing, and no other such write, is in flight on its
//!   range. The granules that it covers wholly are cleared when the write is admitted, not when it ends, so
//!   that marks of others that arrive meanwhile stay; if either side fails they are set again. Granules that
//!   it covers in part keep what they have.
//! - No write is admitted while the guest is quiesced.

use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::refused_polls::ASK_WITHIN;
use super::{Admission, Core, TargetWriter};
use crate::scan::Failure;

/// What the admission of a write depends on. While it is unchanged a write that was refused would be refused
/// again, until its latency budget is used up or the guest has been quiesced for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AdmissionView {
    /// The job is, for the guest.
    over: bool,
    quiesced: bool,
    /// When a guest that is quiesced is resumed.
    overdue_at: Option<Duration>,
    through: bool,
    /// The latency budget.
    timeout: Option<Duration>,
    /// Copies and zeroings, earlier writes and reservations that have ended.
    releases: u64,
}

impl Core {
    /// A write to `range` wants to begin; its id.
    pub(crate) fn on_guest_write(&mut self, range: ByteRange) -> u64 {
        let id = self.work.allocate_id();
        self.guests.begin(id, range, self.clock);
        self.pacing.guest_begins(&self.config, range, self.guests.count());
        let idle = self.work.left() == 0 || self.is_standing() || self.lifecycle.is_quiesced();
        if !idle {
            let (both, job_idle) = (self.writes_through(), !self.work.operations().moves_data());
            self.pacing.start_probe(&self.config, self.clock, both, job_idle);
        }
        id
    }

    /// Whether the write `id` may begin now, and how.
    ///
    /// It waits while the guest is quiesced; and, if writes go through to the target, for a copy or zeroing
    /// in flight on its range, for an earlier write, and for the job's reservation, at most for the latency
    /// budget.
    pub(crate) fn guest_admit(&mut self, id: u64) -> Admission {
        if self.is_over_for_guest() {
            self.guests.forget(id);
            return Admission::JobEnded;
        }
        let Some((range, waited)) = self.guests.wait_until_now(id, self.clock) else {
            return Admission::JobEnded;
        };
        if self.lifecycle.is_quiesced() {
            self.guests.restart_wait(id, self.clock);
            return Admission::Wait;
        }
        if !self.writes_through() {
            self.guests.admit(id, false, self.clock);
            return Admission::SourceOnly;
        }
        if self.must_wait(id, range) {
            if self.admission_timeout().is_some_and(|timeout| waited >= timeout) {
                // Left to the job after all: it is marked when it has finished.
                self.guests.admit(id, false, self.clock);
                self.pacing.guest_delayed(&self.config, waited);
                return Admission::SourceOnly;
            }
            if let Some(bytes) = self.work.operations().zeroing_of(range) {
                self.pacing.guest_waits_for_zeroing(bytes);
            }
            return Admission::Wait;
        }
        self.guests.admit(id, true, self.clock);
        self.work.guest_writes_target(range, &mut self.counters);
        self.durability.wrote(range);
        Admission::SourceAndTarget
    }

    /// A write to `range` wants to begin, and its caller does not wait; its id. One that would have to wait
    /// is forgotten, but its latency budget goes on if the caller asks for the same range again: after the
    /// time returned at the latest, unless the [view](Self::admission_view) changes before.
    pub(crate) fn try_guest_write(&mut self, range: ByteRange) -> (u64, Admission, Option<Duration>) {
        let id = self.on_guest_write(range);
        self.guests.continue_poll(id, self.clock);
        let admission = self.guest_admit(id);
        if admission != Admission::Wait {
            return (id, admission, None);
        }
        self.guests.refuse_poll(id, self.clock);
        (id, admission, self.ask_again_in(range))
    }

    /// When time alone may admit a write to `range` that was refused.
    fn ask_again_in(&self, range: ByteRange) -> Option<Duration> {
        let overdue = self.overdue_at().map(|at| at.saturating_sub(self.clock));
        let budget = self.admission_timeout().map(|timeout| {
            let since = self.guests.refused_since(range).unwrap_or(self.clock);
            timeout.saturating_sub(self.clock.saturating_sub(since)).min(ASK_WITHIN)
        });
        overdue.into_iter().chain(budget).min()
    }

    /// What the admission of a write depends on, but for its range and the time.
    pub(crate) fn admission_view(&self) -> AdmissionView {
        AdmissionView {
            over: self.is_over_for_guest(),
            overdue_at: self.overdue_at(),
            quiesced: self.lifecycle.is_quiesced(),
            through: self.writes_through(),
            timeout: self.admission_timeout(),
            releases: self.guests.releases(),
        }
    }

    /// The caller of the write `id` does not wait for its admission any more.
    pub(crate) fn forget_guest_write(&mut self, id: u64) {
        self.guests.forget(id);
    }

    /// Whether data may be copied into the source from the layers below: not while the guest is quiesced,
    /// because the end may put the target in place of the source. It counts as under way from then on.
    pub(crate) fn admit_copy_up(&mut self) -> Admission {
        if self.is_over_for_guest() {
            return Admission::JobEnded;
        }
        if self.lifecycle.is_quiesced() {
            return Admission::Wait;
        }
        self.guests.copy_up_begins();
        Admission::SourceOnly
    }

    /// A copy-up that was admitted has finished.
    pub(crate) fn copy_up_finished(&mut self) {
        self.guests.copy_up_finished();
    }

    /// Whether a write to `range` that came now would have to wait.
    pub(crate) fn guest_would_wait(&self, range: ByteRange) -> bool {
        !self.is_over_for_guest()
            && (self.lifecycle.is_quiesced()
                || self.writes_through() && self.must_wait(self.work.next_id(), range))
    }

    /// The tap has moved to the target: no write waits for the job any more, though it is not over before the
    /// reads at the old disk have ended.
    pub(crate) fn guest_has_moved(&mut self) {
        self.lifecycle.guest_moves();
        if self.lifecycle.waits_for_no_read() {
            self.end_beside_reads();
        }
    }

    fn is_over_for_guest(&self) -> bool {
        self.is_concluded() || self.lifecycle.has_moved()
    }

    /// Whether the write `id` to `range` comes after an operation in flight, an earlier write, or the
    /// reservation.
    fn must_wait(&self, id: u64, range: ByteRange) -> bool {
        self.guests.is_after_others(id, range) || self.work.operations().moves(range)
    }

    /// How much longer the write `id` waits for the job before it goes to the source alone.
    pub(crate) fn admission_time_left(&self, id: u64) -> Option<Duration> {
        let waited = self.guests.waited(id, self.clock)?;
        Some(self.admission_timeout()?.saturating_sub(waited))
    }

    /// How long a guest write waits for the job before it goes to the source alone. While the guest is
    /// quiesced it waits for the end.
    pub(crate) fn admission_timeout(&self) -> Option<Duration> {
        self.config.latency_budget().filter(|_| !self.lifecycle.is_quiesced())
    }

    /// The write `id`, admitted to both sides, has finished at the source: whether `writer` may write it to
    /// the target now. An aborting job does not wait for more writes there than it has to.
    pub(crate) fn guest_at_target(&mut self, id: u64, writer: TargetWriter) -> bool {
        let granted = self.lifecycle.is_running();
        if granted {
            self.guests.reaches_target(id, writer, self.clock);
        }
        granted
    }

    /// The write `id` has finished at the source, and at the target if `target` is something.
    pub(crate) fn guest_finished(&mut self, id: u64, source_ok: bool, target: Option<block::Result<()>>) {
        let Some(write) = self.guests.finish(id, self.clock) else { return };
        self.pacing.guest_ended(&self.config, self.clock, write.admitted, write.both);
        if write.both {
            self.pacing.guest_delayed(&self.config, write.delay);
        }
        match target {
            Some(Ok(())) if source_ok && write.both => {
                self.counters.mirrored(write.range.len());
                self.work.mirrored(write.range);
            }
            Some(Err(error)) => {
                self.mark_dirty(write.range);
                if self.lifecycle.is_running() {
                    self.guest_write_failed(write.range, Failure::at_target(error));
                }
            }
            _ => self.mark_dirty(write.range),
        }
        self.conclude_if_idle();
    }

    /// `count` writes are under way that began before the job was attached; each is reported to
    /// [`pre_attach_write_finished`](Self::pre_attach_write_finished).
    pub(crate) fn expect_pre_attach_writes(&mut self, count: usize) {
        self.guests.expect_pre_attach_writes(count);
    }

    /// A write that began before the job was attached has finished.
    pub(crate) fn pre_attach_write_finished(&mut self, range: ByteRange) {
        self.guests.pre_attach_write_finished();
        self.mark_dirty(range);
    }

    /// Whether the target gets guest writes at once, which then may have to wait. Not while the job is
    /// paused: the target is left alone then.
    pub(crate) fn writes_through(&self) -> bool {
        self.pacing.is_through(self.config.copy_mode) && !self.is_standing()
    }

    /// Nothing can begin, and something is left that guest writes are in the way of: the job goes next there.
    pub(super) fn reserve_what_is_left(&mut self) {
        if self.guests.reserved_range().is_some() {
            return;
        }
        let Some(left) = self.work.first_left() else { return };
        let (granules, queued_too) = (self.work.granules(), self.do_queued_writes_count());
        if let Some(write) = self.guests.first_in_the_way(left, queued_too, |write| granules.round(write)) {
            self.guests.reserve(granules.round(write.intersect(left)), self.work.next_id());
        }
    }

    /// Releases the reservation where the job has copied it.
    pub(super) fn release_reservation_if_done(&mut self) {
        if self.guests.reserved_range().is_some_and(|range| self.work.is_done(range)) {
            self.guests.release_reservation();
        }
    }

    /// Whether guest writes that wait for admission keep an operation from beginning.
    pub(super) fn do_queued_writes_count(&self) -> bool {
        self.writes_through() && !self.lifecycle.is_quiesced()
    }

    /// What the guest is writing to the target is not durable, whatever is flushed meanwhile.
    pub(super) fn guests_stay_unflushed(&mut self) {
        for range in self.guests.ranges_at_target() {
            self.durability.wrote(range);
        }
    }
}

#[cfg(test)]
mod tests;
