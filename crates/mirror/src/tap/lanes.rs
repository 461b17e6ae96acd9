//! Sharded in-flight counters: the way of a write through a tap without listeners. Two steps on a counter
//! that few threads share.
//!
//! A write enters a lane and leaves it; a new listener raises a flag in every lane and reads, in the same
//! step, how many writes are in it. So the listener either counts a write, or the write sees the flag and
//! takes the slow path, by the tap's state. One that has entered and finds the flag when it leaves does so
//! under the lock of the state, so that counting and notifying are one step for the listeners.
//!
//! What must hold: the flag changes under the lock of the tap's state only; while it is up a count only
//! falls, under that lock.

use blockmirror_block::sync::atomic::{AtomicU64, Ordering};
use blockmirror_block::sync::thread_number;

/// Threads are spread over so many lanes.
const LANES: usize = 16;
/// A listener is attached. The other bits count the writes that have entered and not left.
const LISTENED: u64 = 1 << 63;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lanes([Lane; LANES]);

/// Two lanes in one line of a processor's cache would be one.
#[derive(Debug)]
#[repr(align(128))]
struct Lane(AtomicU64);

impl Lanes {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| Lane(AtomicU64::new(0))))
    }

    /// A write begins; the number of its lane, or `None` if there is a listener.
    ///
    /// A write that has entered sees what was stored before the flag was cleared.
    pub(super) fn enter(&self) -> Option<usize> {
        let index = thread_number() % LANES;
        let lane = &self.0[index].0;
        let mut seen = lane.load(Ordering::Relaxed);
        while seen & LISTENED == 0 {
            match lane.compare_exchange_weak(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(index),
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Whether there is a listener, read without the lock of the state.
    pub(super) fn is_listened(&self) -> bool {
        self.0[thread_number() % LANES].0.load(Ordering::Relaxed) & LISTENED != 0
    }

    /// A write that entered lane `index` has finished. False if there is a listener: then it is still
    /// counted, and must [`leave_listened`](Self::leave_listened).
    pub(super) fn leave(&self, index: usize) -> bool {
        let lane = &self.0[index].0;
        let mut seen = lane.load(Ordering::Relaxed);
        while seen & LISTENED == 0 {
            match lane.compare_exchange_weak(seen, seen - 1, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// The same while there is a listener. Under the lock of the tap's state.
    pub(super) fn leave_listened(&self, index: usize) {
        self.0[index].0.fetch_sub(1, Ordering::Release);
    }

    /// Sets whether there is a listener; returns the writes under way. Under the lock of the tap's state.
    pub(super) fn set_listened(&self, listened: bool) -> usize {
        let set = |lane: &Lane| {
            let before = match listened {
                true => lane.0.fetch_or(LISTENED, Ordering::AcqRel),
                false => lane.0.fetch_and(!LISTENED, Ordering::AcqRel),
            };
            writes(before)
        };
        self.0.iter().map(set).sum()
    }

    /// The writes under way. Exact under the lock of the tap's state while there is a listener.
    pub(super) fn writes(&self) -> usize {
        self.0.iter().map(|lane| writes(lane.0.load(Ordering::Acquire))).sum()
    }
}

fn writes(word: u64) -> usize {
    usize::try_from(word & !LISTENED).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_counted_or_sees_the_flag() {
        let lanes = Lanes::new();
        let (first, second) = (lanes.enter().unwrap(), lanes.enter().unwrap());
        assert!(lanes.leave(first));
        assert_eq!(lanes.set_listened(true), 1);
        assert_eq!((lanes.enter(), lanes.leave(second), lanes.writes()), (None, false, 1));
        lanes.leave_listened(second);
        assert_eq!(lanes.set_listened(false), 0);
        assert!(lanes.enter().is_some_and(|lane| lanes.leave(lane)));
    }

    /// Those who enter while the flag goes up and down: none is in a lane uncounted.
    #[test]
    fn the_flag_going_up_tells_the_count_of_that_moment() {
        let lanes = Lanes::new();
        let (begun, done) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while done.load(Ordering::Relaxed) == 0 {
                        let Some(lane) = lanes.enter() else { continue };
                        begun.fetch_add(1, Ordering::Relaxed);
                        begun.fetch_sub(1, Ordering::Relaxed);
                        if !lanes.leave(lane) {
                            lanes.leave_listened(lane);
                        }
                    }
                });
            }
            for _ in 0..2000 {
                lanes.set_listened(true);
                while lanes.writes() > 0 {
                    std::thread::yield_now();
                }
                assert_eq!(begun.load(Ordering::Relaxed), 0, "a write is inside and not counted");
                assert_eq!(lanes.set_listened(false), 0);
            }
            done.store(1, Ordering::Relaxed);
        });
    }
}
