//! READY, and how a job ends.
//!
//! A job on a tap goes on when it is ready, until its end is asked for. Final convergence: when little is
//! left it quiesces the guest, waits for the writes under way, copies what is left, flushes the target, and
//! checks: if anything became dirty or the flush failed, it resumes the guest and goes on; else the end is
//! performed while the guest is still quiesced, so that no write falls between the final check and the pivot.
//!
//! An aborting job waits for its own operations and for guest writes whose writer was given the target: for
//! calls of the tap until they return, for tickets for at most 5 s. A write that was admitted to both sides
//! and has not got so far goes to the source alone. What the job does not wait for is dirty.

use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::ByteRange;

use super::{Core, Ending, Next, TargetWriter, Work};
use crate::error::Error;
use crate::progress::JobEnd;

impl Core {
    /// Quiesces the guest when the end was asked for and little is left; resumes it when it turned out to be
    /// much.
    pub(super) fn quiesce_or_resume(&mut self) {
        if self.lifecycle.is_quiesced() {
            let news = self.lifecycle.is_flushed() && !self.work.is_clean();
            if news || (self.guests.are_drained() && self.work.left() > self.config.buffer) {
                self.lifecycle.resume_guest();
            }
        } else if !self.lifecycle.is_grouped() && self.lifecycle.may_end(&self.config) && self.is_near() {
            self.lifecycle.quiesce(self.clock);
        }
    }

    /// Little is left, and nothing forbids to quiesce the guest now.
    pub(super) fn is_near(&self) -> bool {
        self.work.left() <= self.config.operation
            && !self.work.any_retries()
            && self.clock >= self.durability.not_before()
            && self.clock >= self.lifecycle.backoff_until()
    }

    /// When writes that wait for admission need not wait any longer.
    pub(crate) fn overdue_at(&self) -> Option<Duration> {
        self.lifecycle.quiesce_deadline()
    }

    /// Resumes the guest if writes have waited too long by `now`; whether they have.
    pub(crate) fn resume_if_overdue(&mut self, now: Duration) -> bool {
        if self.overdue_at().is_none_or(|at| now < at) {
            return false;
        }
        self.clock = self.clock.max(now);
        self.lifecycle.resume_overdue(self.clock);
        true
    }

    /// Nothing is queued, in flight, waiting for another try, or dirty.
    pub(super) fn when_clean(&mut self) -> Next {
        let Some(ending) = self.lifecycle.ending() else {
            if self.lifecycle.has_been_ready() {
                let until = self.durability.next_check(self.clock);
                return self.outbox.wait_for_dirt(until);
            }
            return self.begin(Work::Flush, 0);
        };
        if !self.lifecycle.is_quiesced() {
            if self.lifecycle.is_grouped() || self.lifecycle.may_end(&self.config) {
                let backoff = Some(self.lifecycle.backoff_until()).filter(|until| *until > self.clock);
                return Next::Wait(backoff);
            }
            // Not to be finalized by itself: the end waits for `finalize`, and the copy goes on.
            if self.lifecycle.is_ready() {
                self.lifecycle.enter_pending(true, &mut self.outbox);
            }
            return Next::Wait(None);
        }
        if !self.guests.are_drained() {
            return Next::Wait(None);
        }
        if self.lifecycle.is_flushed() {
            if self.lifecycle.is_grouped() {
                // The others may not be as far.
                return Next::Wait(None);
            }
            return self.begin(Work::End(ending), 0);
        }
        self.lifecycle.flush_begins(self.guests.are_drained());
        self.begin(Work::Flush, 0)
    }

    /// The last flush of the target has succeeded. Nothing was dirty when it began.
    pub(super) fn flushed(&mut self) {
        if !self.work.is_clean() {
            self.lifecycle.resume_guest();
        } else if !self.config.live {
            self.lifecycle.conclude(&self.config, &mut self.outbox);
        } else if self.lifecycle.is_quiesced() {
            self.lifecycle.flush_succeeded();
        } else {
            self.lifecycle.reach_ready(&mut self.outbox);
        }
    }

