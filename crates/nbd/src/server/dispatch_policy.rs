//! Whether requests of one kind run *inline*, by the reader of a connection one after the other, or *in
//! parallel*, by many workers.
//!
//! The reader runs quick requests itself and sends their replies together: a change of threads would cost
//! more than the request. A device that makes callers wait gets its requests in parallel. Which of the two a
//! device is shows in its average service time, and may change: a cache gets cold, a mirror job begins.
//!
//! For short writes the service time alone does not decide. They may all wait for one lock, such as the
//! kernel's inode lock, or for processors; many threads then only wait longer. So the cost of a parallel
//! write is measured too: its service time divided by the writes in flight. What was measured of the other
//! way decays, so that it is tried again. Really slow writes always run in parallel.
//!
//! On a busy machine a request also takes long because its thread was preempted. More threads would make that
//! worse, so it does not count: `getrusage` tells voluntary context switches apart.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// Requests are quick if they take no longer than this on average ...
const QUICK: Duration = Duration::from_micros(30);
/// ... and this for each page.
const QUICK_PAGE: Duration = Duration::from_micros(2);
const PAGE: u64 = 4096;
/// Requests that take longer on average never run inline, whatever they cost in parallel.
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

/// Measurements of one kind of requests on one export. Racing updates may lose one, which does no harm.
pub(crate) struct DispatchPolicy {
    longest: Duration,
    /// In parallel they may take longer than one after the other.
    may_contend: bool,
    /// Cost of one that runs inline.
    inline: Average,
    /// Cost of one that runs in parallel.
    parallel: Average,
    /// Parallel ones in flight.
    in_flight: AtomicU32,
}

impl Default for DispatchPolicy {
    fn default() -> Self {
        Self {
            longest: LONGEST,
            may_contend: false,
            inline: Average::default(),
            parallel: Average::default(),
            in_flight: AtomicU32::new(0),
        }
    }
}

impl DispatchPolicy {
    /// The policy for writes.
    pub(crate) fn for_writes() -> Self {
        Self { longest: LONGEST_WRITE, may_contend: true, ..Self::default() }
    }

    /// Whether the reader runs the next one itself.
    pub(crate) fn runs_inline(&self) -> bool {
        let inline = self.inline.get();
        inline <= QUICK || self.may_contend && inline <= SLOW && inline <= self.parallel.get()
    }

    /// Times one that the reader runs.
    pub(crate) fn start_inline(&self) -> DispatchTimer<'_> {
        DispatchTimer { policy: self, started: Instant::now(), others: None, switches: self.switches() }
    }

    /// Times one that a worker runs.
    pub(crate) fn start_parallel(&self) -> DispatchTimer<'_> {
        let others = self.in_flight.fetch_add(1, Ordering::Relaxed);
        // The cost of parallel writes includes the processors that they take from each other.
        let switches = if self.may_contend { None } else { self.switches() };
        DispatchTimer { policy: self, started: Instant::now(), others: Some(others), switches }
    }

    /// Voluntary context switches of this thread; not asked for while all requests are quick.
    fn switches(&self) -> Option<i64> {
        if self.inline.get() > QUICK / 2 { voluntary_switches() } else { None }
    }

    /// Records one that took `took` while `others` were in flight, or (`None`) that ran inline.
    fn record(&self, took: Duration, others: Option<u32>) {
        let cost = |shares: u32| (took / shares).min(self.longest);
        match others {
            None => {
                self.inline.record(cost(1));
                self.parallel.decay();
            }
            // Alone in flight: the same as inline, except that the next one need not wait.
            Some(0) => self.inline.record(cost(1)),
            // Where inline is not tried, their service time shows when they are quick again.
            Some(_) if !self.may_contend || self.inline.get() > SLOW => self.inline.record(cost(1)),
            Some(others) => {
                self.parallel.record(cost(others.saturating_add(1)));
                self.inline.decay();
            }
        }
    }
}

/// Times one request.
pub(crate) struct DispatchTimer<'a> {
    policy: &'a DispatchPolicy,
    started: Instant,
    /// `None` if it runs inline.
    others: Option<u32>,
    /// Voluntary context switches before, if they are looked at.
    switches: Option<i64>,
}

impl DispatchTimer<'_> {
    /// The request has ended and moved `bytes` bytes. One that is dropped instead is not recorded.
    pub(crate) fn stop(self, bytes: u64) {
        let took = self.started.elapsed();
        let preempted =
            took > QUICK && self.switches.is_some_and(|before| voluntary_switches() == Some(before));
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        let took = if preempted { Duration::ZERO } else { took };
        let took = took.saturating_sub(QUICK_PAGE.saturating_mul(pages));
        self.policy.record(took, self.others);
    }
}

