//! Completion of an operation: each owner gets its part of the result.

use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::work::{InFlight, MAX_GIVEN_UP};
use super::{Cloned, Core, Done, Moved, Work};
use crate::error::Error;
use crate::progress::{ErrorAction, Event, Operation};
use crate::scan::{CopyAction, Failure};

impl Core {
    /// Reports the result of the action `id`. Reports of unknown actions are ignored.
    pub(crate) fn on_completion(&mut self, now: Duration, id: u64, result: Result<Done, Failure>) {
        self.on_timer(now);
        if matches!(result, Ok(Done::StillRead)) {
            return;
        }
        let Some(op) = self.work.finish(id) else { return };
        self.guests.note_release();
        if !self.work.operations().moves_data() {
            self.pacing.job_idle(self.clock);
        }
        if matches!(op.work, Work::End(_)) {
            return self.end_performed(result);
        }
        if self.lifecycle.is_running() {
            match result {
                Ok(done) => self.succeeded(now, op, done),
                Err(failure) => self.failed(now, op, failure),
            }
            if let Work::Scan { range, .. } = op.work {
                self.work.scan_ended(range);
            }
            self.release_reservation_if_done();
        } else if op.work.is_flush() {
            self.flush_ended_while_aborting(op.work, result);
        }
        self.conclude_if_idle();
    }

    /// The last step was performed. If the log could not be ended, the job fails, and a pivot was not
    /// performed.
    fn end_performed(&mut self, result: Result<Done, Failure>) {
        let Self { lifecycle, outbox, .. } = self;
        if let Ok(Done::LogNotEnded(why)) = result {
            lifecycle.fail(Error::Log(why), outbox);
        }
        lifecycle.ended(&self.config, outbox);
    }

    fn succeeded(&mut self, now: Duration, op: InFlight, done: Done) {
        let range = op.work.range();
        let took = now.saturating_sub(op.begun);
        match (done, op.work) {
            (Done::Scanned(extents), Work::Scan { first_pass, .. }) => {
                self.work.scanned(op.id, range, (op.tries, first_pass), extents, &mut self.counters);
            }
            (Done::ScannedInPart(extents, unmapped), Work::Scan { first_pass, .. }) => {
                self.work.scanned(op.id, range, (op.tries, first_pass), extents, &mut self.counters);
                self.list_unmapped(unmapped);
            }
            (Done::Copied(moved), Work::Copy { .. }) => {
                self.durability.wrote(range);
                self.durability.wrote_data(moved.copied);
                self.pacing.copied(&self.config, range.len(), took);
                self.work.completed(range, moved, &mut self.counters);
            }
            (Done::Salvaged(moved, lost), Work::Copy { .. }) => {
                self.durability.wrote(range);
                self.durability.wrote_data(moved.copied);
                self.work.completed(range, moved, &mut self.counters);
                self.salvaged(lost);
            }
            (Done::Cloned(cloned), Work::Clone { target_zero, .. }) => {
                self.durability.wrote(range);
                self.cloned(range, cloned, target_zero, op.tries);
            }
            (Done::Zeroed, Work::Zero { .. }) => {
                self.durability.wrote(range);
                self.pacing.zeroed(range.len(), took);
                let moved = Moved { zeroed: range.len(), ..Moved::default() };
                self.work.completed(range, moved, &mut self.counters);
            }
            (Done::ZeroUnsupported, Work::Zero { .. }) => {
                self.pacing.zero_by_data_only();
                self.work.queue_as(CopyAction::Zero, range, op.tries);
            }
            (_, Work::Flush) => {
                self.durability.flush_succeeded();
                self.flushed();
            }
            (_, Work::PeriodicFlush) => {
                self.durability.flush_succeeded();
                self.durability.flush_ended(now, op.begun);
            }
            (_, Work::End(_)) => {}
            // The report does not fit the action, which cannot be; the range is simply not done.
            (_, Work::Scan { .. } | Work::Copy { .. } | Work::Clone { .. } | Work::Zero { .. }) => {
                self.work.requeue(range);
            }
        }
    }

    /// A clone of `range` has come to its end, or to a limit: what could not be cloned is copied. It is not
    /// known to be zeros any more: a clone that fails may have replaced a part of it.
    fn cloned(&mut self, range: ByteRange, cloned: Cloned, target_zero: bool, tries: u32) {
        let Self { work, counters, .. } = self;
        let Cloned { end, rest, calls } = cloned;
        counters.cloned_by(calls);
        let mut at = range.start();
        let end = end.clamp(at, range.end());
        for rest in rest {
            let rest = rest.intersect(ByteRange::new(at, end));
            if rest.is_empty() {
                continue;
            }
            let shared = ByteRange::new(at, rest.start());
            work.completed(shared, Moved { shared: shared.len(), ..Moved::default() }, counters);
            work.queue_as(CopyAction::Copy { target_zero: false }, rest, tries);
            at = rest.end();
        }
        let shared = ByteRange::new(at, end);
        work.completed(shared, Moved { shared: shared.len(), ..Moved::default() }, counters);
        work.queue_as(CopyAction::Clone { target_zero }, ByteRange::new(end, range.end()), tries);
    }

    /// The last try of a range has copied it but for what is `lost`.
    fn salvaged(&mut self, lost: Vec<(ByteRange, block::Error)>) {
        let mut lost = lost.into_iter();
        while let Some((part, error)) = lost.next() {
            if self.work.is_failed_list_full() {
                // What is not listed is dirty: it must not count as copied, for a checkpoint either.
                self.work.requeue(part);
                lost.for_each(|(part, _)| self.work.requeue(part));
                return self.fail_with(Error::TooManyGivenUp { limit: MAX_GIVEN_UP, cause: error });
            }
            let (operation, action) = (Operation::Read, ErrorAction::GiveUp);
            self.outbox.push(Event::Error { operation, action, range: part, message: error.to_string() });
            self.work.list_failed(part, &error);
        }
    }

    /// The last try of a scan has taken the blocks `unmapped` for data.
    fn list_unmapped(&mut self, unmapped: Vec<(ByteRange, block::Error)>) {
        for (part, error) in unmapped {
            if self.work.is_unmapped_list_full() {
                return self.fail_with(Error::TooManyGivenUp { limit: MAX_GIVEN_UP, cause: error });
            }
            let (operation, action) = (Operation::Read, ErrorAction::Ignore);
            self.outbox.push(Event::Error { operation, action, range: part, message: error.to_string() });
            self.work.list_unmapped(part, &error);
        }
    }

    /// A flush has ended while the job aborts. If it failed, what it should have covered may be lost,
    /// whatever a later flush says; a flush that was cancelled has lost nothing.
    fn flush_ended_while_aborting(&mut self, work: Work, result: Result<Done, Failure>) {
        if work == Work::Flush {
            self.durability.final_flush_ended(result.is_ok());
        }
        if result.is_err_and(|failure| failure.error.kind() != block::ErrorKind::Cancelled) {
            self.writes_lost();
        }
    }

    /// Anything written to the target since the last good flush may be lost: it is dirty again.
    pub(crate) fn writes_lost(&mut self) {
        let Self { durability, work, .. } = self;
        durability.writes_lost(|lost| work.merge(lost));
        self.guests_stay_unflushed();
        self.work.forget_target();
    }
}
