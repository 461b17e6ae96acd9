//! Orders operations on overlapping byte ranges.
//!
//! A format takes a shared lock on the guest range it reads or overwrites in place, and an exclusive one
//! where it changes what is mapped. Grants are first come, first served among those that conflict, so neither
//! side starves; an operation holds one range at a time, so two can never wait for each other.

use crate::ByteRange;
use crate::sync::{Condvar, Mutex};

#[derive(Debug)]
struct Entry {
    id: u64,
    range: ByteRange,
    exclusive: bool,
}

#[derive(Debug, Default)]
struct Queue {
    next_id: u64,
    /// Holders and waiters, oldest first. Its length is the number of threads inside, so it stays short.
    entries: Vec<Entry>,
    waiters: usize,
}

impl Queue {
    fn blocked(&self, id: u64) -> bool {
        let Some(mine) = self.entries.iter().find(|e| e.id == id) else { return false };
        self.entries
            .iter()
            .take_while(|e| e.id != id)
            .any(|e| (e.exclusive || mine.exclusive) && e.range.overlaps(mine.range))
    }
}

/// A lock over byte ranges, shared or exclusive, first come first served.
#[derive(Debug, Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl RangeLock {
    /// A free lock.
    pub const fn new() -> Self {
        Self {
            queue: Mutex::new(Queue { next_id: 0, entries: Vec::new(), waiters: 0 }),
            changed: Condvar::new(),
        }
    }

    /// Waits until no earlier exclusive holder overlaps `range`.
    pub fn shared(&self, range: ByteRange) -> RangeGuard<'_> {
        self.acquire(range, false)
    }

    /// Waits until no earlier holder overlaps `range`.
    pub fn exclusive(&self, range: ByteRange) -> RangeGuard<'_> {
        self.acquire(range, true)
    }

    /// How many threads wait now. Outdated the next moment; for tests of those who take turns.
    pub fn waiters(&self) -> usize {
        self.queue.lock().waiters
    }

    fn acquire(&self, range: ByteRange, exclusive: bool) -> RangeGuard<'_> {
        let mut queue = self.queue.lock();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.entries.push(Entry { id, range, exclusive });
        while queue.blocked(id) {
            queue.waiters += 1;
            queue = self.changed.wait(queue);
            queue.waiters -= 1;
        }
        RangeGuard { lock: self, id }
    }
}

/// Holds a range until dropped.
#[must_use = "the range is free again as soon as this is dropped"]
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.lock.queue.lock();
        queue.entries.retain(|e| e.id != self.id);
        if queue.waiters > 0 {
            self.lock.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn exclusive_holders_of_one_range_never_meet() {
        let lock = RangeLock::new();
        let inside = AtomicU32::new(0);
        let worst = AtomicU32::new(0);
        thread::scope(|s| {
            for t in 0..4u64 {
                let (lock, inside, worst) = (&lock, &inside, &worst);
                s.spawn(move || {
                    for i in 0..500 {
                        let _guard = lock.exclusive(ByteRange::at((t + i) % 3, 10));
                        worst.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(worst.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn disjoint_and_shared_ranges_do_not_wait() {
        let lock = RangeLock::new();
        let _a = lock.exclusive(ByteRange::new(0, 10));
        let _b = lock.exclusive(ByteRange::new(10, 20));
        let _c = lock.shared(ByteRange::new(20, 30));
        let _d = lock.shared(ByteRange::new(25, 40));
        assert_eq!(lock.queue.lock().entries.len(), 4);
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_readers() {
        let lock = RangeLock::new();
        let first = lock.shared(ByteRange::new(0, 10));
        let order = Mutex::new(Vec::new());
        thread::scope(|s| {
            s.spawn(|| {
                let _w = lock.exclusive(ByteRange::new(0, 10));
                order.lock().push("writer");
            });
            while lock.queue.lock().entries.len() < 2 {
                thread::yield_now();
            }
            s.spawn(|| {
                let _r = lock.shared(ByteRange::new(0, 10));
                order.lock().push("reader");
            });
            while lock.queue.lock().entries.len() < 3 {
                thread::yield_now();
            }
            drop(first);
        });
        assert_eq!(*order.lock(), ["writer", "reader"]);
    }
}