    /// Ends the job with `error` once nothing is in flight, unless it is ending already. One that waits only
    /// for reads at the disk that the tap has left ends at once, as it was asked to.
    pub(crate) fn abort(&mut self, error: Error) {
        if self.lifecycle.has_moved() && !self.is_concluded() {
            return self.end_beside_reads();
        }
        self.lifecycle.wait_for_no_read();
        if self.lifecycle.abort(error, &mut self.outbox) {
            self.conclude_if_idle();
        }
    }

    /// The tap has moved. The report that the last read has ended finds no action any more.
    pub(super) fn end_beside_reads(&mut self) {
        let end = self.work.operations().iter().find(|op| matches!(op.work, Work::End(_))).map(|op| op.id);
        if let Some(end) = end {
            self.work.finish(end);
            self.lifecycle.ended(&self.config, &mut self.outbox);
        }
    }

    /// Ends a job that has not begun anything and has no worker.
    pub(crate) fn abandon(&mut self) {
        self.lifecycle.forget_cut();
        self.abort(Error::Cancelled);
    }

    /// Ends an aborting job if nothing is in flight any more, the guest's own writes to the target included.
    pub(super) fn conclude_if_idle(&mut self) {
        let idle = !self.has_calls_in_flight() && !self.guests.has_target(TargetWriter::TicketHolder);
        if self.lifecycle.is_aborting() && !self.lifecycle.is_cut_pending() && idle {
            self.conclude_aborted();
        }
    }

    /// Whether the job or the tap has called the devices.
    fn has_calls_in_flight(&self) -> bool {
        !self.work.operations().is_empty() || self.guests.has_target(TargetWriter::Tap)
    }

    fn conclude_aborted(&mut self) {
        self.leave_guest_writes();
        self.lifecycle.conclude(&self.config, &mut self.outbox);
    }

    /// The target does not get the guest writes that were admitted to both sides: what they cover is dirty.
    fn leave_guest_writes(&mut self) {
        for range in self.guests.leave_to_source() {
            self.mark_dirty(range);
        }
    }

    /// What an aborting job still does.
    pub(super) fn next_while_aborting(&mut self) -> Next {
        if self.has_calls_in_flight() {
            return Next::Wait(None);
        }
        if self.guests.has_target(TargetWriter::TicketHolder) {
            let until = self.guests.ticket_deadline(self.clock);
            if self.clock < until {
                return Next::Wait(Some(until));
            }
        }
        if !self.lifecycle.is_cut_pending() {
            self.conclude_aborted();
            return Next::Finished;
        }
        self.leave_guest_writes();
        let timeout = self.config.final_flush_timeout;
        match self.config.cut_bitmap && self.durability.begin_final_flush(self.clock, timeout) {
            true => self.begin(Work::Flush, 0),
            false => self.begin(Work::End(Ending::Fail), 0),
        }
    }

    /// The ranges that the target does not have, whether or not the job will copy them. All others it has
    /// after a crash, too, once a flush has succeeded that begins from here on. In no order, and some
    /// twice.
    pub(crate) fn not_copied(&self) -> Vec<ByteRange> {
        self.work.not_copied().collect()
    }

    /// The same as [`missing`](Self::missing), as a bitmap.
    pub(crate) fn remaining(&self) -> DirtyBitmap {
        let mut remaining = self.work.empty();
        for range in self.missing() {
            remaining.set(range.start()..range.end());
        }
        remaining
    }

    /// How a job that is over, and has not failed, has ended.
    pub(crate) fn how_it_ended(&self) -> JobEnd {
        match self.lifecycle.ending() {
            Some(Ending::Pivot) => JobEnd::Pivoted,
            Some(Ending::Keep) => JobEnd::Kept,
            Some(Ending::Fail) | None => JobEnd::Copied,
        }
    }

    /// The ranges that the target does not have, or would not have after a crash. In no order, and some
    /// twice.
    pub(crate) fn missing(&self) -> Vec<ByteRange> {
        self.work.missing().chain(self.durability.uncovered()).collect()
    }
}
