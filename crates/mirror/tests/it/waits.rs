//! Who waits for whom, and for how long: callers that only poll for admission, aborts beside open tickets, a
//! pivot beside a copy-up.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::cancel::CancelSource;
use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, WriteFlags};
use blockmirror_mirror::{
    Begin, BitmapMode, CopyMode, Error, Event, MirrorJob, MirrorOptions, SyncMode, Tap, WriteTicket,
};

use crate::tap::{FOREVER, empty, faulty, filled, until};

const RANGE: ByteRange = ByteRange::new(0, 4096);
const BYTES: [u8; 4096] = [200; 4096];

fn blocking() -> MirrorOptions {
    MirrorOptions::new().copy_mode(CopyMode::WriteBlocking)
}

/// Asks for `RANGE` without waiting, as a monitor with one thread does, until it is admitted.
fn poll(tap: &Tap) -> WriteTicket {
    let limit = Instant::now() + FOREVER.unwrap();
    loop {
        match tap.try_begin_write(RANGE).unwrap() {
            Begin::Go(ticket) => return ticket,
            Begin::Wait { .. } => assert!(Instant::now() < limit, "it is never admitted"),
        }
        thread::yield_now();
    }
}

fn write(disk: &dyn BlockDevice) -> Result<(), blockmirror_block::Error> {
    disk.write_at(&BYTES, RANGE.start(), WriteFlags::NONE)
}

