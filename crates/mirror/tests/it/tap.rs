//! Live jobs on real threads: a tap, guests that write, and every way to end. Through the published
//! interface.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_mirror::{
    BitmapMode, CopyMode, Error, Event, JobState, MirrorJob, MirrorOptions, OnError, Refused, SyncMode, Tap,
    Verb,
};

/// Long enough that only a hang reaches it.
pub(super) const FOREVER: Option<Duration> = Some(Duration::from_secs(60));
const LEN: u64 = 4 << 20;

pub(super) fn write(disk: &dyn BlockDevice, offset: u64, len: u64, seed: u8) {
    let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 ^ seed | 1).collect();
    disk.write_at(&bytes, offset, WriteFlags::NONE).unwrap();
}

pub(super) fn filled() -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(LEN);
    write(&disk, 0, LEN, 3);
    Arc::new(disk)
}

pub(super) fn empty() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(LEN))
}

pub(super) fn faulty(disk: &Arc<MemoryDisk>) -> (Arc<FaultDisk>, Faults) {
    let faults = Faults::new();
    (Arc::new(FaultDisk::new(Arc::clone(disk) as _, faults.clone())), faults)
}

pub(super) fn attach(tap: &Arc<Tap>, target: &Arc<MemoryDisk>, options: MirrorOptions) -> MirrorJob {
    MirrorJob::attach(tap, Arc::clone(target) as _, options).unwrap()
}

/// Takes events up to and with `last`.
pub(super) fn until(job: &MirrorJob, last: &Event) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let event = job
            .control()
            .next_event(FOREVER)
            .unwrap_or_else(|| panic!("no {last:?}: {:?}", job.control().progress()));
        events.push(event);
        if events.last() == Some(last) {
            return events;
        }
    }
}

fn rest(job: &MirrorJob) -> Vec<Event> {
    std::iter::from_fn(|| job.control().next_event(FOREVER)).collect()
}

use Event::Status;

#[test]
fn events_come_in_order_from_created_to_null_and_the_tap_follows_the_pivot() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, MirrorOptions::new());
    let start = until(&job, &Event::Ready);
    assert_eq!(
        start,
        [Status(JobState::Created), Status(JobState::Running), Status(JobState::Ready), Event::Ready]
    );
    let progress = job.control().progress();
    assert_eq!((progress.offset, progress.state), (progress.len, JobState::Ready));
    write(&*tap, 1000, 5000, 9);
    job.control().complete().unwrap();
    let end = rest(&job);
    assert_eq!(
        end,
        [
            Status(JobState::Waiting),
            Status(JobState::Pending),
            Event::Completed { error: None },
            Status(JobState::Concluded),
            Status(JobState::Null)
        ]
    );
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    job.wait().unwrap();

    // The guest's handle is on the target now: reads, writes, and the next mirror.
    let old = source.contents().unwrap();
    write(&*tap, 0, 100_000, 77);
    assert_eq!(source.contents().unwrap(), old, "the source is left alone");
    let mut read = vec![0; LEN as usize];
    tap.read_at(&mut read, 0).unwrap();
    assert_eq!(read, target.contents().unwrap());
    let third = empty();
    let job = attach(&tap, &third, MirrorOptions::new());
    until(&job, &Event::Ready);
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(third.contents().unwrap(), read);
}

#[test]
fn a_soft_cancel_keeps_a_copy_of_one_instant() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, MirrorOptions::new());
    until(&job, &Event::Ready);
    write(&*tap, 123, 4567, 9);
    let before = source.contents().unwrap();
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    write(&*tap, 0, LEN, 50);
    assert_eq!(target.contents().unwrap(), before);
    assert!(!tap.is_mirrored());
}

