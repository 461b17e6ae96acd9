//! Known-bug tests at the published interface: each provokes one of fifteen known bugs of mirrors and has its
//! number. The others are in `src/sim/known_bugs.rs`, and in the tests of the workspace.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_bitmap::{Cursor, DirtyBitmap};
use blockmirror_block::testing::{DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{
    Backing, BlockDevice, ByteRange, ErrorKind as DiskError, Geometry, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{
    CopyMode, Error, ErrorAction, Event, GranularityReason, IoStatus, JobState, MirrorJob, MirrorOptions,
    OnError, SyncMode, Tap,
};

/// Long enough that only a hang reaches it.
const FOREVER: Option<Duration> = Some(Duration::from_secs(60));
const LEN: u64 = 2 << 20;

fn bytes(len: u64, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ seed | 1).collect()
}

fn filled(len: u64) -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::with_contents(&bytes(len, 3)))
}

fn empty(len: u64) -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(len))
}

fn faulty(disk: &Arc<MemoryDisk>) -> (Arc<FaultDisk>, Faults) {
    let faults = Faults::new();
    (Arc::new(FaultDisk::new(Arc::clone(disk) as _, faults.clone())), faults)
}

fn write(disk: &dyn BlockDevice, offset: u64, len: u64, seed: u8) {
    disk.write_at(&bytes(len, seed), offset, WriteFlags::NONE).unwrap();
}

fn next_event(job: &MirrorJob) -> Event {
    let event = job.control().next_event(FOREVER);
    event.unwrap_or_else(|| panic!("nothing comes: {:?}", job.control().progress()))
}

/// Takes events up to and with one that fits.
fn until(job: &MirrorJob, fits: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        events.push(next_event(job));
        if events.last().is_some_and(&fits) {
            return events;
        }
    }
}

fn until_ready(job: &MirrorJob) -> Vec<Event> {
    until(job, |event| *event == Event::Ready)
}

fn keep(job: MirrorJob) {
    job.control().keep_copy().unwrap();
    assert!(job.control().wait_timeout(FOREVER.unwrap()), "it does not end");
    job.wait().unwrap();
}

#[test]
fn known_bug_08_lengths_granules_and_clusters_that_do_not_fit_each_other() {
    for len in [0, 1, 511, 512, 1000, (64 << 10) - 1, (1 << 20) + 512] {
        for (granularity, cluster) in
            [(512, 65_536), (4096, 512), (65_536, 2 << 20), (1 << 20, 4096), (64 << 20, 65_536)]
        {
            let source = filled(len);
            let target = Arc::new(MemoryDisk::new(len).with_cluster_size(cluster));
            let tap = Tap::new(Arc::clone(&source) as _);
            let options = MirrorOptions::new().granularity(granularity);
            let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
            until_ready(&job);
            // The last bytes of the disk, in READY.
            let last = len.min(100);
            write(&*tap, len - last, last, 77);
            keep(job);
            let (found, wanted) = (target.contents().unwrap(), source.contents().unwrap());
            let differs = found.iter().zip(&wanted).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{len} bytes, granularity {granularity}, clusters of {cluster}");
        }
    }
}

#[test]
fn known_bug_09_lengths_that_differ_are_refused_and_an_empty_disk_waits() {
    for (source, target) in [(4096, 4097), (4097, 4096), (0, 1), (1, 0)] {
        let (tap, copy) = (Tap::new(filled(source) as _), Arc::new(MemoryDisk::new(target).logged()));
        let refusals = [
            MirrorJob::start(filled(source), Arc::clone(&copy) as _, MirrorOptions::new()).unwrap_err(),
            MirrorJob::attach(&tap, Arc::clone(&copy) as _, MirrorOptions::new()).unwrap_err(),
        ];
        for refusal in refusals {
            let text = refusal.to_string();
            assert!(text.contains(&source.to_string()) && text.contains(&target.to_string()), "{text}");
        }
        assert!(!tap.is_mirrored() && copy.take_log().is_empty(), "something was begun");
    }
    let tap = Tap::new(empty(0) as _);
    let job = MirrorJob::attach(&tap, empty(0), MirrorOptions::new()).unwrap();
    until_ready(&job);
    let progress = job.control().progress();
    assert_eq!((progress.state, progress.offset, progress.len), (JobState::Ready, 0, 0));
    keep(job);
}

