//! Whether requests of one kind are done sooner by the reader of a connection, one after the other, or by
//! many threads.
//!
//! The reader does quick requests itself and sends their replies together; handing each to another thread
//! would cost more than doing it. A device that makes callers wait gets its requests in parallel instead.
//! Which of the two a device is shows in how long it takes on average, and may change: a cache gets cold, a
//! mirror job begins. The average counts, not how many are slow.
//!
//! For short writes slow alone is not enough. They may wait for a lock that each of them needs, such as the
//! one that the kernel holds while it writes to a file, or for processors; many threads then wait longer, and
//! wake each other for nothing. So what a write costs when it is spread is measured too: the time that it
//! takes, shared among those that are under way at the same time. What was learned of the other way fades, so
//! that it is tried again. What is really slow is never the reader's.
//!
//! On a busy machine a request also takes long when its thread has to let others have the processor. More
//! threads would only make that worse, so it does not count: the kernel tells whether a thread has waited of
//! its own accord.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// Requests are quick if they take no longer than this on average ...
const QUICK: Duration = Duration::from_micros(30);
/// ... and this for each page.
const QUICK_PAGE: Duration = Duration::from_micros(2);
const PAGE: u64 = 4096;
/// Nothing that takes longer on average is the reader's, whatever it costs when it is spread.
const SLOW: Duration = Duration::from_micros(250);
/// Those that take longer count as if they took this: one makes the kind slow for some sixty quick ones.
const LONGEST: Duration = Duration::from_millis(5);
/// The same for writes: one in a hundred that waits for a lock whose holder has lost its processor does not
/// make them slow.
const LONGEST_WRITE: Duration = Duration::from_millis(1);
/// An average is over about so many requests.
const WEIGHT: u32 = 64;
/// What is known of one way fades by half in about so many requests that go the other way.
const HALF_LIFE: u32 = 2048;

/// The memory of one kind of requests on one export. Racing updates may lose one: it is a guess anyway.
pub(crate) struct Pace {
    longest: Duration,
    /// They may take longer together than one after the other.
    may_queue: bool,
    /// What one costs that the reader does.
    alone: Average,
    /// What one costs that is spread.
    spread: Average,
    /// Those that are spread and under way.
    under_way: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            longest: LONGEST,
            may_queue: false,
            alone: Average::default(),
            spread: Average::default(),
            under_way: AtomicU32::new(0),
        }
    }
}

impl Pace {
    /// That of writes.
    pub(crate) fn of_writes() -> Self {
        Self { longest: LONGEST_WRITE, may_queue: true, ..Self::default() }
    }

    /// Whether the reader had better do the next one itself.
    pub(crate) fn is_quick(&self) -> bool {
        let alone = self.alone.get();
        alone <= QUICK || self.may_queue && alone <= SLOW && alone <= self.spread.get()
    }

    /// The reader begins one.
    pub(crate) fn start_alone(&self) -> Stopwatch<'_> {
        Stopwatch { pace: self, started: Instant::now(), others: None, waits: self.look() }
    }

    /// A thread begins one while others may do more.
    pub(crate) fn start_spread(&self) -> Stopwatch<'_> {
        let others = self.under_way.fetch_add(1, Ordering::Relaxed);
        // What it costs to spread them includes that they take processors from each other.
        let waits = if self.may_queue { None } else { self.look() };
        Stopwatch { pace: self, started: Instant::now(), others: Some(others), waits }
    }

    /// How often this thread has waited, unless all requests are quick: then none is looked at closely.
    fn look(&self) -> Option<i64> {
        if self.alone.get() > QUICK / 2 { waits() } else { None }
    }

    /// Learns from one that took `took` while `others` were under way, or that the reader did.
    fn record(&self, took: Duration, others: Option<u32>) {
        let cost = |shares: u32| (took / shares).min(self.longest);
        match others {
            None => {
                self.alone.learn(cost(1));
                self.spread.fade();
            }
            // It might as well have been the reader, but then the next one would have had to wait.
            Some(0) => self.alone.learn(cost(1)),
            // Where the reader is not to try, what they take tells when they are quick again.
            Some(_) if !self.may_queue || self.alone.get() > SLOW => self.alone.learn(cost(1)),
            Some(others) => {
                self.spread.learn(cost(others.saturating_add(1)));
                self.alone.fade();
            }
        }
    }
}

/// Times one request.
pub(crate) struct Stopwatch<'a> {
    pace: &'a Pace,
    started: Instant,
    /// `None` if the reader does it.
    others: Option<u32>,
    /// How often the thread had waited before, if that is looked at.
    waits: Option<i64>,
}

impl Stopwatch<'_> {
    /// The request has ended, and has moved `bytes` bytes. One that is dropped instead teaches nothing.
    pub(crate) fn stop(self, bytes: u64) {
        let took = self.started.elapsed();
        let preempted = took > QUICK && self.waits.is_some_and(|before| waits() == Some(before));
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let took = if preempted { Duration::ZERO } else { took };
        let took = took.saturating_sub(QUICK_PAGE.saturating_mul(pages));
        self.pace.record(took, self.others);
    }
}