#[test]
fn any_cancel_before_ready_and_force_after_it_say_cancelled() {
    for (ready, force) in [(false, false), (false, true), (true, true)] {
        let tap = Tap::new(filled() as _);
        let speed = if ready { 0 } else { 1 };
        let job = attach(&tap, &empty(), MirrorOptions::new().speed(speed));
        if ready {
            until(&job, &Event::Ready);
        } else {
            let refused = Err(Refused::State { verb: Verb::Complete, state: JobState::Running });
            assert_eq!(job.control().complete(), refused);
        }
        if force {
            job.control().force_cancel().unwrap()
        } else {
            job.control().keep_copy().unwrap()
        }
        let events = rest(&job);
        let end = [
            Status(JobState::Aborting),
            Event::Cancelled,
            Status(JobState::Concluded),
            Status(JobState::Null),
        ];
        assert!(events.ends_with(&end), "{events:?}");
        assert!(matches!(job.wait(), Err(Error::Cancelled)));
        write(&*tap, 0, 4096, 1);
    }
}

#[test]
fn without_auto_finalize_the_job_waits_and_goes_on_copying_and_without_auto_dismiss_it_stays() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, MirrorOptions::new().auto_finalize(false).auto_dismiss(false));
    until(&job, &Event::Ready);
    job.control().complete().unwrap();
    let events = until(&job, &Event::Pending);
    assert_eq!(events, [Status(JobState::Waiting), Status(JobState::Pending), Event::Pending]);
    // The guest is not held meanwhile, and nothing of this is lost.
    write(&*tap, 0, 1 << 20, 21);
    let refused = Err(Refused::State { verb: Verb::Pause, state: JobState::Pending });
    assert_eq!(job.control().pause(), refused);
    job.control().finalize().unwrap();
    let events = until(&job, &Status(JobState::Concluded));
    assert_eq!(events, [Event::Completed { error: None }, Status(JobState::Concluded)]);
    let control = job.control().clone();
    assert_eq!(control.next_event(Some(Duration::ZERO)), None);
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    control.dismiss().unwrap();
    assert_eq!(control.next_event(FOREVER), Some(Status(JobState::Null)));
    assert_eq!(control.next_event(FOREVER), None);
    assert!(control.dismiss().is_err() && control.force_cancel().is_err());
}

#[test]
fn a_paused_job_is_in_standby_and_only_force_ends_it() {
    let tap = Tap::new(filled() as _);
    let target = empty();
    let job = attach(&tap, &target, MirrorOptions::new());
    until(&job, &Event::Ready);
    let control = job.control();
    assert_eq!(control.resume(), Err(Refused::NotPaused));
    control.pause().unwrap();
    assert_eq!(control.pause(), Err(Refused::Paused { verb: Verb::Pause }));
    assert_eq!(control.progress().state, JobState::Standby);
    assert_eq!(control.keep_copy(), Err(Refused::Paused { verb: Verb::Cancel }));
    write(&*tap, 0, 4096, 99);
    let (offset, dirty) = (control.progress().offset, control.progress().dirty_left);
    assert_eq!((offset, dirty), (LEN, 4096));
    control.complete().unwrap();
    control.resume().unwrap();
    let events = rest(&job);
    assert_eq!(events[..2], [Status(JobState::Standby), Status(JobState::Ready)]);
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap()[..4096], {
        let mut now = vec![0; 4096];
        tap.read_at(&mut now, 0).unwrap();
        now
    });
}

