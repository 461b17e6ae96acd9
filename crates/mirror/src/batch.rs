//! Batches of operations that one worker takes at once and performs one after the other.
//!
//! A small copy between disks in memory costs less than asking for it and reporting it under the lock that
//! guest writes need too. Slow operations are taken one by one, so that many workers have them in flight.
//! Each worker of the engine has one batch; the core knows nothing of it.

use std::thread;
use std::time::Duration;

use crate::machine::{Action, Done, Work};
use crate::scan::Failure;

/// A batch takes no longer than this, if it goes on as the last one went.
const TIME: Duration = Duration::from_micros(200);
/// The most operations, and the bytes from which on no more are taken.
const OPERATIONS: usize = 16;
const BYTES: u64 = 64 << 10;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) actions: Vec<Action>,
    pub(crate) results: Vec<thread::Result<Result<Done, Failure>>>,
    bytes: u64,
    /// The mean time of the operations of the last batch.
    mean_time: Option<Duration>,
}

impl Batch {
    /// The first one of another batch.
    pub(crate) fn begin(&mut self, action: Action) {
        self.bytes = 0;
        self.actions.push(action);
    }

    /// Whether to take one more; not where the guest may wait for those that are taken (`guest_waits`).
    pub(crate) fn should_extend(&mut self, guest_waits: bool) -> bool {
        let last = self.actions.last().map(|action| action.work);
        let Some(Work::Copy { range, .. } | Work::Scan { range, .. }) = last else { return false };
        self.bytes = self.bytes.saturating_add(range.len());
        let count = u32::try_from(self.actions.len()).unwrap_or(u32::MAX);
        let time = self.mean_time.and_then(|mean_time| mean_time.checked_mul(count + 1));
        self.bytes < BYTES
            && self.actions.len() < OPERATIONS
            && time.is_some_and(|time| time <= TIME)
            && !guest_waits
    }

    /// Records how long all of them took together.
    pub(crate) fn record(&mut self, took: Duration) {
        self.mean_time = took.checked_div(u32::try_from(self.results.len()).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::ByteRange;

    use super::*;
    use crate::machine::Moved;

    /// How many are taken at once after a batch of one that took so long.
    fn taken(took: Duration, work: Work, guest_waits: bool) -> usize {
        let mut batch = Batch::default();
        batch.begin(Action { id: 0, work });
        assert!(!batch.should_extend(false), "nothing is known yet");
        batch.results.push(Ok(Ok(Done::Copied(Moved::default()))));
        batch.record(took);
        batch.actions.clear();
        batch.begin(Action { id: 1, work });
        while batch.should_extend(guest_waits) {
            batch.actions.push(Action { id: 2, work });
        }
        batch.actions.len()
    }

    #[test]
    fn what_is_quick_is_taken_by_the_dozen_and_what_is_slow_one_by_one() {
        let copy = |len| Work::Copy { range: ByteRange::at(0, len), target_zero: false, by_block: false };
        let us = Duration::from_micros;
        assert_eq!(taken(us(5), copy(4096), false), 16);
        assert_eq!(taken(us(40), copy(4096), false), 5);
        assert_eq!(
            taken(us(150), copy(4096), false),
            1,
            "a device that has callers wait gets them in parallel"
        );
        assert_eq!(taken(us(5), copy(32 << 10), false), 2);
        assert_eq!(taken(us(5), copy(1 << 20), false), 1);
        assert_eq!(taken(us(5), copy(4096), true), 1, "a writer would wait for all of them");
        assert_eq!(taken(us(5), Work::Flush, false), 1);
    }
}
