//! Size of zeroing operations: they carry no data, so they are sized by the time they take, not by the
//! buffer.
//!
//! A device that zeroes by metadata does a gibibyte in a moment; one that writes zeros to a slow disk must
//! not be busy for seconds with one call, because a cancel, and a guest write to the same range, wait for its
//! end. Pure: time is an argument. Must hold: the size is a power of two, so that operations end on borders
//! of whatever unit the device discards in.

use std::time::Duration;

use crate::machine::config::floor_power_of_two;

/// Size of the first operations.
const FIRST: u64 = 16 << 20;
/// Maximum size.
const MOST: u64 = 1 << 30;
/// Minimum size, but at the end of a range.
const LEAST: u64 = 1 << 20;
/// An operation that takes longer than this was too long.
const TIME: Duration = Duration::from_millis(100);
/// Operations of full size under way together.
const TOGETHER: u64 = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Zeroing {
    step: u64,
    /// What one operation may take.
    time: Duration,
}

impl Zeroing {
    /// `budget` is what the job may add to a guest write, if that is bounded.
    pub(super) fn new(budget: Option<Duration>) -> Self {
        Self { step: FIRST, time: budget.map_or(TIME, |budget| budget.min(TIME)) }
    }

    /// The most bytes of the next operation.
    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// Whether one more of `bytes` may begin while `under_way` bytes are being zeroed.
    pub(super) fn may_begin(&self, bytes: u64, under_way: u64) -> bool {
        under_way == 0 || under_way.saturating_add(bytes) <= self.step.saturating_mul(TOGETHER)
    }

    /// An operation of `bytes` took `time`.
    pub(super) fn took(&mut self, bytes: u64, time: Duration) {
        if time > self.time {
            self.shrink_below(bytes);
        } else if bytes == self.step && time <= self.time / 2 {
            // A longer one was begun before the size shrank.
            self.step = (self.step * 2).min(MOST);
        }
    }

    /// A guest write waits for an operation of `bytes`.
    pub(super) fn guest_waits(&mut self, bytes: u64) {
        self.shrink_below(bytes);
    }

    /// Several operations of one size shrink it once.
    fn shrink_below(&mut self, bytes: u64) {
        let half = (floor_power_of_two(bytes) / 2).max(LEAST);
        self.step = self.step.min(half);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The operations that zero `len` bytes at `rate` bytes a second, and the longest time of one.
    fn zero(mut zeroing: Zeroing, len: u64, rate: u64) -> (usize, Duration) {
        let (mut at, mut calls, mut longest) = (0, 0, Duration::ZERO);
        while at < len {
            let bytes = zeroing.step().min(len - at);
            let time = Duration::from_micros(bytes * 1_000_000 / rate);
            zeroing.took(bytes, time);
            (at, calls, longest) = (at + bytes, calls + 1, longest.max(time));
        }
        (calls, longest)
    }

    #[test]
    fn a_fast_device_gets_few_operations_and_a_slow_one_short_ones() {
        assert_eq!(zero(Zeroing::new(None), 100 << 30, u64::MAX >> 30).0, 106);
        let (_, longest) = zero(Zeroing::new(None), 4 << 30, 200 * MIB);
        assert!(longest <= TIME, "{longest:?}");
        // Where even the first operation is too long, the next one is half of it.
        let mut slow = Zeroing::new(None);
        slow.took(FIRST, TIME * 2);
        slow.took(FIRST, TIME * 2);
        assert_eq!(slow.step(), FIRST / 2);
        let (calls, longest) = zero(Zeroing::new(Some(TIME / 10)), 1 << 30, 200 * MIB);
        assert!(calls > 500 && longest <= TIME, "{calls} {longest:?}");
    }

    #[test]
    fn a_guest_write_that_waits_makes_operations_shorter_down_to_a_least() {
        let mut zeroing = Zeroing::new(None);
        for _ in 0..10 {
            zeroing.took(zeroing.step(), Duration::ZERO);
        }
        assert_eq!(zeroing.step(), MOST);
        for _ in 0..20 {
            zeroing.guest_waits(zeroing.step());
        }
        assert_eq!(zeroing.step(), LEAST);
        assert!(
            zeroing.may_begin(MIB, 0) && zeroing.may_begin(MIB, 3 * MIB) && !zeroing.may_begin(MIB, 4 * MIB)
        );
    }
}
