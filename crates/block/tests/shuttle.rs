//! The range lock and the group commit under a model checker: `cargo xtask model` runs it.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a model that cannot go on has found something")]

use std::sync::Arc;

use blockmirror_block::sync::{Mutex, thread};
use blockmirror_block::testing::explore;
use blockmirror_block::{ByteRange, Error, ErrorKind, GroupCommit, RangeLock, Result};

/// Who is inside where.
#[derive(Default)]
struct Inside(Mutex<Vec<(ByteRange, bool)>>);

impl Inside {
    /// Comes, stays for a moment, and leaves. An exclusive holder of a byte must be its only holder.
    fn visit(&self, range: ByteRange, exclusive: bool) {
        let mut inside = self.0.lock();
        let conflict = inside.iter().find(|(other, alone)| (*alone || exclusive) && other.overlaps(range));
        assert_eq!(conflict, None, "{range} entered, exclusive: {exclusive}");
        inside.push((range, exclusive));
        drop(inside);
        thread::yield_now();
        let mut inside = self.0.lock();
        let mine = inside.iter().position(|entry| *entry == (range, exclusive)).unwrap();
        inside.swap_remove(mine);
    }
}

#[test]
fn conflicting_holders_never_meet_and_everybody_gets_in() {
    explore(|| {
        let (lock, inside) = (Arc::new(RangeLock::new()), Arc::new(Inside::default()));
        let plans = [
            [(ByteRange::new(0, 10), true), (ByteRange::new(5, 6), false)],
            [(ByteRange::new(5, 15), true), (ByteRange::new(20, 30), true)],
            [(ByteRange::new(0, 30), false), (ByteRange::new(0, 30), true)],
            [(ByteRange::new(8, 9), false), (ByteRange::new(25, 26), false)],
        ];
        let threads = plans.map(|plan| {
            let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
            thread::spawn(move || {
                for (range, exclusive) in plan {
                    let guard = if exclusive { lock.lock_exclusive(range) } else { lock.lock_shared(range) };
                    let _guard = guard.unwrap();
                    inside.visit(range, exclusive);
                }
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Each of the threads gives its number to the disk and flushes; every third run fails.
#[test]
fn a_flush_is_answered_by_work_that_began_after_it() {
    #[derive(Default)]
    struct Disk {
        group: GroupCommit,
        written: Mutex<Vec<u64>>,
        durable: Mutex<Vec<u64>>,
        runs: Mutex<(u64, bool)>,
    }

    impl Disk {
        fn work(&self) -> Result<()> {
            let mut runs = self.runs.lock();
            assert!(!runs.1, "two runs at a time");
            *runs = (runs.0 + 1, true);
            let fails = runs.0 % 3 == 0;
            drop(runs);
            let written = self.written.lock().clone();
            thread::yield_now();
            if !fails {
                *self.durable.lock() = written;
            }
            self.runs.lock().1 = false;
            if fails { Err(Error::new(ErrorKind::Io, "flush")) } else { Ok(()) }
        }
    }

    explore(|| {
        let disk = Arc::new(Disk::default());
        let threads = [1, 2, 3, 4].map(|number| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                disk.written.lock().push(number);
                while disk.group.join(|| disk.work()).is_err() {}
                assert!(disk.durable.lock().contains(&number), "answered, and not durable");
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(disk.runs.lock().0 <= 6, "no run for nothing");
    });
}