/// One of many in flight fails: it is dirty again, the rest goes on, and what the policy says is seen.
#[test]
fn known_bug_10_a_failed_range_is_dirty_again_before_anybody_is_asked() {
    for (side, policy) in [
        (OpKind::Write, OnError::Ignore),
        (OpKind::Write, OnError::Stop),
        (OpKind::Read, OnError::Ignore),
        (OpKind::Read, OnError::Stop),
    ] {
        let (source, target) = (filled(LEN), empty(LEN));
        let (bad_source, source_faults) = faulty(&source);
        let (bad_target, target_faults) = faulty(&target);
        let faults = if side == OpKind::Read { source_faults } else { target_faults };
        faults.inject(Fault::on(side).after(3).within(ByteRange::new(LEN / 2, LEN)));
        let tap = Tap::new(bad_source);
        let options = MirrorOptions::new()
            .granularity(4096)
            .buf_size(65_536)
            .on_source_error(policy)
            .on_target_error(policy);
        let job = MirrorJob::attach(&tap, bad_target, options).unwrap();
        let events = until(&job, |event| matches!(event, Event::Error { .. }));
        let Some(Event::Error { action, range, .. }) = events.last() else { unreachable!() };
        assert!(!range.is_empty() && range.start() >= LEN / 2, "{range}");
        if policy == OnError::Stop {
            assert_eq!(*action, ErrorAction::Stop);
            // What was in flight beside it is finished; what failed is not counted.
            let progress = job.control().progress();
            assert_eq!((progress.state, progress.io_status), (JobState::Paused, IoStatus::Failed));
            assert!(progress.len - progress.offset >= range.len());
            job.control().resume().unwrap();
            assert_eq!(job.control().progress().io_status, IoStatus::Ok, "resume forgets the error");
        }
        until_ready(&job);
        let progress = job.control().progress();
        assert_eq!((progress.offset, progress.len), (progress.len, LEN));
        keep(job);
        assert!(target.contents().unwrap() == source.contents().unwrap(), "they differ");
    }
}

/// The io-status is that of the first error; READY is not emitted while an error is pending; a failed flush
/// is a failure.
#[test]
fn known_bug_10_errors_at_the_last_step_and_of_flushes_count() {
    // The very last copy fails, so that everything else is done.
    let (source, target) = (filled(LEN), empty(LEN));
    let (bad, faults) = faulty(&target);
    let last = ByteRange::new(LEN - 4096, LEN);
    faults.inject(Fault::on(OpKind::Write).within(last).with(DiskError::NoSpace));
    faults.inject(Fault::on(OpKind::Write).within(ByteRange::new(0, 4096)));
    let tap = Tap::new(Arc::clone(&source) as _);
    let options = MirrorOptions::new().on_target_error(OnError::Stop).max_in_flight(1).buf_size(65_536);
    let job = MirrorJob::attach(&tap, bad, options).unwrap();
    let stopped = |event: &Event| matches!(event, Event::Error { action: ErrorAction::Stop, .. });
    until(&job, stopped);
    assert_eq!(job.control().progress().io_status, IoStatus::Failed);
    job.control().resume().unwrap();
    let events = until(&job, stopped);
    assert!(!events.contains(&Event::Ready));
    assert_eq!(job.control().progress().io_status, IoStatus::NoSpace);
    assert_eq!(job.control().next_event(Some(Duration::ZERO)), Some(Event::Status(JobState::Paused)));
    assert_eq!(job.control().next_event(Some(Duration::ZERO)), None, "READY with an error pending");
    // Then the flush.
    faults.inject(Fault::on(OpKind::Flush));
    job.control().resume().unwrap();
    let events = until(&job, stopped);
    assert!(!events.contains(&Event::Ready), "{events:?}");
    job.control().resume().unwrap();
    until_ready(&job);
    faults.inject(Fault::on(OpKind::Flush));
    job.control().keep_copy().unwrap();
    until(&job, stopped);
    assert!(!job.control().wait_timeout(Duration::ZERO), "the end without a flush");
    job.control().resume().unwrap();
    job.wait().unwrap();
    assert!(target.contents().unwrap() == source.contents().unwrap(), "they differ");
    // Where errors are reported, so is this one.
    for ready in [false, true] {
        let (bad, faults) = faulty(&empty(LEN));
        let tap = Tap::new(filled(LEN) as _);
        if !ready {
            faults.inject(Fault::on(OpKind::Flush));
        }
        let job = MirrorJob::attach(&tap, bad, MirrorOptions::new()).unwrap();
        if ready {
            until_ready(&job);
            faults.inject(Fault::on(OpKind::Flush));
            job.control().complete().unwrap();
        }
        assert!(matches!(job.wait(), Err(Error::Target(_))));
    }
}

