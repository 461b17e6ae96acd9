//! What is done next: scans ahead of the data, then the data, within the limits.

use std::time::Duration;

use blockmirror_block::ByteRange;

use super::{Action, Core, InFlight, Next, QueuedExtent, ScanCursor, Work};
use crate::scan::CopyAction;

/// Scans under way together while the first pass streams over large runs, one of which keeps many threads
/// busy. For scattered dirt, which takes one for each small copy, there may be as many as half of the
/// operations.
const MAX_SCANS: usize = 2;
/// A scan is begun while fewer extents than this are queued.
const QUEUE_LOW: usize = 512;

impl Core {
    /// What the calling thread is to do. An action handed out must be reported to
    /// [`finished`](Core::finished), whatever comes of it.
    pub(crate) fn next(&mut self, now: Duration) -> Next {
        self.tick(now);
        self.outbox.worker_asks();
        if self.lifecycle.is_concluded() {
            return Next::Finished;
        }
        if self.lifecycle.is_aborting() {
            return self.next_while_aborting();
        }
        if let Some(ending) = self.lifecycle.take_commit() {
            return self.begin(Work::End(ending), 0);
        }
        if self.lifecycle.is_paused() || self.lifecycle.is_ending() {
            return Next::Wait(None);
        }
        if self.in_flight.len() >= self.depth() {
            return self.outbox.wait_for_time(None);
        }
        self.quiesce_or_resume();
        if let Some(until) = self.pacing.probe_until().filter(|_| !self.lifecycle.is_quiesced()) {
            return self.outbox.wait_for_time(Some(until));
        }
        self.release_reservation_if_done();
        if !self.lifecycle.is_quiesced() && self.durability.is_periodic_flush_due(now) && !self.is_flushing()
        {
            return self.begin(Work::PeriodicFlush, 0);
        }
        if self.wants_scan()
            && let Some(scan) = self.take_scan(now)
        {
            let range = scan.range;
            // Before the scan looks, hence before anything is read.
            self.dirty.clear(range.start()..range.end());
            let first_pass = scan.first_pass;
            let untouched = first_pass && !self.target_written;
            return self.begin(Work::Scan { range, first_pass, untouched }, scan.tries);
        }
        if let Some(reservation) = self.guests.reserved_range() {
            self.queue.turn_to(reservation);
        }
        if let Some(front) = self.queue.front() {
            return self.begin_queued(front, now);
        }
        if !self.in_flight.is_empty() {
            return Next::Wait(self.retries.next_time(now));
        }
        if let Some(wake) = self.retries.next_time(now) {
            return Next::Wait(Some(wake));
        }
        if now < self.durability.not_before() {
            return Next::Wait(Some(self.durability.not_before()));
        }
        if !self.dirty.is_clean() || !self.scans.is_empty() {
            // The guest is writing there. No writer waits for a copy that may not be begun.
            let delay = self.pacing.delay(now);
            if !delay.is_zero() && !self.lifecycle.has_been_ready() {
                return Next::Wait(Some(now.saturating_add(delay)));
            }
            self.reserve_what_is_left();
            return Next::Wait(None);
        }
        // Nothing queued, in flight, waiting or dirty.
        self.when_clean()
    }

    /// Whether a thread that waits need not be woken because of what the guest has done.
    pub(crate) fn guest_makes_no_work(&self) -> bool {
        self.outbox.guest_makes_no_work(self.dirty.is_clean())
    }

    fn is_flushing(&self) -> bool {
        self.in_flight.iter().any(|op| op.work.is_flush())
    }

    pub(super) fn begin(&mut self, work: Work, tries: u32) -> Next {
        let id = self.next_id;
        self.next_id += 1;
        if work.is_flush() {
            self.durability.flush_begins();
            // Their writes may land after the flush has begun.
            self.guests_stay_unflushed();
        }
        if matches!(work, Work::End(_)) {
            self.lifecycle.end_begins();
        }
        self.in_flight.push(InFlight { id, work, tries, begun: self.clock });
        Next::Do(Action { id, work })
    }

    fn wants_scan(&self) -> bool {
        let scans = self.in_flight.iter().filter(|op| matches!(op.work, Work::Scan { .. })).count();
        let scattered = self.scans.is_empty();
        let most = if scattered { MAX_SCANS.max(self.depth() / 2) } else { MAX_SCANS };
        scans < most
            && self.queue.len() < QUEUE_LOW
            && self.queue.copy_bytes() < self.config.buffer.saturating_mul(2)
            && !self.in_flight.iter().any(|op| op.work == Work::Flush)
    }