#[test]
fn an_empty_disk_is_ready_at_once_and_waits() {
    let tap = Tap::new(Arc::new(MemoryDisk::new(0)));
    let job = MirrorJob::attach(&tap, Arc::new(MemoryDisk::new(0)), MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    assert!(!job.control().wait_timeout(Duration::from_millis(5)));
    job.control().complete().unwrap();
    job.wait().unwrap();
}

#[test]
fn a_second_job_is_refused_until_the_first_is_over() {
    let tap = Tap::new(filled() as _);
    let job = attach(&tap, &empty(), MirrorOptions::new());
    let second = MirrorJob::attach(&tap, empty(), MirrorOptions::new());
    assert!(matches!(second, Err(Error::Busy { .. })));
    drop(job);
    attach(&tap, &empty(), MirrorOptions::new());
}

#[test]
fn a_write_that_began_before_the_job_is_copied_and_waited_for() {
    let source = filled();
    let (slow, faults) = faulty(&source);
    let tap = Tap::new(slow);
    let gate = faults.hold(OpKind::Write, None);
    let target = empty();
    thread::scope(|scope| {
        let tap = &tap;
        scope.spawn(move || write(&**tap, 5000, 10_000, 60));
        gate.wait_held(1);
        let job = attach(tap, &target, MirrorOptions::new());
        until(&job, &Event::Ready);
        job.control().complete().unwrap();
        assert!(!job.control().wait_timeout(Duration::from_millis(20)), "the old write is under way");
        gate.open();
        job.wait().unwrap();
    });
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

/// Rule 4: the final check and the pivot are one step for the guest.
#[test]
fn four_writers_lose_nothing_through_any_end_in_any_mode() {
    const STAMPS: u64 = LEN / 4096;
    for round in 0..24u64 {
        let mode = if round % 2 == 0 { CopyMode::Background } else { CopyMode::WriteBlocking };
        let (source, target) = (filled(), empty());
        let tap = Tap::new(Arc::clone(&source) as _);
        let options = MirrorOptions::new().copy_mode(mode).granularity(512 << (round % 12));
        let job = attach(&tap, &target, options);
        let stop = AtomicBool::new(false);
        let last: Vec<Vec<(u64, u64)>> = thread::scope(|scope| {
            let writers: Vec<_> = (0..4u64)
                .map(|writer| {
                    let (tap, stop) = (&tap, &stop);
                    scope.spawn(move || {
                        let mut last = vec![(0, 0); STAMPS as usize];
                        let mut version = 0u64;
                        while !stop.load(Ordering::Relaxed) && version < 200_000 {
                            version += 1;
                            // Each writer has bytes of its own in every granule.
                            let slot = version * 7919 % STAMPS;
                            let at = slot * 4096 + writer * 700 + 100;
                            tap.write_at(&version.to_be_bytes(), at, WriteFlags::NONE).unwrap();
                            last[slot as usize] = (at, version);
                            if version.is_multiple_of(16) {
                                thread::yield_now();
                            }
                        }
                        last
                    })
                })
                .collect();
            let control = job.control();
            if round % 3 == 0 {
                // Converges, whatever the guest does.
                control.change(CopyMode::WriteBlocking).unwrap();
            }
            if mode == CopyMode::Background && round % 3 != 0 {
                // Nothing makes the copy overtake four writers; they end when they have done their part.
                while control.progress().dirtied < LEN / 4 {
                    thread::yield_now();
                }
                stop.store(true, Ordering::Relaxed);
            }
            until(&job, &Event::Ready);
            match round / 2 % 3 {
                0 => control.complete().unwrap(),
                1 => control.keep_copy().unwrap(),
                _ => control.force_cancel().unwrap(),
            }
            assert!(control.wait_timeout(Duration::from_secs(60)), "round {round} hangs");
            stop.store(true, Ordering::Relaxed);
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        for (at, version) in last.into_iter().flatten().filter(|(_, version)| *version > 0) {
            let mut stamp = [0; 8];
            tap.read_at(&mut stamp, at).unwrap();
            assert_eq!(u64::from_be_bytes(stamp), version, "round {round} at {at}");
        }
    }
}

/// Each discard once made its whole unit dirt, also where the target gets what the guest writes: one who
/// discarded a little here and there made as much of it as the job could copy, and that was never ready.
#[test]
fn a_discard_reaches_both_disks_as_a_write_does() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, MirrorOptions::new().copy_mode(CopyMode::WriteBlocking));
    until(&job, &Event::Ready);
    for (start, len) in [(65_536, 65_536), (1_000_000, 512), (2 << 20, 2 << 20)] {
        tap.discard(ByteRange::at(start, len)).unwrap();
    }
    let progress = job.control().progress();
    assert_eq!((progress.dirtied, progress.mirrored), (0, (2 << 20) + 65_536 + 512));
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    assert_eq!(source.contents().unwrap()[65_536..2 * 65_536], [0; 65_536]);
    job.control().complete().unwrap();
    job.wait().unwrap();
}

#[test]
fn coarse_granules_copy_no_more_than_what_was_written() {
    for granularity in [64 << 10, 1 << 20, 64 << 20] {
        let (source, target) = (filled(), empty());
        let tap = Tap::new(Arc::clone(&source) as _);
        let job = attach(&tap, &target, MirrorOptions::new().granularity(granularity));
        until(&job, &Event::Ready);
        let before = job.control().progress().copied;
        let mut written = 0;
        for i in 0..100u64 {
            write(&*tap, i * 37 % (LEN / 4096) * 4096, 4096, i as u8);
            written += 4096;
        }
        job.control().complete().unwrap();
        let control = job.control().clone();
        job.wait().unwrap();
        let copied = control.progress().copied - before;
        assert!(copied > 0 && copied <= written, "{copied} for {written} by {granularity}");
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    }
}

#[test]
fn sync_none_copies_only_what_is_written_from_now_on() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, MirrorOptions::new().sync(SyncMode::None));
    until(&job, &Event::Ready);
    write(&*tap, 8192, 4096, 5);
    job.control().keep_copy().unwrap();
    let outcome = job.wait().unwrap();
    assert_eq!((outcome.copied, target.allocated_bytes()), (4096, 4096));
    let plain = MirrorJob::start(source, target, MirrorOptions::new().sync(SyncMode::None));
    assert!(matches!(plain, Err(Error::NeedsTap)));
}

