//! Callers that never wait in the tap, and readers, around every end of a job.
//!
//! A caller that is refused sleeps until its waker is called, for ever unless the answer carries a time. So a
//! wake-up that was forgotten shows as threads that wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmirror_block::sync::thread::{self, JoinHandle};
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::testing::{MemoryDisk, explore};
use blockmirror_block::{
    self as block, BlockDevice, ByteRange, Extent, Geometry, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{Begin, CopyMode, Error, MirrorJob, MirrorOptions, Tap, WriteTicket};

use super::{UNIT, attach, disk, options, short, until_ready};

/// What a queue's thread sleeps on.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock() = true;
        self.changed.notify_one();
    }

    fn sleep(&self, within: Option<Duration>) {
        let mut rung = self.rung.lock();
        match within {
            None => {
                while !*rung {
                    rung = self.changed.wait(rung);
                }
            }
            Some(within) if !*rung => rung = self.changed.wait_timeout(rung, within).0,
            Some(_) => {}
        }
        *rung = false;
    }
}

fn perform(ticket: WriteTicket, byte: u8) {
    let write = |disk: &dyn BlockDevice| disk.write_at(&[byte; 8], ticket.range().start(), WriteFlags::NONE);
    let source = write(&**ticket.source());
    let target = ticket.target().map(|target| write(&*target));
    ticket.complete(source, target).unwrap();
}

/// A thread with these writes in flight, each of 8 bytes to a place of its own, that never waits in the tap.
fn queue(tap: &Arc<Tap>, writes: &'static [(u64, u8)]) -> JoinHandle<()> {
    let bell = Arc::new(Bell::default());
    let wakes = Arc::clone(&bell);
    let queue = tap.queue(move || wakes.ring());
    thread::spawn(move || {
        let mut refused = writes.to_vec();
        loop {
            let mut limit: Option<Duration> = None;
            let mut open = Vec::new();
            refused.retain(|(at, byte)| match queue.try_begin_write(ByteRange::at(*at, 8)).unwrap() {
                Begin::Go(ticket) => {
                    open.push((ticket, *byte));
                    false
                }
                Begin::Wait { within } => {
                    limit = limit.into_iter().chain(within).min();
                    true
                }
            });
            let any_open = !open.is_empty();
            for (ticket, byte) in open {
                perform(ticket, byte);
            }
            if refused.is_empty() {
                return;
            }
            if !any_open {
                bell.sleep(limit);
            }
        }
    })
}

fn assert_has(disk: &dyn BlockDevice, writes: &[(u64, u8)]) {
    for (at, byte) in writes {
        let mut found = [0; 8];
        disk.read_at(&mut found, *at).unwrap();
        assert_eq!(found, [*byte; 8], "acknowledged at {at}");
    }
}

const FIRST: &[(u64, u8)] = &[(0, 2), (UNIT - 4, 3), (2 * UNIT, 4)];
const SECOND: &[(u64, u8)] = &[(8, 5), (2 * UNIT + 8, 6)];

#[test]
fn callers_that_never_wait_keep_no_pivot_from_its_end() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto] {
        explore(move || {
            let (source, target) = (disk(1), disk(0));
            let tap = Tap::new(source as _);
            let first = queue(&tap, FIRST);
            let job = attach(&tap, &target, options().copy_mode(mode));
            let second = queue(&tap, SECOND);
            until_ready(&job);
            job.control().complete().unwrap();
            job.wait().unwrap();
            first.join().unwrap();
            second.join().unwrap();
            assert_has(&*target, FIRST);
            assert_has(&*target, SECOND);
        });
    }
}

#[test]
fn no_caller_sleeps_on_after_a_cancel_or_a_change_of_mode() {
    for cancel in [true, false] {
        explore(move || {
            let (source, target) = (disk(1), disk(0));
            let tap = Tap::new(Arc::clone(&source) as _);
            let job = attach(&tap, &target, options().copy_mode(CopyMode::WriteBlocking));
            let queues = [queue(&tap, FIRST), queue(&tap, SECOND)];
            if cancel {
                job.control().force_cancel().unwrap();
                assert!(matches!(job.wait(), Err(Error::Cancelled)));
            } else {
                job.control().change(CopyMode::Background).unwrap();
                until_ready(&job);
                job.control().keep_copy().unwrap();
                job.wait().unwrap();
            }
            for queue in queues {
                queue.join().unwrap();
            }
            assert_has(&*source, FIRST);
            assert_has(&*source, SECOND);
        });
    }
}

#[test]
fn no_caller_sleeps_on_after_a_drain() {
    explore(|| {
        let (source, target) = (disk(1), disk(1));
        let tap = Tap::new(Arc::clone(&source) as _);
        let job = attach(&tap, &target, short());
        let queues = [queue(&tap, FIRST), queue(&tap, SECOND)];
        drop(tap.drain());
        until_ready(&job);
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        for queue in queues {
            queue.join().unwrap();
        }
        assert_has(&*source, FIRST);
    });
}

/// A disk that its owner closes when the job is over.
#[derive(Debug)]
struct Closable(Arc<MemoryDisk>, AtomicBool);

impl Closable {
    fn open(&self) -> &MemoryDisk {
        assert!(!self.1.load(Ordering::SeqCst), "the old disk is used after the end");
        &self.0
    }
}

impl BlockDevice for Closable {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn name(&self) -> &str {
        "old"
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> block::Result<()> {
        self.open().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> block::Result<()> {
        self.open().write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> block::Result<()> {
        self.open().write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> block::Result<()> {
        self.open().discard(range)
    }

    fn flush(&self) -> block::Result<()> {
        self.open().flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> block::Result<()> {
        self.open().extents(range, visit)
    }
}

/// Readers with calls and with tickets, one of which writes while it has a read open.
#[test]
fn no_read_reaches_the_old_disk_after_the_end() {
    explore(|| {
        let old = Arc::new(Closable(disk(1), AtomicBool::new(false)));
        let tap = Tap::new(Arc::clone(&old) as _);
        let job = MirrorJob::attach(&tap, disk(1), short_of_one()).unwrap();
        let reader = |writes: bool| {
            let tap = Arc::clone(&tap);
            thread::spawn(move || {
                for _ in 0..3 {
                    let ticket = tap.begin_read();
                    tap.read_at(&mut [0; 8], 0).unwrap();
                    if writes {
                        tap.write_at(&[1; 8], UNIT, WriteFlags::NONE).unwrap();
                    }
                    ticket.source().read_at(&mut [0; 8], 0).unwrap();
                }
            })
        };
        let readers = [reader(false), reader(true)];
        until_ready(&job);
        job.control().complete().unwrap();
        job.wait().unwrap();
        old.1.store(true, Ordering::SeqCst);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

fn short_of_one() -> MirrorOptions {
    short().threads(std::num::NonZeroUsize::new(1))
}
