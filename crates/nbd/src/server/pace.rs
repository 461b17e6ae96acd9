//! Whether requests of one kind are so quick that handing them to another thread would cost more than doing them.
//!
//! The reader of a connection does quick requests itself, one after the other, and sends their replies together. A device that
//! makes callers wait gets its requests in parallel instead. Which of the two a device is shows in how long it takes, and
//! may change: a cache gets cold, a mirror job begins.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A request is quick if it takes no longer than this ...
const QUICK: Duration = Duration::from_micros(30);
/// ... and this for each page.
const QUICK_PAGE: Duration = Duration::from_micros(2);
const PAGE: u64 = 4096;
/// A request that takes this long was waiting for something: one is enough.
const WAITED: Duration = Duration::from_millis(5);

/// What a slow request adds; a quick one takes 1 away. One slow request in twelve or more turns the scale.
const SLOW_WEIGHT: u32 = 12;
/// From here on the kind counts as slow.
const SLOW_FROM: u32 = 36;
/// Most that is remembered: so many quick requests later the kind counts as quick again.
const MOST: u32 = 256;

/// The memory of one kind of requests on one export. Racing updates may lose one: it is a guess anyway.
#[derive(Default)]
pub(crate) struct Pace(AtomicU32);

impl Pace {
    /// Whether the next one is likely to be quick.
    pub(crate) fn is_quick(&self) -> bool {
        self.0.load(Ordering::Relaxed) < SLOW_FROM
    }

    /// Learns from one that moved `bytes` bytes and took `took`.
    pub(crate) fn record(&self, took: Duration, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let score = self.0.load(Ordering::Relaxed);
        let next = if took <= QUICK.saturating_add(QUICK_PAGE.saturating_mul(pages)) {
            score.saturating_sub(1)
        } else if took >= WAITED {
            MOST
        } else {
            (score + SLOW_WEIGHT).min(MOST)
        };
        if next != score {
            self.0.store(next, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_slow_requests_do_not_turn_the_scale_and_many_do() {
        let pace = Pace::default();
        for i in 0..1000 {
            pace.record(Duration::from_micros(if i % 20 == 0 { 100 } else { 3 }), 4096);
            assert!(pace.is_quick());
        }
        for _ in 0..4 {
            pace.record(Duration::from_micros(100), 4096);
        }
        assert!(!pace.is_quick());
    }

    #[test]
    fn one_that_waited_is_enough_and_quick_ones_win_back() {
        let pace = Pace::default();
        pace.record(Duration::from_millis(100), 0);
        assert!(!pace.is_quick());
        for _ in 0..MOST {
            pace.record(Duration::from_micros(1), 0);
        }
        assert!(pace.is_quick());
    }

    #[test]
    fn long_requests_may_take_longer() {
        let pace = Pace::default();
        for _ in 0..100 {
            pace.record(Duration::from_micros(300), 1 << 20);
        }
        assert!(pace.is_quick());
    }
}