fn dirty(tap: &Tap) -> u64 {
    tap.bitmap("b").unwrap().dirty_bytes()
}

#[test]
fn an_incremental_mirror_copies_the_bitmap_and_starts_it_anew() {
    let source = filled();
    let target = Arc::new(MemoryDisk::with_contents(&source.contents().unwrap()).logged());
    let tap = Tap::new(Arc::clone(&source) as _);
    tap.add_bitmap("b", 65_536).unwrap();
    assert!(matches!(tap.add_bitmap("b", 65_536), Err(Error::BitmapExists { .. })));
    write(&*tap, 100, 10, 9);
    tap.write_zeroes(ByteRange::at(1 << 20, 65_536), ZeroFlags::MAY_UNMAP).unwrap();
    assert_eq!(dirty(&tap), 2 * 65_536);
    let incremental = || MirrorOptions::new().sync(SyncMode::Incremental).bitmap("b", BitmapMode::OnSuccess);
    target.take_log();
    let job = attach(&tap, &target, incremental());
    assert!(matches!(tap.remove_bitmap("b"), Err(Error::BitmapBusy { .. })));
    until(&job, &Event::Ready);
    write(&*tap, 3 << 20, 512, 4);
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    assert_eq!(dirty(&tap), 0, "the copy has everything");
    let written: u64 = target
        .take_log()
        .iter()
        .map(|op| match op {
            DiskOp::Write(range, _) | DiskOp::WriteZeroes(range, _) => range.len(),
            _ => 0,
        })
        .sum();
    assert!(written <= 2 * 65_536 + 4096, "{written}");
    write(&*tap, 0, 1, 1);
    assert_eq!(dirty(&tap), 65_536, "it goes on collecting");
    let missing = MirrorJob::attach(&tap, empty(), MirrorOptions::new().sync(SyncMode::Incremental));
    assert!(matches!(missing, Err(Error::SyncBitmap { .. })));
    let unknown = MirrorOptions::new().sync(SyncMode::Bitmap).bitmap("c", BitmapMode::Never);
    assert!(matches!(MirrorJob::attach(&tap, empty(), unknown), Err(Error::NoBitmap { .. })));
}

#[test]
fn what_becomes_of_the_bitmap_follows_its_mode() {
    for (mode, succeeds, left) in [
        (BitmapMode::Never, true, 3 * 65_536),
        (BitmapMode::Never, false, 3 * 65_536),
        (BitmapMode::OnSuccess, true, 0),
        (BitmapMode::OnSuccess, false, 3 * 65_536),
        (BitmapMode::Always, true, 0),
        // The two of before were copied and flushed when the job was ready; the third was not.
        (BitmapMode::Always, false, 65_536),
    ] {
        let (source, target) = (filled(), empty());
        let (bad, faults) = faulty(&target);
        let tap = Tap::new(Arc::clone(&source) as _);
        tap.add_bitmap("b", 65_536).unwrap();
        write(&*tap, 0, 65_536, 4);
        write(&*tap, 1 << 20, 65_536, 5);
        let options = MirrorOptions::new().sync(SyncMode::Bitmap).bitmap("b", mode);
        let job = MirrorJob::attach(&tap, bad, options).unwrap();
        until(&job, &Event::Ready);
        if !succeeds {
            faults.inject(Fault::on(OpKind::Write).forever());
        }
        write(&*tap, 2 << 20, 65_536, 6);
        // The job may fail before it is asked to end.
        let _ = job.control().keep_copy();
        assert_eq!(job.wait().is_ok(), succeeds);
        assert_eq!(dirty(&tap), left, "{mode:?} {succeeds}");
    }
}

