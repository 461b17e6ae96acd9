//! Reads around a pivot: what they find, and that the job is not over while one is at the old disk.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, OpKind};
use blockmirror_block::{
    self as block, BlockDevice, ByteRange, Extent, Geometry, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{CopyMode, Event, MirrorJob, MirrorOptions, Tap};

use crate::tap::{empty, faulty, filled, until};

/// Long enough that only a hang reaches it.
const FOREVER: Duration = Duration::from_secs(60);
/// Longer than an end that waits for nothing takes. That it has not come by then is no proof, but a job that
/// does not wait fails here nearly always.
const A_WHILE: Duration = Duration::from_millis(50);

fn ready(tap: &Arc<Tap>, target: &Arc<MemoryDisk>) -> MirrorJob {
    let job = MirrorJob::attach(tap, Arc::clone(target) as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    job
}

#[test]
fn a_pivot_is_over_when_the_last_read_of_the_old_disk_has_ended() {
    let (source, target) = (filled(), Arc::new(MemoryDisk::new(4 << 20).named("new")));
    let tap = Tap::new(source as _);
    let (first, second) = (tap.begin_read(), tap.begin_read());
    let job = ready(&tap, &target);
    job.control().complete().unwrap();
    // New reads and writes go to the new disk at once, and wait for nothing.
    while tap.begin_read().source().name() != "new" {
        thread::yield_now();
    }
    tap.write_at(&[9; 512], 0, WriteFlags::NONE).unwrap();
    assert_eq!(target.contents().unwrap()[0], 9);
    drop(first);
    assert!(!job.control().wait_timeout(A_WHILE), "a read is under way at the old disk");
    assert!(job.control().events().iter().all(|event| !matches!(event, Event::Completed { .. })));
    thread::spawn(move || drop(second)).join().unwrap();
    assert!(job.control().wait_timeout(FOREVER));
    job.wait().unwrap();
}

/// A call of the tap is a read as a ticket is, and so are flushes.
#[test]
fn a_pivot_waits_for_calls_at_the_old_disk() {
    for kind in [OpKind::Read, OpKind::Flush] {
        let (slow, faults) = faulty(&filled());
        let tap = Tap::new(slow as _);
        let job = ready(&tap, &empty());
        let gate = faults.hold(kind, None);
        thread::scope(|scope| {
            let call = scope.spawn(|| match kind {
                OpKind::Read => tap.read_at(&mut [0; 512], 0),
                _ => tap.flush(),
            });
            gate.wait_held(1);
            job.control().complete().unwrap();
            assert!(!job.control().wait_timeout(A_WHILE), "{kind:?}");
            gate.open();
            call.join().unwrap().unwrap();
        });
        job.wait().unwrap();
    }
}

/// The guest's own thread may be what the end waits for: a write of it that waits for the end goes on
/// when the tap has moved.
#[test]
fn a_thread_that_reads_and_waits_to_write_keeps_no_job_from_its_end() {
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(source as _);
    let job = MirrorJob::attach(&tap, slow as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Flush, None);
    job.control().complete().unwrap();
    gate.wait_held(1);
    let guest = thread::spawn({
        let tap = Arc::clone(&tap);
        move || {
            let read = tap.begin_read();
            let ticket = tap.begin_write(ByteRange::new(0, 512)).unwrap();
            drop(read);
            ticket.complete(Ok(()), None).unwrap();
        }
    });
    while tap.writes_under_way() == 0 {
        thread::yield_now();
    }
    gate.open();
    assert!(job.control().wait_timeout(FOREVER), "they wait for each other");
    guest.join().unwrap();
    job.wait().unwrap();
}

/// Its owner may be the one that reads.
#[test]
fn a_cancel_and_the_drop_of_a_job_that_has_pivoted_wait_for_no_read() {
    for drops in [false, true] {
        let target = Arc::new(MemoryDisk::new(4 << 20).named("new"));
        let tap = Tap::new(filled() as _);
        let read = tap.begin_read();
        let job = ready(&tap, &target);
        job.control().complete().unwrap();
        while tap.device().name() != "new" {
            thread::yield_now();
        }
        let control = job.control().clone();
        if drops {
            drop(job);
        } else {
            control.force_cancel().unwrap();
            assert!(control.wait_timeout(FOREVER), "it waits for a read");
            job.wait().unwrap();
        }
        assert!(control.wait_timeout(FOREVER));
        // The report of the end comes too late for anything.
        drop(read);
        tap.write_at(&[9; 512], 0, WriteFlags::NONE).unwrap();
        assert_eq!(target.contents().unwrap()[0], 9);
    }
}

/// A job that leaves the guest where it is waits for no read.
#[test]
fn a_copy_that_is_kept_and_a_cancel_wait_for_no_read() {
    let tap = Tap::new(filled() as _);
    let read = tap.begin_read();
    let job = ready(&tap, &empty());
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    let job = ready(&tap, &empty());
    job.control().force_cancel().unwrap();
    assert!(job.control().wait_timeout(FOREVER));
    drop(read);
}

/// A disk that its owner closes as soon as the job is over.
#[derive(Debug)]
struct Closable {
    disk: Arc<MemoryDisk>,
    closed: AtomicBool,
}

impl Closable {
    fn open(&self) -> &MemoryDisk {
        assert!(!self.closed.load(Ordering::SeqCst), "the old disk is used after the end");
        &self.disk
    }
}

impl BlockDevice for Closable {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn name(&self) -> &str {
        "old"
    }

    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> block::Result<()> {
        self.open().read_at(buf, offset)?;
        thread::yield_now();
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

/// Readers with calls and tickets, while the disk moves to and fro: what a job has left is not used any more.
#[test]
fn nothing_reaches_a_disk_that_a_pivot_has_left() {
    let new = || Arc::new(Closable { disk: filled(), closed: AtomicBool::new(false) });
    let (mut old, done) = (new(), AtomicBool::new(false));
    let tap = Tap::new(Arc::clone(&old) as _);
    thread::scope(|scope| {
        for reader in 0..3 {
            let (tap, done) = (&tap, &done);
            scope.spawn(move || {
                let mut held = Vec::new();
                while !done.load(Ordering::SeqCst) {
                    tap.read_at(&mut [0; 512], reader * 4096).unwrap();
                    // More than one thread's share of cheap references.
                    held.push(tap.begin_read());
                    if held.len() == 12 {
                        for read in held.drain(..) {
                            read.source().read_at(&mut [0; 512], reader * 4096).unwrap();
                        }
                    }
                }
            });
        }
        for round in 0..10 {
            let target = new();
            let mode = if round % 2 == 0 { CopyMode::Background } else { CopyMode::WriteBlocking };
            let options = MirrorOptions::new().copy_mode(mode);
            let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
            until(&job, &Event::Ready);
            job.control().complete().unwrap();
            job.wait().unwrap();
            old.closed.store(true, Ordering::SeqCst);
            old = target;
        }
        done.store(true, Ordering::SeqCst);
    });
}