impl Drop for Stopwatch<'_> {
    fn drop(&mut self) {
        if self.others.is_some() {
            self.pace.under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A sliding average, in nanoseconds.
#[derive(Default)]
struct Average(AtomicU32);

impl Average {
    fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed).into())
    }

    fn learn(&self, cost: Duration) {
        let cost = u32::try_from(cost.as_nanos()).unwrap_or(u32::MAX);
        let average = self.0.load(Ordering::Relaxed);
        self.set(average, average - average / WEIGHT + cost / WEIGHT);
    }

    fn fade(&self) {
        let average = self.0.load(Ordering::Relaxed);
        self.set(average, average - average / (HALF_LIFE * 3 / 2));
    }

    fn set(&self, before: u32, after: u32) {
        // Most often nothing changes, and what all threads look at had better not be written then.
        if before != after {
            self.0.store(after, Ordering::Relaxed);
        }
    }
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

    /// Writers of a mirrored disk wait for each other's locks now and then. Once that made their requests be
    /// spread over many threads, which then waited for processors: 99 of 100 took three times as long.
    #[test]
    fn a_few_slow_requests_do_not_turn_the_scale_and_many_do() {
        let pace = Pace::default();
        for i in 0..10_000 {
            pace.record(us(if i % 10 == 0 { 150 } else { 8 }), None);
            assert!(pace.is_quick());
        }
        for _ in 0..40 {
            pace.record(us(100), None);
        }
        assert!(!pace.is_quick());
        // A cache with few misses that are long is worth several threads.
        let pace = Pace::default();
        for i in 0..200 {
            pace.record(us(if i % 10 == 0 { 1000 } else { 3 }), None);
        }
        assert!(!pace.is_quick());
    }

    #[test]
    fn one_that_waited_is_enough_and_quick_ones_win_back() {
        let pace = Pace::default();
        pace.record(Duration::from_secs(1), None);
        assert!(!pace.is_quick());
        for _ in 0..100 {
            pace.record(us(1), Some(0));
        }
        assert!(pace.is_quick());
    }

    /// A copy wrote to the file that the guest wrote to, and each write had to wait for it. Sixteen threads
    /// then queued for the file's lock in the kernel, one behind the other, and the guest got a quarter of
    /// what one thread did for it.
    #[test]
    fn requests_are_not_spread_where_they_only_wait_for_each_other() {
        let (alone, in_all) = (us(100), us(5000));
        let pace = Pace::of_writes();
        let mut spread = 0;
        for _ in 0..100_000 {
            if pace.is_quick() {
                pace.record(alone, None);
            } else {
                pace.record(in_all, Some(15));
                spread += 1;
            }
        }
        assert!((50..10_000).contains(&spread), "tried now and then: {spread}");
    }

    #[test]
    fn requests_stay_spread_where_that_helps_until_they_are_quick() {
        let pace = Pace::of_writes();
        let mut spread = 0;
        for _ in 0..100_000 {
            if pace.is_quick() {
                pace.record(us(200), None);
            } else {
                pace.record(us(250), Some(15));
                spread += 1;
            }
        }
        assert!(spread > 98_000, "{spread}");
        let mut spread = 0;
        for _ in 0..100_000 {
            if pace.is_quick() {
                pace.record(us(3), None);
            } else {
                pace.record(us(20), Some(3));
                spread += 1;
            }
        }
        assert!(spread < 10_000, "{spread}");
    }

    /// Whatever their number, on a slow device each takes so long that nothing behind one may wait for it.
    #[test]
    fn slow_requests_are_always_spread() {
        for pace in [Pace::default(), Pace::of_writes()] {
            for _ in 0..3 {
                pace.record(Duration::from_millis(5), None);
            }
            for others in 0..40 {
                for _ in 0..200 {
                    pace.record(Duration::from_millis(50), Some(others));
                    assert!(!pace.is_quick(), "{others}");
                }
            }
        }
    }

    #[test]
    fn long_requests_may_take_longer() {
        let pace = Pace::of_writes();
        let begun_before = |time: Duration| {
            let mut watch = pace.start_spread();
            watch.started = watch.started.checked_sub(time).unwrap();
            watch
        };
        for _ in 0..100 {
            begun_before(us(400)).stop(1 << 20);
        }
        assert!(pace.is_quick());
        for _ in 0..100 {
            begun_before(us(400)).stop(4096);
        }
        assert!(!pace.is_quick());
    }

    #[test]
    fn those_under_way_are_counted_until_they_end_in_any_way() {
        let pace = Pace::default();
        let (first, second) = (pace.start_spread(), pace.start_spread());
        assert_eq!((first.others, second.others), (Some(0), Some(1)));
        drop(first);
        second.stop(0);
        pace.start_alone().stop(0);
        assert_eq!(pace.start_spread().others, Some(0));
    }

    #[test]
    fn who_lost_the_processor_was_not_slow_and_who_waited_was() {
        let pace = Pace::default();
        pace.record(us(1300), None);
        let ended_before = |time: Duration, wait: bool| {
            let mut watch = pace.start_alone();
            assert!(watch.waits.is_some());
            watch.started = watch.started.checked_sub(time).unwrap();
            if wait {
                std::thread::sleep(us(1));
            }
            watch.stop(4096);
        };
        // Nothing here waits, so the time was spent elsewhere.
        ended_before(Duration::from_millis(20), false);
        assert!(pace.is_quick());
        ended_before(Duration::from_millis(20), true);
        assert!(!pace.is_quick());
    }
}