/// A machine monitor with one thread for its disk, as many have.
#[test]
fn one_thread_with_two_writes_open_does_not_hang_the_end() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, MirrorOptions::new());
    until(&job, &Event::Ready);
    let first = tap.begin_write(ByteRange::at(0, 512)).unwrap();
    job.control().complete().unwrap();
    // Begun while the guest is held, most likely; the first one cannot be finished before.
    let second = tap.begin_write(ByteRange::at(512, 512)).unwrap();
    for ticket in [first, second] {
        let result = ticket.source().write_at(&[7; 512], ticket.range().start(), WriteFlags::NONE);
        ticket.complete(result, None).unwrap();
    }
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    assert_eq!(target.contents().unwrap()[..1024], [7; 1024]);
}

/// Stops the writers also when the test fails, those too that wait for the job.
struct StopOnDrop<'a>(&'a AtomicBool, &'a MirrorJob);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if thread::panicking() {
            let _ = self.1.control().force_cancel();
        }
    }
}

/// Verbs at random, failures at random, writers all the time: whatever the ends, the tap has every
/// acknowledged write.
#[test]
fn a_restless_operator_and_a_bad_target_lose_nothing() {
    for round in 0..12u64 {
        let (source, target) = (filled(), empty());
        let (bad, faults) = faulty(&target);
        let tap = Tap::new(Arc::clone(&source) as _);
        let options =
            MirrorOptions::new().on_target_error(OnError::Ignore).copy_mode(CopyMode::WriteBlocking);
        let job = MirrorJob::attach(&tap, bad, options).unwrap();
        let (control, stop) = (job.control(), AtomicBool::new(false));
        let last: Vec<(u64, u64)> = thread::scope(|scope| {
            let writers: Vec<_> = (0..3u64)
                .map(|writer| {
                    let (tap, stop) = (&tap, &stop);
                    scope.spawn(move || {
                        let mut version = 0u64;
                        while !stop.load(Ordering::Relaxed) {
                            version += 1;
                            tap.write_at(&version.to_be_bytes(), writer * 512 + 8, WriteFlags::NONE).unwrap();
                            tap.write_at(&[1; 3000], version * 7919 % (LEN - 8192) + 4096, WriteFlags::NONE)
                                .unwrap();
                        }
                        (writer * 512 + 8, version)
                    })
                })
                .collect();
            let _stop = StopOnDrop(&stop, &job);
            for step in 0..200u64 {
                // Refusals are part of the play.
                let _ = match (step * 31 + round * 17) % 7 {
                    0 => control.pause(),
                    1 | 2 => control.resume(),
                    3 => control.set_speed(step % 3 * (50 << 20)),
                    4 => control.change(CopyMode::Background),
                    5 => control.change(CopyMode::WriteBlocking),
                    _ => {
                        faults.inject(Fault::on(OpKind::Write).after(step % 5));
                        control.resume()
                    }
                };
                thread::yield_now();
            }
            let _ = (control.resume(), control.set_speed(0), control.change(CopyMode::WriteBlocking));
            until(&job, &Event::Ready);
            // From the pivot on the target is the guest's disk.
            faults.heal();
            let end = if round % 2 == 0 { control.complete() } else { control.keep_copy() };
            assert_eq!(end, Ok(()));
            assert!(control.wait_timeout(Duration::from_secs(60)), "round {round} hangs");
            stop.store(true, Ordering::Relaxed);
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        for (at, version) in last.into_iter().filter(|(_, version)| *version > 0) {
            let mut stamp = [0; 8];
            tap.read_at(&mut stamp, at).unwrap();
            assert_eq!(u64::from_be_bytes(stamp), version, "round {round}");
        }
    }
}
