//! Making durable on the way what was written to a target that may forget it.
//!
//! A server that is killed, or whose host is lost, may come back without what was not flushed, and the job
//! then has to copy again whatever it wrote since the last flush. Without this that is the whole disk,
//! however far the copy had come.
//!
//! Other operations go on meanwhile. What they write counts as not flushed, whether it lands before the flush
//! or after.

use std::time::Duration;

use super::{Core, Work};
use crate::scan::CopyAction;

/// Of the time of one thread, flushes take at most one part in so many.
const PART: u32 = 4;

impl Core {
    /// Whether it is time to make durable what was written. Not while the guest is held: the last flush is
    /// near.
    pub(super) fn is_periodic_flush_due(&self, now: Duration) -> bool {
        self.config.flush_interval.is_some()
            && now >= self.next_periodic_flush
            && now >= self.flush_not_before
            && !self.quiesced
            && !self.unflushed.is_clean()
            && !self.in_flight.iter().any(|op| op.work.is_flush())
    }

    /// A flush that began at `begun` is over.
    pub(super) fn periodic_flush_ended(&mut self, now: Duration, begun: Duration) {
        let Some(every) = self.config.flush_interval else { return };
        let took = now.saturating_sub(begun);
        self.next_periodic_flush = now.saturating_add(every.max(took.saturating_mul(PART - 1)));
    }

    /// The target may have lost what it held when it was last looked at: zeros that were found there may be
    /// none.
    pub(super) fn forget_target(&mut self) {
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

    /// When a job that has nothing to do looks whether what the guest writes to the target is to be made
    /// durable.
    pub(super) fn next_flush_check(&self) -> Option<Duration> {
        self.config.flush_interval.map(|every| self.next_periodic_flush.max(self.clock.saturating_add(every)))
    }
}
