//! What comes of an operation: progress, or the error policy.

use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::retry::{MAX_GIVEN_UP, MAX_TRIES};
use super::{Core, Done, InFlight, Moved, QueuedExtent, ScanCursor, Work};
use crate::error::Error;
use crate::options::OnError;
use crate::progress::{ErrorAction, Event, Operation};
use crate::scan::{CopyAction, CopyExtent, Failure};

/// Flushes tried under the `ignore` policy. Few: each try copies everything again, because a failed flush may
/// have lost any of it.
const MAX_FLUSH_TRIES: u32 = 3;

impl Core {
    /// Reports what came of the action `id`. Reports of unknown actions are ignored.
    pub(crate) fn finished(&mut self, now: Duration, id: u64, result: Result<Done, Failure>) {
        self.tick(now);
        let Some(index) = self.in_flight.iter().position(|op| op.id == id) else { return };
        let op = self.in_flight.swap_remove(index);
        if !self.moves_data() {
            self.pacing.job_idle(self.clock);
        }
        if matches!(op.work, Work::End(_)) {
            return self.lifecycle.ended(&self.config, &mut self.outbox);
        }
        if !self.lifecycle.is_running() {
            if op.work == Work::Flush {
                self.durability.final_flush_ended(result.is_ok());
            }
            self.conclude_if_idle();
            return;
        }
        match (result, op.work) {
            (Ok(Done::Scanned(extents)), Work::Scan { range, first_pass, .. }) => {
                self.scanned(op.id, ScanCursor { range, tries: op.tries, first_pass }, extents);
            }
            (Ok(Done::Copied(moved)), Work::Copy { range, .. }) => {
                self.durability.wrote(range);
                self.pacing.copied(&self.config, range.len(), now.saturating_sub(op.begun));
                self.completed(range, moved);
            }
            (Ok(Done::Salvaged(moved, lost)), Work::Copy { range, .. }) => {
                self.durability.wrote(range);
                self.salvaged(range, moved, lost);
            }
            (Ok(Done::Zeroed), Work::Zero { range, .. }) => {
                self.durability.wrote(range);
                self.pacing.zeroed(range.len(), now.saturating_sub(op.begun));
                self.completed(range, Moved { zeroed: range.len(), ..Moved::default() });
            }
            (Ok(Done::ZeroUnsupported), Work::Zero { range, .. }) => {
                self.pacing.zero_by_data_only();
                let queued =
                    QueuedExtent { range, action: CopyAction::Zero, tries: op.tries, first_pass: false };
                self.queue.push(queued);
            }
            (Ok(_), Work::Flush) => {
                self.durability.flush_succeeded();
                self.flushed();
            }
            (Ok(_), Work::PeriodicFlush) => {
                self.durability.flush_succeeded();
                self.durability.flush_ended(now, op.begun);
            }
            (_, Work::End(_)) => {}
            (Ok(_), Work::Scan { range, .. } | Work::Copy { range, .. } | Work::Zero { range, .. }) => {
                // The report does not fit the action, which cannot be; the range is simply not done.
                self.requeue(range);
            }
            (Err(failure), _) => self.failed(now, op, failure),
        }
        if let Work::Scan { range, .. } = op.work {
            // The next scan of these bytes looks after the write.
            self.written_during_scan.remove(range);
        }
        self.release_reservation_if_done();
        self.conclude_if_idle();
    }

    fn scanned(&mut self, id: u64, scan: ScanCursor, extents: Vec<CopyExtent>) {
        let mut end = extents.last().map_or(scan.range.start(), |last| last.range.end());
        if self.target_written {
            // Asked for before the guest came.
            end = end.min(scan.range.start().saturating_add(self.config.piece()));
        }
        let rest = ByteRange::new(end, scan.range.end());
        if !rest.is_empty() {
            self.scans.push_front(ScanCursor { range: rest, ..scan });
        }
        if id < self.scans_valid_from {
            return self.requeue(ByteRange::new(scan.range.start(), end));
        }
        let kept = ByteRange::new(scan.range.start(), end);
        for extent in extents {
            self.leave_out_written(CopyExtent { range: extent.range.intersect(kept), ..extent }, scan);
        }
    }

