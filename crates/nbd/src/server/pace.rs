//! Whether requests of one kind are so quick that handing them to another thread would cost more than doing them.
//!
//! The reader of a connection does quick requests itself, one after the other, and sends their replies together. A device that
//! makes callers wait gets its requests in parallel instead. Which of the two a device is shows in how long it takes on
//! average, and may change: a cache gets cold, a mirror job begins. The average counts, not how many are slow: a few that
//! wait for a lock, or for a thread that holds one and has lost the processor, would wait among many threads too, and longer.
//!
//! On a busy machine a request also takes long when its thread has to let others have the processor. More threads would only
//! make that worse, so it does not count: the kernel tells whether a thread has waited of its own accord.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// Requests are quick if they take no longer than this on average ...
const QUICK: Duration = Duration::from_micros(30);
/// ... and this for each page.
const QUICK_PAGE: Duration = Duration::from_micros(2);
const PAGE: u64 = 4096;
/// Longer ones count as if they took this: one makes the kind slow for some sixty quick ones.
const LONGEST: Duration = Duration::from_millis(5);
/// The average is over about so many requests.
const WEIGHT: u32 = 64;

/// The memory of one kind of requests on one export: the average, in nanoseconds. Racing updates may lose one: it is a guess
/// anyway.
#[derive(Default)]
pub(crate) struct Pace(AtomicU32);

impl Pace {
    /// Whether the next one is likely to be quick.
    pub(crate) fn is_quick(&self) -> bool {
        u128::from(self.0.load(Ordering::Relaxed)) <= QUICK.as_nanos()
    }

    /// A request begins, on this thread.
    pub(crate) fn start(&self) -> Stopwatch {
        // As long as all are quick, none is looked at closely.
        let suspect = u128::from(self.0.load(Ordering::Relaxed)) > QUICK.as_nanos() / 2;
        Stopwatch { waits: suspect.then(waits).flatten(), started: Instant::now() }
    }

    /// It has ended, and has moved `bytes` bytes.
    pub(crate) fn stop(&self, watch: &Stopwatch, bytes: u64) {
        let took = watch.started.elapsed();
        let preempted = took > QUICK && watch.waits.is_some_and(|before| waits() == Some(before));
        self.record(if preempted { Duration::ZERO } else { took }, bytes);
    }

    /// Learns from one that moved `bytes` bytes and took `took`.
    fn record(&self, took: Duration, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let took = took.saturating_sub(QUICK_PAGE.saturating_mul(pages)).min(LONGEST);
        let took = u32::try_from(took.as_nanos()).unwrap_or(u32::MAX);
        let average = self.0.load(Ordering::Relaxed);
        let next = average - average / WEIGHT + took / WEIGHT;
        if next != average {
            self.0.store(next, Ordering::Relaxed);
        }
    }
}

/// Times one request.
pub(crate) struct Stopwatch {
    started: Instant,
    /// How often the thread had waited before, if that is looked at.
    waits: Option<i64>,
}

/// How often this thread has waited for something and let the processor go.
fn waits() -> Option<i64> {
    getrusage(UsageWho::RUSAGE_THREAD).ok().map(|usage| usage.voluntary_context_switches())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    /// Writers of a mirrored disk wait for each other's locks now and then. Once that made their requests be spread over many
    /// threads, which then waited for processors: 99 of 100 took three times as long.
    #[test]
    fn a_few_slow_requests_do_not_turn_the_scale_and_many_do() {
        let pace = Pace::default();
        for i in 0..10_000 {
            pace.record(us(if i % 10 == 0 { 150 } else { 8 }), 4096);
            assert!(pace.is_quick());
        }
        for _ in 0..40 {
            pace.record(us(100), 4096);
        }
        assert!(!pace.is_quick());
        // A cache with few misses that are long is worth several threads.
        let pace = Pace::default();
        for i in 0..200 {
            pace.record(us(if i % 10 == 0 { 1000 } else { 3 }), 4096);
        }
        assert!(!pace.is_quick());
    }

    #[test]
    fn one_that_waited_is_enough_and_quick_ones_win_back() {
        let pace = Pace::default();
        pace.record(Duration::from_millis(100), 0);
        assert!(!pace.is_quick());
        for _ in 0..100 {
            pace.record(us(1), 0);
        }
        assert!(pace.is_quick());
    }

    #[test]
    fn long_requests_may_take_longer() {
        let pace = Pace::default();
        for _ in 0..1000 {
            pace.record(us(500), 1 << 20);
        }
        assert!(pace.is_quick());
    }

    #[test]
    fn who_lost_the_processor_was_not_slow_and_who_waited_was() {
        let pace = Pace::default();
        pace.record(us(1300), 0);
        let ended_before = |time: Duration, wait: bool| {
            let mut watch = pace.start();
            assert!(watch.waits.is_some());
            watch.started = watch.started.checked_sub(time).unwrap();
            if wait {
                std::thread::sleep(us(1));
            }
            pace.stop(&watch, 4096);
        };
        // Nothing here waits, so that the time was somebody else's.
        ended_before(Duration::from_millis(20), false);
        assert!(pace.is_quick());
        ended_before(Duration::from_millis(20), true);
        assert!(!pace.is_quick());
    }
}
