//! Orders operations on overlapping byte ranges.
//!
//! A format takes a shared lock on the guest range it reads or overwrites in place, and an exclusive one
//! where it changes what is mapped. Grants are first come, first served among those that conflict, so neither
//! side starves; an operation holds one range at a time, so two can never wait for each other.
//!
//! A holder may wait for a peer that never answers. So a caller that is [cancelled](crate::cancel) leaves its
//! wait, and blocks those behind it no longer.

use crate::sync::{Condvar, Mutex};
use crate::{ByteRange, Error, ErrorKind, Result, cancel};

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
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] if the caller is cancelled while it waits; a range that is free is granted.
    pub fn lock_shared(&self, range: ByteRange) -> Result<RangeGuard<'_>> {
        self.lock(range, false)
    }

    /// Waits until no earlier holder overlaps `range`.
    ///
    /// # Errors
    /// As [`lock_shared`](Self::lock_shared).
    pub fn lock_exclusive(&self, range: ByteRange) -> Result<RangeGuard<'_>> {
        self.lock(range, true)
    }

    /// The same for a step that others depend on: the caller waits although it is cancelled.
    pub fn lock_exclusive_shielded(&self, range: ByteRange) -> RangeGuard<'_> {
        let place = self.enqueue(range, true);
        self.wait_while_blocked(&place, || false);
        place
    }

    /// How many threads wait now. Outdated the next moment; for tests of those who take turns.
    pub fn waiters(&self) -> usize {
        self.queue.lock().waiters
    }

    fn lock(&self, range: ByteRange, exclusive: bool) -> Result<RangeGuard<'_>> {
        let place = self.enqueue(range, exclusive);
        if self.wait_while_blocked(&place, cancel::is_cancelled) {
            return Ok(place);
        }
        Err(Error::new(ErrorKind::Cancelled, "lock range").at(range.start()))
    }

    /// A place in the queue, which is given up when it is dropped.
    fn enqueue(&self, range: ByteRange, exclusive: bool) -> RangeGuard<'_> {
        let mut queue = self.queue.lock();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.entries.push(Entry { id, range, exclusive });
        RangeGuard { lock: self, id }
    }

    /// Waits until `place` holds its range; false if `leaves` is true before.
    fn wait_while_blocked(&self, place: &RangeGuard<'_>, leaves: impl Fn() -> bool) -> bool {
        let mut queue = self.queue.lock();
        while queue.blocked(place.id) {
            if leaves() {
                return false;
            }
            queue.waiters += 1;
            queue = cancel::wait(&self.changed, queue, None);
            queue.waiters -= 1;
        }
        true
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
    use crate::cancel::CancelSource;

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
                        let _guard = lock.lock_exclusive(ByteRange::at((t + i) % 3, 10)).unwrap();
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
        let _a = lock.lock_exclusive(ByteRange::new(0, 10)).unwrap();
        let _b = lock.lock_exclusive(ByteRange::new(10, 20)).unwrap();
        let _c = lock.lock_shared(ByteRange::new(20, 30)).unwrap();
        let _d = lock.lock_shared(ByteRange::new(25, 40)).unwrap();
        assert_eq!(lock.queue.lock().entries.len(), 4);
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_readers() {
        let lock = RangeLock::new();
        let first = lock.lock_shared(ByteRange::new(0, 10)).unwrap();
        let order = Mutex::new(Vec::new());
        thread::scope(|s| {
            s.spawn(|| {
                let _w = lock.lock_exclusive(ByteRange::new(0, 10)).unwrap();
                order.lock().push("writer");
            });
            while lock.queue.lock().entries.len() < 2 {
                thread::yield_now();
            }
            s.spawn(|| {
                let _r = lock.lock_shared(ByteRange::new(0, 10)).unwrap();
                order.lock().push("reader");
            });
            while lock.queue.lock().entries.len() < 3 {
                thread::yield_now();
            }
            drop(first);
        });
        assert_eq!(*order.lock(), ["writer", "reader"]);
    }

    /// A job that was cancelled waited for a guest's request to a server that does not answer.
    #[test]
    fn a_cancelled_caller_leaves_its_wait_and_blocks_no_other() {
        let lock = RangeLock::new();
        let range = ByteRange::new(0, 10);
        let held = lock.lock_shared(range).unwrap();
        let source = CancelSource::new();
        {
            let _calls = source.enter();
            source.cancel();
            assert_eq!(lock.lock_exclusive(range).unwrap_err().kind(), ErrorKind::Cancelled);
            // What is free is granted: nothing is waited for.
            drop(lock.lock_shared(range).unwrap());
            drop(held);
            drop(lock.lock_exclusive_shielded(range));
        }
        assert!(lock.queue.lock().entries.is_empty());
    }

    /// Those behind a caller that leaves are woken by it: no other holder may end.
    #[test]
    fn a_caller_that_leaves_wakes_those_behind_it() {
        let lock = RangeLock::new();
        let range = ByteRange::new(0, 10);
        let _held = lock.lock_shared(range).unwrap();
        let source = CancelSource::new();
        thread::scope(|s| {
            let writer = s.spawn(|| {
                let _calls = source.enter();
                lock.lock_exclusive(range).map(drop)
            });
            while lock.waiters() < 1 {
                thread::yield_now();
            }
            let reader = s.spawn(|| lock.lock_shared(range).map(drop));
            while lock.waiters() < 2 {
                thread::yield_now();
            }
            source.cancel();
            assert_eq!(writer.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
            reader.join().unwrap().unwrap();
        });
    }
}