    /// A range to scan: the rest of one that was begun, a retry whose time has come, or the next dirty run.
    fn take_scan(&mut self, now: Duration) -> Option<ScanCursor> {
        if let Some(mut scan) = self.next_scan() {
            let rest = ByteRange::new(self.end_of_scan(scan.range), scan.range.end());
            if !rest.is_empty() {
                self.scans.push_front(ScanCursor { range: rest, ..scan });
                scan.range = ByteRange::new(scan.range.start(), rest.start());
            }
            return Some(scan);
        }
        let mut retries = std::mem::take(&mut self.retries);
        let due = retries.take_due(now, |range| free_part(range, |range| self.taken_or_in_the_way(range)));
        self.retries = retries;
        let scan = match due {
            Some(due) => ScanCursor { range: due.range, tries: due.tries, first_pass: false },
            None if self.retries.is_full() || self.dirty.dirty_bytes() <= self.retries.bytes() => {
                return None;
            }
            None => {
                let range = self
                    .free_dirty_run(self.cursor, self.config.len)
                    .or_else(|| self.free_dirty_run(0, self.cursor))?;
                let range = ByteRange::new(range.start(), self.end_of_scan(range));
                self.cursor = range.end();
                ScanCursor { range, tries: 0, first_pass: false }
            }
        };
        self.in_progress.insert(scan.range);
        Some(scan)
    }

    /// Where a scan of `range` ends. Where the guest writes to the target itself, what was scanned is cut
    /// into pieces by it, and those are as few as little was.
    fn end_of_scan(&self, range: ByteRange) -> u64 {
        if !self.target_written {
            return range.end();
        }
        range.end().min(range.start().saturating_add(self.config.piece()))
    }

    /// The first part of a walk that was begun in which no writer is in the way.
    fn next_scan(&mut self) -> Option<ScanCursor> {
        for _ in 0..self.scans.len() {
            let scan = self.scans.pop_front()?;
            let Some(part) = free_part(scan.range, |range| self.guest_in_the_way(range)) else {
                self.scans.push_back(scan);
                continue;
            };
            // Of what lies around a writer one piece is left over; it comes later.
            let before = ByteRange::new(scan.range.start(), part.start());
            let after = ByteRange::new(part.end(), scan.range.end());
            if !before.is_empty() {
                self.scans.push_back(ScanCursor { range: before, ..scan });
            }
            if !after.is_empty() {
                self.scans.push_front(ScanCursor { range: after, ..scan });
            }
            return Some(ScanCursor { range: part, ..scan });
        }
        None
    }

    /// The first part of a dirty run that begins in `from..to` that nothing in flight, queued or waiting
    /// touches, in whole units of the bitmap.
    fn free_dirty_run(&self, from: u64, to: u64) -> Option<ByteRange> {
        let waiting = |range| self.retries.first_overlap(range).map(|waiting| waiting.range);
        let mut at = from;
        while at < to {
            let run = self.dirty.next_dirty(at, u64::MAX).filter(|run| run.start < to)?;
            let free = free_part(ByteRange::new(run.start, run.end), |range| {
                [self.taken_or_in_the_way(range), waiting(range)]
                    .into_iter()
                    .flatten()
                    .min_by_key(|r| r.start())
            });
            if free.is_some() {
                return free;
            }
            at = run.end;
        }
        None
    }

    /// The first range in `range`, in whole units of the bitmap, that is taken or that a writer is in the way
    /// of.
    fn taken_or_in_the_way(&self, range: ByteRange) -> Option<ByteRange> {
        let taken = self.in_progress.first_overlap(range).map(|taken| self.whole_units(taken));
        [taken, self.guest_in_the_way(range)].into_iter().flatten().min_by_key(|range| range.start())
    }

    /// `range` in whole units of the dirty bitmap, clipped to the disk.
    pub(crate) fn whole_units(&self, range: ByteRange) -> ByteRange {
        range.align_outward(self.config.detail).intersect(ByteRange::new(0, self.config.len))
    }