    /// Where the guest has written to the target while the scan was under way, its answer may be outdated,
    /// and nothing is left to do.
    fn leave_out_written(&mut self, mut extent: CopyExtent, scan: ScanCursor) {
        let whole = extent.range;
        let mut at = whole.start();
        while at < whole.end() {
            let rest = ByteRange::new(at, whole.end());
            let written_during_scan =
                self.written_during_scan.first_overlap(rest).map(|run| run.intersect(rest));
            extent.range = ByteRange::new(at, written_during_scan.map_or(whole.end(), ByteRange::start));
            if extent.range.is_empty() {
                // Nothing lies before it.
            } else if extent.below {
                self.enqueue_below(extent, scan);
            } else {
                self.enqueue(extent.range, extent.action, scan);
            }
            at = extent.range.end();
            if let Some(written_during_scan) = written_during_scan {
                self.cede_to_guest(written_during_scan);
                at = written_during_scan.end();
            }
        }
    }

    /// A extent that the top image does not decide is left to the target's backing file, except where the
    /// guest has written since the start (and discarded again): there the target may hold something else by
    /// now.
    fn enqueue_below(&mut self, extent: CopyExtent, scan: ScanCursor) {
        let mut at = extent.range.start();
        let end = extent.range.end();
        while at < end {
            let written = self.guest_written.as_ref().and_then(|map| map.next_dirty(at, end - at));
            let written = written.map_or(ByteRange::new(end, end), |run| ByteRange::new(run.start, run.end));
            let written = written.intersect(extent.range);
            let untouched = ByteRange::new(at, if written.is_empty() { end } else { written.start() });
            self.left_to_backing(untouched);
            self.enqueue(written, extent.action, scan);
            at = untouched.end().max(written.end());
        }
    }

    /// `range` is left to the target's backing file. It was never work of this job, and progress does not
    /// count it.
    fn left_to_backing(&mut self, range: ByteRange) {
        self.in_progress.remove(range);
        self.failed_ranges.remove(range);
        self.counters.left_to_backing(range.len());
    }

    fn enqueue(&mut self, range: ByteRange, action: CopyAction, scan: ScanCursor) {
        if range.is_empty() {
            return;
        }
        match action {
            CopyAction::Skip => {
                let moved = Moved { skipped: range.len(), ..Moved::default() };
                return self.completed(range, moved);
            }
            CopyAction::Copy { .. } | CopyAction::Zero => {}
        }
        let ScanCursor { tries, first_pass, .. } = scan;
        self.queue.push(QueuedExtent { range, action, tries, first_pass });
    }

    fn completed(&mut self, range: ByteRange, moved: Moved) {
        self.in_progress.remove(range);
        self.failed_ranges.remove(range);
        self.counters.completed(range.len(), moved);
    }

    /// The last try of `range` has copied it but for what is `lost`.
    fn salvaged(&mut self, range: ByteRange, moved: Moved, lost: Vec<(ByteRange, block::Error)>) {
        self.completed(range, moved);
        for (part, error) in lost {
            if self.failed_ranges.is_full() {
                return self.fail_with(Error::TooManyGivenUp { limit: MAX_GIVEN_UP, cause: error });
            }
            let message = error.to_string();
            let (operation, action) = (Operation::Read, ErrorAction::GiveUp);
            self.outbox.push(Event::Error { operation, action, range: part, message: message.clone() });
            self.failed_ranges.insert(part, message);
        }
    }

    /// Whether a copy that has failed `tries` times is given up if it fails once more.
    pub(super) fn is_last_try(&self, tries: u32) -> bool {
        tries + 1 >= MAX_TRIES && self.config.on_source_error == OnError::Ignore && !self.config.live
    }