#[test]
fn the_quiesce_limit_holds_for_a_caller_that_only_polls() {
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = MirrorJob::attach(&tap, slow as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Flush, None);
    job.control().complete().unwrap();
    gate.wait_held(1);
    // The guest is quiesced, and the last flush takes as long as it likes.
    let ticket = poll(&tap);
    ticket.complete(write(&*source), None).unwrap();
    gate.open();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn the_latency_budget_holds_for_a_caller_that_only_polls() {
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let gate = faults.hold(OpKind::Write, None);
    let options = blocking().latency_budget(Duration::from_millis(20));
    let job = MirrorJob::attach(&tap, slow as _, options).unwrap();
    gate.wait_held(1);
    // The copy of the first granules does not end.
    let ticket = poll(&tap);
    assert!(ticket.target().is_none(), "the job copies it later");
    ticket.complete(write(&*source), None).unwrap();
    gate.open();
    until(&job, &Event::Ready);
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

/// Makes `call` of the tap in a thread that is cancelled then. Whether it has begun to wait before that does
/// not matter: it has to wait.
fn gives_up(tap: &Arc<Tap>, call: fn(&Tap) -> blockmirror_block::Result<()>) {
    let source = CancelSource::new();
    let (sent, received) = mpsc::channel();
    let caller = {
        let (tap, source, sent) = (Arc::clone(tap), source.clone(), sent.clone());
        move || {
            let _calls = source.enter();
            sent.send(None).unwrap();
            sent.send(Some(call(&tap))).unwrap();
        }
    };
    thread::spawn(caller);
    let next = || received.recv_timeout(FOREVER.unwrap()).unwrap();
    assert!(next().is_none());
    source.cancel();
    assert_eq!(next().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
}

/// The target may hang, and the client of an export that is removed must not wait for it.
#[test]
fn a_cancelled_write_does_not_wait_for_the_job() {
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let gate = faults.hold(OpKind::Write, None);
    let job = MirrorJob::attach(&tap, slow as _, blocking()).unwrap();
    gate.wait_held(1);
    let before = source.contents().unwrap();
    gives_up(&tap, |tap| write(tap));
    assert_eq!(source.contents().unwrap(), before);
    gate.open();
    write(&*tap).unwrap();
    until(&job, &Event::Ready);
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn a_cancelled_call_does_not_wait_for_the_end_of_a_drain() {
    let source = filled();
    let tap = Tap::new(Arc::clone(&source) as _);
    let before = source.contents().unwrap();
    let drained = tap.drain();
    gives_up(&tap, |tap| write(tap));
    gives_up(&tap, |tap| tap.copy_up(RANGE, 1).map(drop));
    assert_eq!(source.contents().unwrap(), before);
    drop(drained);
    write(&*tap).unwrap();
}

/// A tap with a bitmap `b`, and a ready job that copies what it says and writes through.
fn ready_from_bitmap(source: &Arc<MemoryDisk>, target: &Arc<MemoryDisk>) -> (Arc<Tap>, MirrorJob) {
    let tap = Tap::new(Arc::clone(source) as _);
    tap.add_bitmap("b", 4096).unwrap();
    let options = blocking().sync(SyncMode::Bitmap).bitmap("b", BitmapMode::Always);
    let job = MirrorJob::attach(&tap, Arc::clone(target) as _, options).unwrap();
    until(&job, &Event::Ready);
    (tap, job)
}

fn marked(tap: &Tap) -> Vec<ByteRange> {
    tap.dirty_runs("b", ByteRange::new(0, tap.len()), 10).unwrap()
}

#[test]
fn an_abort_does_not_wait_for_a_ticket_that_was_not_given_the_target() {
    let (source, target) = (filled(), empty());
    let (tap, job) = ready_from_bitmap(&source, &target);
    let ticket = tap.begin_write(RANGE).unwrap();
    job.control().force_cancel().unwrap();
    assert!(job.control().wait_timeout(FOREVER.unwrap()), "it waits for the ticket");
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
    assert_eq!(marked(&tap), [RANGE], "the target may not have it");
    assert!(ticket.target().is_none(), "the job is over");
    ticket.complete(write(&*source), None).unwrap();
    assert_eq!((marked(&tap), tap.writes_under_way()), (vec![RANGE], 0));
}

#[test]
fn an_abort_waits_for_a_leaked_ticket_at_the_target_for_a_bounded_time() {
    let (source, target) = (filled(), empty());
    let (tap, job) = ready_from_bitmap(&source, &target);
    let ticket = tap.begin_write(RANGE).unwrap();
    write(&**ticket.source()).unwrap();
    assert!(ticket.target().is_some());
    std::mem::forget(ticket);
    job.control().force_cancel().unwrap();
    assert!(job.control().wait_timeout(FOREVER.unwrap()), "it waits for the ticket");
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
    assert_eq!(marked(&tap), [RANGE]);
    assert!(!tap.is_mirrored());
}

/// The threads of the job once slept until the next slice of the speed limit, which was hours away.
#[test]
fn a_guest_write_that_fails_at_the_target_ends_a_job_that_waits_for_its_speed_limit() {
    let (source, target) = (filled(), empty());
    let (bad, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    tap.add_bitmap("b", 4096).unwrap();
    tap.merge_bitmap("b", &[&all_of(&tap)]).unwrap();
    let options = blocking().sync(SyncMode::Bitmap).bitmap("b", BitmapMode::Always).speed(1);
    let job = MirrorJob::attach(&tap, bad as _, options).unwrap();
    let control = job.control();
    while control.progress().copied == 0 {
        thread::yield_now();
    }
    let last = ByteRange::new(tap.len() - 4096, tap.len());
    faults.inject(Fault::on(OpKind::Write).within(last));
    tap.write_at(&BYTES, last.start(), WriteFlags::NONE).unwrap();
    assert!(control.wait_timeout(FOREVER.unwrap()), "it waits for the speed limit");
    assert!(matches!(job.wait(), Err(Error::Target(_))));
}

fn all_of(tap: &Tap) -> blockmirror_bitmap::DirtyBitmap {
    let mut all = blockmirror_bitmap::DirtyBitmap::new(tap.len(), 4096).unwrap();
    all.set(0..tap.len());
    all
}

/// The disk below the tap was once replaced while data was copied into it.
#[test]
fn a_pivot_waits_for_a_copy_up_that_began_after_the_job() {
    let faults = Faults::new();
    let base = Arc::new(FaultDisk::new(Arc::new(MemoryDisk::with_contents(&[7; 4096])), faults.clone()));
    let target = Arc::new(MemoryDisk::new(4096));
    let tap = Tap::new(Arc::new(MemoryDisk::new(4096).with_backing(base)));
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Extents, None);
    thread::scope(|scope| {
        let copy = scope.spawn(|| tap.copy_up(RANGE, 1).unwrap());
        gate.wait_held(1);
        job.control().complete().unwrap();
        assert!(!job.control().wait_timeout(Duration::from_millis(50)), "data is copied into the source");
        gate.open();
        assert_eq!(copy.join().unwrap(), 4096);
        assert!(job.control().wait_timeout(FOREVER.unwrap()));
    });
    job.wait().unwrap();
    assert_eq!((target.contents().unwrap(), tap.writes_under_way()), (vec![7; 4096], 0));
}
