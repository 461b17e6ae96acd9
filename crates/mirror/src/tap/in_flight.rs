//! Sharded in-flight counters: the path of a write through a tap without observers, two atomic operations on
//! a counter that few threads share.
//!
//! A write is counted in a shard; a new observer sets a flag in every shard and reads, in the same operation,
//! how many writes are counted there. So the observer either counts a write, or the write sees the flag and
//! takes the slow path, by the tap's state. A write that finds the flag when it ends does so under the lock
//! of the state, so that counting and notifying are one step for the observers.
//!
//! Must hold: the flag changes under the lock of the tap's state only; while it is set a count only falls,
//! under that lock.

use blockmirror_block::sync::atomic::{AtomicU64, Ordering};
use blockmirror_block::sync::thread_number;

/// Threads are spread over so many shards.
const SHARDS: usize = 16;
/// There is an observer or a drain. The other bits count the writes under way.
const OBSERVED: u64 = 1 << 63;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct InFlightCounters([Shard; SHARDS]);

/// A cache line of its own, against false sharing.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(AtomicU64);

impl InFlightCounters {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| Shard(AtomicU64::new(0))))
    }

    /// A write begins; the number of its shard, or `None` if there is an observer.
    ///
    /// A write that is counted sees what was stored before the flag was cleared.
    pub(super) fn begin(&self) -> Option<usize> {
        let index = thread_number() % SHARDS;
        let shard = &self.0[index].0;
        let mut seen = shard.load(Ordering::Relaxed);
        while seen & OBSERVED == 0 {
            match shard.compare_exchange_weak(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(index),
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Whether there is an observer, read without the lock of the state.
    pub(super) fn is_observed(&self) -> bool {
        self.0[thread_number() % SHARDS].0.load(Ordering::Relaxed) & OBSERVED != 0
    }

    /// A write in shard `index` has finished. False if there is an observer: then it is still counted, and
    /// must [`end_observed`](Self::end_observed).
    pub(super) fn end(&self, index: usize) -> bool {
        let shard = &self.0[index].0;
        let mut seen = shard.load(Ordering::Relaxed);
        while seen & OBSERVED == 0 {
            match shard.compare_exchange_weak(seen, seen - 1, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// The same while there is an observer. Under the lock of the tap's state.
    pub(super) fn end_observed(&self, index: usize) {
        self.0[index].0.fetch_sub(1, Ordering::Release);
    }

    /// Sets whether there is an observer; returns the writes under way. Under the lock of the tap's state.
    pub(super) fn set_observed(&self, observed: bool) -> usize {
        let set = |shard: &Shard| {
            let before = match observed {
                true => shard.0.fetch_or(OBSERVED, Ordering::AcqRel),
                false => shard.0.fetch_and(!OBSERVED, Ordering::AcqRel),
            };
            writes(before)
        };
        self.0.iter().map(set).sum()
    }

    /// The writes under way. Exact under the lock of the tap's state while there is an observer.
    pub(super) fn writes(&self) -> usize {
        self.0.iter().map(|shard| writes(shard.0.load(Ordering::Acquire))).sum()
    }
}

fn writes(word: u64) -> usize {
    usize::try_from(word & !OBSERVED).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_counted_or_sees_the_flag() {
        let in_flight = InFlightCounters::new();
        let (first, second) = (in_flight.begin().unwrap(), in_flight.begin().unwrap());
        assert!(in_flight.end(first));
        assert_eq!(in_flight.set_observed(true), 1);
        assert_eq!((in_flight.begin(), in_flight.end(second), in_flight.writes()), (None, false, 1));
        in_flight.end_observed(second);
        assert_eq!(in_flight.set_observed(false), 0);
        assert!(in_flight.begin().is_some_and(|shard| in_flight.end(shard)));
    }

    /// Writes begin while the flag is set and cleared: none is under way uncounted.
    #[test]
    fn the_flag_going_up_tells_the_count_of_that_moment() {
        let in_flight = InFlightCounters::new();
        let (begun, done) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while done.load(Ordering::Relaxed) == 0 {
                        let Some(shard) = in_flight.begin() else { continue };
                        begun.fetch_add(1, Ordering::Relaxed);
                        begun.fetch_sub(1, Ordering::Relaxed);
                        if !in_flight.end(shard) {
                            in_flight.end_observed(shard);
                        }
                    }
                });
            }
            for _ in 0..2000 {
                in_flight.set_observed(true);
                while in_flight.writes() > 0 {
                    std::thread::yield_now();
                }
                assert_eq!(begun.load(Ordering::Relaxed), 0, "a write is inside and not counted");
                assert_eq!(in_flight.set_observed(false), 0);
            }
            done.store(1, Ordering::Relaxed);
        });
    }
}
