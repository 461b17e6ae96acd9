//! Checkpoint clock: when a job with checkpoints flushes its target. It counts bytes of data, not time.
//!
//! Part of [`Durability`](super::durability). A checkpoint follows a flush, and a flush covers what was
//! written before it began. Must hold: data that no checkpoint covers is at most twice the interval, so
//! that a job that is killed copies no more than that again. Clones do not count: they are done again in no
//! time, or copied where nothing is shared any more.

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct CheckpointClock {
    /// Bytes from one flush to the next; `None` for a job without checkpoints.
    interval: Option<u64>,
    /// Bytes written since the last flush began.
    written: u64,
    /// Bytes that the flush in flight is to cover.
    flushing: u64,
}

impl CheckpointClock {
    /// `interval` is no less than the largest copy.
    pub(super) fn new(interval: Option<u64>) -> Self {
        Self { interval, written: 0, flushing: 0 }
    }

    pub(super) fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
    }

    pub(super) fn flush_begins(&mut self) {
        self.flushing += std::mem::take(&mut self.written);
    }

    pub(super) fn flush_succeeded(&mut self) {
        self.flushing = 0;
    }

    /// All of it will be copied again anyway.
    pub(super) fn writes_lost(&mut self) {
        (self.written, self.flushing) = (0, 0);
    }

    pub(super) fn is_due(&self) -> bool {
        self.interval.is_some_and(|interval| self.written >= interval)
    }

    /// Whether copies of `bytes` may be in flight. Where they may not, a flush is in flight or due, or
    /// another copy is.
    pub(super) fn may_copy(&self, bytes: u64) -> bool {
        let at_risk = self.written + self.flushing + bytes;
        self.interval.is_none_or(|interval| at_risk <= interval.saturating_mul(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_two_intervals_are_at_risk() {
        let mut clock = CheckpointClock::new(Some(100));
        clock.wrote(99);
        assert!(!clock.is_due() && clock.may_copy(100) && !clock.may_copy(102));
        clock.wrote(1);
        assert!(clock.is_due());
        clock.flush_begins();
        assert!(!clock.is_due() && clock.may_copy(100) && !clock.may_copy(101));
        clock.wrote(60);
        assert!(clock.may_copy(40) && !clock.may_copy(41));
        clock.flush_succeeded();
        assert!(clock.may_copy(140) && !clock.may_copy(141), "what was written meanwhile is not covered");
        clock.writes_lost();
        assert!(clock.may_copy(200));
    }

    #[test]
    fn a_job_without_checkpoints_has_no_limit() {
        let mut clock = CheckpointClock::new(None);
        clock.wrote(u64::MAX / 4);
        assert!(!clock.is_due() && clock.may_copy(1 << 40));
    }
}