    fn failed(&mut self, now: Duration, op: InFlight, failure: Failure) {
        let range = match op.work {
            Work::Scan { range, .. } | Work::Copy { range, .. } | Work::Zero { range, .. } => range,
            Work::Flush | Work::PeriodicFlush | Work::End(_) => ByteRange::default(),
        };
        // First of all the range is dirty again, whatever the policy says. Bits that were set already are
        // news from the guest that arrived meanwhile.
        let units = self.whole_units(range);
        let news = self.dirty.dirty_bytes_in(units.start()..units.end()) > 0;
        self.in_progress.remove(range);
        if op.work.is_flush() {
            self.writes_lost();
            self.durability.flush_ended(now, op.begun);
        } else {
            self.dirty.set(units.start()..units.end());
            // It may have happened all the same; then the next look finds nothing to do, and only a flush
            // makes it last.
            self.durability.wrote(units);
        }

        // No write waits while it is tried again.
        self.lifecycle.resume_guest();
        self.guests.release_reservation();
        let Failure { operation, error } = failure;
        if op.work.is_flush() && error.kind() == block::ErrorKind::WritesLost {
            // The target says that it is as good as new: what it has lost is copied again, without asking the
            // user.
            return;
        }
        let no_space = error.kind() == block::ErrorKind::NoSpace;
        let policy = match operation {
            Operation::Read => self.config.on_source_error,
            Operation::Write => self.config.on_target_error,
        };
        let action = match policy {
            OnError::Report => ErrorAction::Report,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if no_space => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
            OnError::Ignore if op.work.is_flush() => {
                if self.durability.count_failure() < MAX_FLUSH_TRIES || self.config.live {
                    ErrorAction::Ignore
                } else {
                    ErrorAction::Report
                }
            }
            // What the guest has written anew gets new tries. A job on a tap leaves nothing out: it would
            // never be equal.
            OnError::Ignore if op.tries + 1 < MAX_TRIES || news || self.config.live => ErrorAction::Ignore,
            OnError::Ignore => ErrorAction::GiveUp,
        };
        let message = error.to_string();
        self.outbox.push(Event::Error { operation, action, range, message: message.clone() });
        match action {
            ErrorAction::Report => self.fail(operation, error),
            ErrorAction::Stop => self.lifecycle.stop(no_space, &mut self.outbox),
            ErrorAction::Ignore if op.work.is_flush() => {
                self.durability.back_off(now);
            }
            ErrorAction::Ignore => {
                // A scan over a long range says nothing about where the fault is: looking closer is no try.
                let narrowing = range.len() > self.config.operation.max(self.config.detail);
                let tries = if narrowing || news { 1 } else { op.tries + 1 };
                self.retries.put(units, tries, self.config.detail, now);
            }
            ErrorAction::GiveUp if self.failed_ranges.is_full() => {
                self.fail_with(Error::TooManyGivenUp { limit: MAX_GIVEN_UP, cause: error });
            }
            ErrorAction::GiveUp => {
                self.dirty.clear(units.start()..units.end());
                self.failed_ranges.insert(range, message);
                self.counters.passed_over(range.len());
            }
        }
    }

    /// Anything written to the target since the last good flush may be lost: it is dirty again.
    pub(crate) fn writes_lost(&mut self) {
        self.durability.writes_lost(&mut self.dirty);
        self.guests_stay_unflushed();
        self.forget_target();
    }

    /// The target may have lost what it had when it was scanned: zeros that were found there may be none.
    fn forget_target(&mut self) {
        for queued in self.queue.iter_mut() {
            if let CopyAction::Copy { target_zero } = &mut queued.action {
                *target_zero = false;
            }
        }
        for op in &self.in_flight {
            if let Work::Copy { range, target_zero: true, .. } = op.work {
                let units = self.whole_units(range);
                self.dirty.set(units.start()..units.end());
            }
        }
        self.scans_valid_from = self.next_id;
    }

    /// A write of the guest has failed at the target in `range`, which is dirty again.
    pub(super) fn guest_write_failed(&mut self, range: ByteRange, failure: Failure) {
        let Failure { operation, error } = failure;
        let no_space = error.kind() == block::ErrorKind::NoSpace;
        let policy = match operation {
            Operation::Read => self.config.on_source_error,
            Operation::Write => self.config.on_target_error,
        };
        let action = match policy {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if no_space => ErrorAction::Stop,
            OnError::Report | OnError::Enospc | OnError::Auto => ErrorAction::Report,
        };
        self.outbox.push(Event::Error { operation, action, range, message: error.to_string() });
        // No write waits while it is tried again, or for the job to be resumed.
        self.lifecycle.resume_guest();
        match action {
            ErrorAction::Report => self.fail(operation, error),
            ErrorAction::Stop => self.lifecycle.stop(no_space, &mut self.outbox),
            ErrorAction::Ignore | ErrorAction::GiveUp => {}
        }
    }

    fn fail_with(&mut self, error: Error) {
        self.lifecycle.fail(error, &mut self.outbox);
    }

    fn fail(&mut self, operation: Operation, error: block::Error) {
        self.fail_with(match operation {
            Operation::Read => Error::Source(error),
            Operation::Write => Error::Target(error),
        });
    }
}