#[test]
fn known_bug_12_progress_only_grows_stands_while_paused_and_events_end() {
    let job = MirrorJob::attach(&Tap::new(filled(LEN)), empty(LEN), MirrorOptions::new()).unwrap();
    until_ready(&job);
    let progress = job.control().progress();
    assert_eq!((progress.state, progress.offset, progress.len), (JobState::Ready, LEN, LEN));
    keep(job);
    let (source, target) = (filled(LEN), empty(LEN));
    let tap = Tap::new(Arc::clone(&source) as _);
    let options = MirrorOptions::new().granularity(4096).buf_size(65_536).speed(20 << 20);
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
    let control = job.control();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for version in 0..500u64 {
                write(&*tap, version * 7919 % (LEN - 100), 100, version as u8);
            }
        });
        scope.spawn(|| {
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                let progress = control.progress();
                assert!(progress.offset >= last && progress.len >= progress.offset, "{progress:?}");
                last = progress.offset;
                thread::yield_now();
            }
        });
        for _ in 0..10 {
            if control.pause().is_ok() {
                while control.progress().in_flight > 0 {
                    thread::yield_now();
                }
                let offset = control.progress().offset;
                write(&*tap, 0, 4096, 9);
                assert_eq!(control.progress().offset, offset, "it moves while it is paused");
                control.resume().unwrap();
            }
        }
        control.set_speed(0).unwrap();
        stop.store(true, Ordering::Relaxed);
    });
    until_ready(&job);
    while control.progress().offset < control.progress().len {
        thread::yield_now();
    }
    control.complete().unwrap();
    let events = until(&job, |event| *event == Event::Status(JobState::Null));
    assert!(events.contains(&Event::Completed { error: None }));
    let control = control.clone();
    job.wait().unwrap();
    write(&*tap, 0, 4096, 1);
    let _ = (control.pause(), control.complete(), control.set_speed(1), control.force_cancel());
    assert_eq!(control.next_event(Some(Duration::ZERO)), None, "an event after the last state");
}

/// No sleep outlasts a change of speed: at a byte a second a job would sleep for days.
#[test]
fn known_bug_13_a_sleeping_job_hears_every_verb() {
    for verbs in ["speed", "pause, resume, speed", "cancel"] {
        let (source, target) = (filled(LEN), empty(LEN));
        let tap = Tap::new(Arc::clone(&source) as _);
        // One thread, so that none comes later and finds out by itself.
        let options = MirrorOptions::new().speed(1).threads(NonZeroUsize::new(1));
        let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
        let control = job.control();
        // One operation goes first and is paid for later.
        while control.progress().in_flight > 0 || control.progress().offset == 0 {
            thread::yield_now();
        }
        if verbs == "cancel" {
            control.force_cancel().unwrap();
            assert!(control.wait_timeout(FOREVER.unwrap()), "it sleeps on");
            continue;
        }
        if verbs != "speed" {
            control.pause().unwrap();
            assert_eq!(control.progress().state, JobState::Paused);
            control.resume().unwrap();
        }
        control.set_speed(u64::MAX).unwrap();
        until_ready(&job);
        keep(job);
        assert!(target.contents().unwrap() == source.contents().unwrap(), "they differ");
    }
}

