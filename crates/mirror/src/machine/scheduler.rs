//! Scheduler: what a worker does next. Scans run ahead of the data, then the data, within the limits.

use std::time::Duration;

use blockmirror_block::ByteRange;

use super::work::QueuedExtent;
use super::{Core, Next, Work};
use crate::scan::CopyAction;

/// The most bytes of one clone of an image that no guest uses. Where there is a guest, a clone is as large as
/// a copy: guest writes may wait for it.
const CLONE_SIZE: u64 = 1 << 30;

impl Core {
    /// What the calling worker is to do. An action that is handed out must be reported to
    /// [`on_completion`](Core::on_completion), whatever its result.
    pub(crate) fn next(&mut self, now: Duration) -> Next {
        self.on_timer(now);
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
        let depth = self.pacing.depth(&self.config, self.guest_state());
        if self.work.operations().count() >= depth {
            return self.outbox.wait_for_time(None);
        }
        self.quiesce_or_resume();
        if let Some(until) = self.pacing.probe_until().filter(|_| !self.lifecycle.is_quiesced()) {
            return self.outbox.wait_for_time(Some(until));
        }
        self.release_reservation_if_done();
        if self.is_periodic_flush_due(now) {
            return self.begin(Work::PeriodicFlush, 0);
        }
        if let Some((work, tries)) = self.next_scan(now) {
            return self.begin(work, tries);
        }
        if let Some(queued) = self.work.next_queued(self.guests.reserved_range()) {
            return self.begin_queued(queued, now);
        }
        if !self.work.operations().is_empty() {
            return Next::Wait(self.work.next_retry(now));
        }
        if let Some(until) = self.work.next_retry(now) {
            return Next::Wait(Some(until));
        }
        if now < self.durability.not_before() {
            return Next::Wait(Some(self.durability.not_before()));
        }
        if !self.work.is_all_taken() {
            return self.when_guest_is_in_the_way(now);
        }
        // Nothing queued, in flight, waiting or dirty.
        self.when_clean()
    }

    /// Whether a waiting worker need not be woken after a guest write.
    pub(crate) fn guest_makes_no_work(&self) -> bool {
        self.outbox.guest_makes_no_work(self.work.is_clean())
    }

    /// Hands `work` out, whose range has failed `tries` times.
    pub(super) fn begin(&mut self, work: Work, tries: u32) -> Next {
        if work.is_flush() {
            self.durability.flush_begins();
            // Guest writes at the target may land after the flush has begun.
            self.guests_stay_unflushed();
        }
        if matches!(work, Work::End(_)) {
            self.lifecycle.end_begins();
        }
        Next::Do(self.work.begin(work, tries, self.clock))
    }

    /// Not while the guest is quiesced: the last flush is near.
    fn is_periodic_flush_due(&self, now: Duration) -> bool {
        !self.lifecycle.is_quiesced()
            && self.durability.is_periodic_flush_due(now)
            && !self.work.operations().is_flushing()
    }

    /// A guest write needs a flush; whether a worker has to be woken for it.
    pub(crate) fn flush_soon(&mut self) -> bool {
        self.durability.demand();
        self.is_periodic_flush_due(self.clock)
    }

    /// Whether a guest write may have to wait until the job has made room in its log: the job will, by and
    /// by.
    pub(crate) fn makes_room_in_log(&self) -> bool {
        !self.is_standing()
    }

    fn next_scan(&mut self, now: Duration) -> Option<(Work, u32)> {
        let depth = self.pacing.depth(&self.config, self.guest_state());
        if !self.work.wants_scan(self.config.buffer, depth) {
            return None;
        }
        let queued_too = self.do_queued_writes_count();
        let (guests, granules) = (&self.guests, self.work.granules());
        let scan = self.work.take_scan(now, |range| {
            guests.first_in_the_way(range, queued_too, |write| granules.round(write))
        });
        let (mut work, tries) = scan?;
        if let Work::Scan { by_block, .. } = &mut work {
            *by_block = self.is_last_try(tries);
        }
        Some((work, tries))
    }

    /// Something is left, and guest writes are in the way of it: the job goes next there.
    fn when_guest_is_in_the_way(&mut self, now: Duration) -> Next {
        // No write waits for a copy that may not begin.
        let delay = self.pacing.delay(now);
        if !delay.is_zero() && !self.lifecycle.has_been_ready() {
            return Next::Wait(Some(now.saturating_add(delay)));
        }
        self.reserve_what_is_left();
        Next::Wait(None)
    }

    /// Begins the first operation of a queued extent, if the limits allow.
    fn begin_queued(&mut self, queued: QueuedExtent, now: Duration) -> Next {
        // The limit is for the bulk. A job that is ready has to keep up with the guest, or it would never
        // end.
        let limited = !self.lifecycle.has_been_ready();
        let start = queued.range.start();
        let step = self.pacing.copy_size(&self.config, now, start, self.guest_state(), limited);
        let work = self.first_operation(queued, step);
        let range = work.range();
        let is_copy = matches!(work, Work::Copy { .. });
        let limited = limited && is_copy;
        // No guest write waits for the limit: what it waits for begins at once, and what follows waits
        // longer.
        if limited && !self.guests.reserved_range().is_some_and(|reserved| reserved.overlaps(range)) {
            let delay = self.pacing.copy_delay(now, range.len());
            if !delay.is_zero() {
                return self.outbox.wait_for_time(Some(now.saturating_add(delay)));
            }
        }
        let operations = self.work.operations();
        let fits = match is_copy {
            true => {
                let in_flight = operations.buffered_bytes() + range.len();
                // While the guest is quiesced no periodic flush begins that a copy could wait for.
                let may_copy = self.lifecycle.is_quiesced() || self.durability.may_copy(in_flight);
                in_flight <= self.config.buffer && may_copy
            }
            _ if matches!(work, Work::Clone { .. }) => true,
            false => self.pacing.may_zero(range.len(), operations.zeroed_bytes()),
        };
        if !fits {
            return self.outbox.wait_for_time(None);
        }
        if limited {
            self.pacing.account(now, range.len());
        }
        self.work.take_queued(work);
        self.begin(work, queued.tries)
    }

    /// The first operation of a queued extent, where a copy is at most `step` bytes.
    fn first_operation(&self, queued: QueuedExtent, step: u64) -> Work {
        let range = queued.range;
        let first = |range: ByteRange, step| range.pieces(step).next().unwrap_or(range);
        // A zeroing moves no data, so the limits of copies do not apply.
        let zero_step = self.pacing.zero_size(&self.config);
        match queued.action {
            // A clone that cannot be done is no failure, so what failed is not the clone itself.
            CopyAction::Clone { target_zero } if queued.tries == 0 => {
                let step = if self.config.live { step } else { CLONE_SIZE };
                Work::Clone { range: first(range, step), target_zero }
            }
            CopyAction::Copy { target_zero } | CopyAction::Clone { target_zero } => {
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
}