    /// Begins the first operation of the first queued extent, if the limits allow.
    fn begin_queued(&mut self, front: QueuedExtent, now: Duration) -> Next {
        // The limit is for the bulk. A job that is ready has to keep up with the guest, or it would never
        // end.
        let limited = !self.lifecycle.has_been_ready();
        let guest = self.guest_state();
        let step = self.pacing.copy_size(&self.config, now, front.range.start(), guest, limited);
        let work = self.first_operation(front, step);
        let (range, moves_data) = match work {
            Work::Copy { range, .. } => (range, true),
            Work::Scan { range, .. } | Work::Zero { range, .. } => (range, false),
            Work::Flush | Work::PeriodicFlush | Work::End(_) => return Next::Wait(None),
        };
        let limited = limited && moves_data;
        // No guest write waits for the limit: what it waits for begins at once, and what follows waits
        // longer.
        if limited && !self.is_urgent(work) {
            let delay = self.pacing.copy_delay(now, range.len());
            if !delay.is_zero() {
                return self.outbox.wait_for_time(Some(now.saturating_add(delay)));
            }
        }
        if let Work::Zero { range, .. } = work {
            let under_way = self.in_flight.iter().map(InFlight::zeroes).sum();
            if !self.pacing.may_zero(range.len(), under_way) {
                return self.outbox.wait_for_time(None);
            }
        }
        if let Work::Copy { .. } = work {
            let buffered: u64 = self.in_flight.iter().map(InFlight::buffer).sum();
            if buffered + range.len() > self.config.buffer {
                return self.outbox.wait_for_time(None);
            }
            // What was marked while it was queued is read now: a guest ahead of the copy makes no work.
            self.dirty.clear(range.start()..range.end());
        }
        if limited {
            self.pacing.account(now, range.len());
        }
        self.queue.begin(range);
        self.begin(work, front.tries)
    }

    fn first_operation(&self, queued: QueuedExtent, step: u64) -> Work {
        let range = queued.range;
        let first = |range: ByteRange, step| range.pieces(step).next().unwrap_or(range);
        // No data is moved: the limits of data operations do not apply. Less than a unit would be data.
        let zero_step = self.pacing.zero_size(&self.config);
        match queued.action {
            CopyAction::Copy { target_zero } => {
                let by_block = self.is_last_try(queued.tries);
                Work::Copy { range: first(range, step), target_zero, by_block }
            }
            CopyAction::Zero | CopyAction::Skip if self.pacing.zeroes_by_data() => {
                Work::Zero { range: first(range, zero_step), metadata_only: false }
            }
            CopyAction::Zero | CopyAction::Skip => {
                // Whole units by metadata, a part of a unit at either end by data. The end of the disk ends a
                // unit.
                let unit = self.config.zero_unit;
                let whole = if range.end() == self.config.len {
                    ByteRange::new(range.align_inward(unit).start(), range.end())
                } else {
                    range.align_inward(unit)
                };
                if whole.is_empty() || range.start() < whole.start() {
                    let end = if whole.is_empty() { range.end() } else { whole.start() };
                    let part = ByteRange::new(range.start(), end);
                    Work::Zero { range: first(part, zero_step), metadata_only: false }
                } else {
                    Work::Zero { range: first(whole, zero_step), metadata_only: true }
                }
            }
        }
    }

    /// Whether a guest write waits for the operation.
    fn is_urgent(&self, work: Work) -> bool {
        let range = match work {
            Work::Copy { range, .. } | Work::Zero { range, .. } => range,
            Work::Scan { .. } | Work::Flush | Work::PeriodicFlush | Work::End(_) => return false,
        };
        self.guests.reserved_range().is_some_and(|reservation| reservation.overlaps(range))
    }

    /// The maximum number of operations in flight.
    pub(super) fn depth(&self) -> usize {
        self.pacing.depth(&self.config, self.guest_state())
    }

    /// Whether an operation is in flight that keeps a device busy.
    pub(super) fn moves_data(&self) -> bool {
        let moves = |work: Work| work.is_flush() || matches!(work, Work::Copy { .. } | Work::Zero { .. });
        self.in_flight.iter().any(|op| moves(op.work))
    }
}

/// The first part of `range` without an obstacle, where `obstacle` finds the first one in a range.
fn free_part(range: ByteRange, obstacle: impl Fn(ByteRange) -> Option<ByteRange>) -> Option<ByteRange> {
    let mut at = range.start();
    while at < range.end() {
        let rest = ByteRange::new(at, range.end());
        match obstacle(rest) {
            None => return Some(rest),
            Some(obstacle) if obstacle.start() > at => return Some(ByteRange::new(at, obstacle.start())),
            Some(obstacle) => at = obstacle.end(),
        }
    }
    None
}