impl Drop for DispatchTimer<'_> {
    fn drop(&mut self) {
        if self.others.is_some() {
            self.policy.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// An exponential moving average, in nanoseconds.
#[derive(Default)]
struct Average(AtomicU32);

impl Average {
    fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed).into())
    }

    fn record(&self, cost: Duration) {
        let cost = u32::try_from(cost.as_nanos()).unwrap_or(u32::MAX);
        let average = self.0.load(Ordering::Relaxed);
        self.set(average, average - average / WEIGHT + cost / WEIGHT);
    }

    fn decay(&self) {
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

/// Voluntary context switches of this thread.
fn voluntary_switches() -> Option<i64> {
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
        let policy = DispatchPolicy::default();
        for i in 0..10_000 {
            policy.record(us(if i % 10 == 0 { 150 } else { 8 }), None);
            assert!(policy.runs_inline());
        }
        for _ in 0..40 {
            policy.record(us(100), None);
        }
        assert!(!policy.runs_inline());
        // A cache with few misses that are long is worth several threads.
        let policy = DispatchPolicy::default();
        for i in 0..200 {
            policy.record(us(if i % 10 == 0 { 1000 } else { 3 }), None);
        }
        assert!(!policy.runs_inline());
    }

    #[test]
    fn one_that_waited_is_enough_and_quick_ones_win_back() {
        let policy = DispatchPolicy::default();
        policy.record(Duration::from_secs(1), None);
        assert!(!policy.runs_inline());
        for _ in 0..100 {
            policy.record(us(1), Some(0));
        }
        assert!(policy.runs_inline());
    }

    /// A copy wrote to the file that the guest wrote to, and each write had to wait for it. Sixteen threads
    /// then queued for the file's lock in the kernel, one behind the other, and the guest got a quarter of
    /// what one thread did for it.
    #[test]
    fn requests_are_not_spread_where_they_only_wait_for_each_other() {
        let (alone, in_all) = (us(100), us(5000));
        let policy = DispatchPolicy::for_writes();
        let mut spread = 0;
        for _ in 0..100_000 {
            if policy.runs_inline() {
                policy.record(alone, None);
            } else {
                policy.record(in_all, Some(15));
                spread += 1;
            }
        }
        assert!((50..10_000).contains(&spread), "tried now and then: {spread}");
    }

    #[test]
    fn requests_stay_spread_where_that_helps_until_they_are_quick() {
        let policy = DispatchPolicy::for_writes();
        let mut spread = 0;
        for _ in 0..100_000 {
            if policy.runs_inline() {
                policy.record(us(200), None);
            } else {
                policy.record(us(250), Some(15));
                spread += 1;
            }
        }
        assert!(spread > 98_000, "{spread}");
        let mut spread = 0;
        for _ in 0..100_000 {
            if policy.runs_inline() {
                policy.record(us(3), None);
            } else {
                policy.record(us(20), Some(3));
                spread += 1;
            }
        }
        assert!(spread < 10_000, "{spread}");
    }

    /// Whatever their number, on a slow device each takes so long that nothing behind one may wait for it.
    #[test]
    fn slow_requests_are_always_spread() {
        for policy in [DispatchPolicy::default(), DispatchPolicy::for_writes()] {
            for _ in 0..3 {
                policy.record(Duration::from_millis(5), None);
            }
            for others in 0..40 {
                for _ in 0..200 {
                    policy.record(Duration::from_millis(50), Some(others));
                    assert!(!policy.runs_inline(), "{others}");
                }
            }
        }
    }

    #[test]
    fn long_requests_may_take_longer() {
        let policy = DispatchPolicy::for_writes();
        let begun_before = |time: Duration| {
            let mut watch = policy.start_parallel();
            watch.started = watch.started.checked_sub(time).unwrap();
            watch
        };
        for _ in 0..100 {
            begun_before(us(400)).stop(1 << 20);
        }
        assert!(policy.runs_inline());
        for _ in 0..100 {
            begun_before(us(400)).stop(4096);
        }
        assert!(!policy.runs_inline());
    }

    #[test]
    fn those_under_way_are_counted_until_they_end_in_any_way() {
        let policy = DispatchPolicy::default();
        let (first, second) = (policy.start_parallel(), policy.start_parallel());
        assert_eq!((first.others, second.others), (Some(0), Some(1)));
        drop(first);
        second.stop(0);
        policy.start_inline().stop(0);
        assert_eq!(policy.start_parallel().others, Some(0));
    }

    #[test]
    fn who_lost_the_processor_was_not_slow_and_who_waited_was() {
        let policy = DispatchPolicy::default();
        policy.record(us(1300), None);
        let ended_before = |time: Duration, wait: bool| {
            let mut watch = policy.start_inline();
            assert!(watch.switches.is_some());
            watch.started = watch.started.checked_sub(time).unwrap();
            if wait {
                std::thread::sleep(us(1));
            }
            watch.stop(4096);
        };
        // Nothing here waits, so the time was spent elsewhere.
        ended_before(Duration::from_millis(20), false);
        assert!(policy.runs_inline());
        ended_before(Duration::from_millis(20), true);
        assert!(!policy.runs_inline());
    }
}