#[test]
fn known_bug_14_figures_at_their_limits() {
    // 512-byte granules on 1 TiB, written at both ends.
    let len = 1 << 40;
    let (source, target) = (empty(len), empty(len));
    let tap = Tap::new(Arc::clone(&source) as _);
    let options = MirrorOptions::new().granularity(512);
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
    until_ready(&job);
    write(&*tap, 0, 513, 5);
    write(&*tap, len - 513, 513, 6);
    keep(job);
    for (at, seed) in [(0, 5), (len - 513, 6)] {
        let mut found = vec![0; 513];
        target.read_at(&mut found, at).unwrap();
        assert_eq!(found, bytes(513, seed), "at {at}");
    }
    assert!(target.allocated_bytes() <= 4 * 512);

    // The clamp is over the target's clusters, whatever the source has.
    let coarse = Arc::new(MemoryDisk::new(LEN).with_cluster_size(2 << 20));
    let fine = Arc::new(MemoryDisk::new(LEN).with_cluster_size(512));
    let job = MirrorJob::start(coarse, fine, MirrorOptions::new()).unwrap();
    assert_eq!(job.granularity().bytes, 4096);
    let from_target = GranularityReason::TargetCluster { cluster_size: 512, clamped: true };
    assert_eq!(job.granularity().reason, from_target);
    job.wait().unwrap();

    // A buffer smaller than a granule, and than anything.
    let (source, target) = (filled(LEN), Arc::new(MemoryDisk::new(LEN).logged()));
    let options = MirrorOptions::new().granularity(64 << 20).buf_size(1);
    MirrorJob::start(Arc::clone(&source) as _, Arc::clone(&target) as _, options).unwrap().wait().unwrap();
    assert!(target.contents().unwrap() == source.contents().unwrap(), "they differ");
    let writes = target.take_log().iter().filter(|op| matches!(op, DiskOp::Write(..))).count();
    assert!(writes <= 32, "{writes} writes of less than 64 KiB");

    // A walk over a bitmap sees what was cleared ahead of it, also inside the word it looks at.
    let mut map = DirtyBitmap::new(64 * 512, 512).unwrap();
    map.set(0..64 * 512);
    let mut cursor = Cursor::new(0);
    assert_eq!(cursor.next_run(&map, 512), Some(0..512));
    map.clear(512..63 * 512);
    assert_eq!(cursor.next_run(&map, u64::MAX), Some(63 * 512..64 * 512));
}

/// After the pivot nothing holds the source, and every handle of the guest leads to the target.
#[test]
fn known_bug_15_everybody_follows_the_pivot_and_the_source_is_free() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let (source, target) = (filled(LEN), empty(LEN));
        let tap = Tap::new(Arc::clone(&source) as _);
        // An export that was there before, as a server of the disk has it.
        let export: Arc<dyn BlockDevice> = Arc::clone(&tap) as _;
        let options = MirrorOptions::new().copy_mode(mode);
        let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
        until_ready(&job);
        job.control().complete().unwrap();
        let control = job.control().clone();
        job.wait().unwrap();
        let old = source.contents().unwrap();
        write(&*export, 0, 4096, 99);
        write(&*tap, LEN - 4096, 4096, 98);
        assert!(source.contents().unwrap() == old, "the old image was written to");
        let mut read = vec![0; LEN as usize];
        export.read_at(&mut read, 0).unwrap();
        assert!(read == target.contents().unwrap(), "they differ");
        assert_eq!(read[..4096], bytes(4096, 99));
        assert_eq!(Arc::strong_count(&source), 1, "the source is busy");
        // The other way round the next job works on the target.
        let back = Arc::clone(&source);
        let job = MirrorJob::attach(&tap, back, MirrorOptions::new().sync(SyncMode::Full)).unwrap();
        until_ready(&job);
        keep(job);
        assert!(source.contents().unwrap() == read, "they differ");
        drop(control);
    }
}

