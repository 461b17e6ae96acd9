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
use crate::survey::Need;

/// Of the time of one thread, flushes take at most one part in so many.
const PART: u32 = 4;

impl Core {
    /// Whether it is time to make durable what was written. Not while the guest is held: the last flush is
    /// near.
    pub(super) fn is_to_secure(&self, now: Duration) -> bool {
        self.config.secure_every.is_some()
            && now >= self.secure_not_before
            && now >= self.flush_not_before
            && !self.held
            && !self.unflushed.is_clean()
            && !self.in_flight.iter().any(|op| op.work.is_flush())
    }

    /// A flush that began at `begun` is over.
    pub(super) fn secured(&mut self, now: Duration, begun: Duration) {
        let Some(every) = self.config.secure_every else { return };
        let took = now.saturating_sub(begun);
        self.secure_not_before = now.saturating_add(every.max(took.saturating_mul(PART - 1)));
    }

    /// The target may have lost what it held when it was last looked at: zeros that were found there may be
    /// none.
    pub(super) fn forget_target(&mut self) {
        for queued in self.queue.iter_mut() {
            if let Need::Copy { target_zero } = &mut queued.need {
                *target_zero = false;
            }
        }
        for op in &self.in_flight {
            if let Work::Copy { range, target_zero: true, .. } = op.work {
                let units = self.whole_units(range);
                self.dirty.set(units.start()..units.end());
            }
        }
        self.doubted_before = self.next_id;
    }

    /// When a job that has nothing to do looks whether what the guest writes to the target is to be made
    /// durable.
    pub(super) fn looks_again_at(&self) -> Option<Duration> {
        self.config.secure_every.map(|every| self.secure_not_before.max(self.clock.saturating_add(every)))
    }
}