/// A target whose layers the job completes from the source.
fn completed(backing: Backing, cluster: Option<u64>) -> Arc<MemoryDisk> {
    let mut geometry = Geometry::plain();
    (geometry.backing, geometry.cluster_size) = (backing, cluster);
    Arc::new(MemoryDisk::new(DISK).with_geometry(geometry))
}

const DISK: u64 = 8 << 20;

/// Zeros that a guest writes beside what is copied were left out: the target was known as zero there, but the
/// job itself had completed the unit with the source's old bytes.
#[test]
fn zeros_beside_a_copy_are_written_where_it_has_completed_the_unit() {
    let whole = ByteRange::new(0, DISK);
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        for (backing, cluster, promise) in
            [(Backing::Remote { can_zero: true }, None, true), (Backing::Hidden, Some(1 << 20), false)]
        {
            let source = Arc::new(MemoryDisk::with_contents(&vec![0x11; DISK as usize]));
            let target = completed(backing, cluster);
            // Without a promise: zeros that the target states.
            target.write_zeroes(whole, ZeroFlags::EXPLICIT).unwrap();
            let tap = Tap::new(Arc::clone(&source) as _);
            let options = MirrorOptions::new()
                .granularity(1 << 20)
                .target_is_zero(promise)
                .speed(65_536)
                .buf_size(1 << 20)
                .copy_mode(mode);
            let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, options).unwrap();
            while job.control().progress().copied == 0 {
                std::thread::yield_now();
            }
            // In the first unit something has been copied, and in all others nothing.
            tap.write_zeroes(ByteRange::new(65_536, 1 << 20), ZeroFlags::NONE).unwrap();
            job.control().set_speed(0).unwrap();
            while job.control().next_event(Some(Duration::from_secs(60))).unwrap() != Event::Ready {}
            job.control().keep_copy().unwrap();
            job.wait().unwrap();
            assert!(source.contents().unwrap() == target.contents().unwrap(), "{mode:?} {backing:?}");
        }
    }
}

/// A server's last unit was completed with bytes behind the end of a shorter source, which has none.
#[test]
fn a_longer_target_behind_a_server_takes_a_source_of_any_length() {
    let source = Arc::new(MemoryDisk::with_contents(&vec![0x22; (1 << 20) + 512]));
    let target = completed(Backing::Remote { can_zero: true }, None);
    target.write_at(&vec![0x33; DISK as usize], 0, WriteFlags::NONE).unwrap();
    let options = MirrorOptions::new().longer_target(true);
    MirrorJob::start(Arc::clone(&source) as _, Arc::clone(&target) as _, options).unwrap().wait().unwrap();
    let (copy, end) = (target.contents().unwrap(), (1 << 20) + 512);
    assert!(copy[..end] == source.contents().unwrap() && copy[end..].iter().all(|byte| *byte == 0x33));
}

/// One bad sector cost the unit around it, readable bytes among them.
#[test]
fn a_bad_sector_costs_itself_where_units_are_completed() {
    let bad = ByteRange::at(2 << 20, 512);
    for (backing, cluster) in [(Backing::Remote { can_zero: true }, None), (Backing::Hidden, Some(1 << 20))] {
        let source = Arc::new(MemoryDisk::with_contents(&vec![0x44; DISK as usize]));
        let faults = Faults::new();
        faults.inject(Fault::on(OpKind::Read).within(bad).forever());
        let faulty = Arc::new(FaultDisk::new(Arc::clone(&source) as _, faults));
        let target = completed(backing, cluster);
        let options =
            MirrorOptions::new().granularity(1 << 20).buf_size(1 << 20).on_source_error(OnError::Ignore);
        let outcome = MirrorJob::start(faulty, Arc::clone(&target) as _, options).unwrap().wait().unwrap();
        let lost: Vec<_> = outcome.given_up.iter().map(|given| given.range).collect();
        assert_eq!(lost, [bad], "{backing:?}");
        let mut wanted = source.contents().unwrap();
        wanted[2 << 20..(2 << 20) + 512].fill(0);
        assert!(target.contents().unwrap() == wanted, "{backing:?}");
    }
}
