//! Whole jobs on real threads, over disks in memory, through the published interface.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, ErrorKind as DiskError, Extent, ExtentKind, Geometry, Result as DiskResult,
    Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{
    Error, ErrorAction, ErrorKind, Event, GivenUp, IoStatus, JobState, MirrorJob, MirrorOptions, OnError,
    Operation, Outcome, PlanTarget, SyncMode, plan,
};

/// Long enough that only a hang reaches it.
const FOREVER: Duration = Duration::from_secs(60);

fn write(disk: &dyn BlockDevice, offset: u64, len: u64, seed: u8) {
    let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 ^ seed | 1).collect();
    disk.write_at(&bytes, offset, WriteFlags::NONE).unwrap();
}

fn filled(len: u64) -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(len);
    write(&disk, 0, len, 3);
    Arc::new(disk)
}

fn mirror(source: &Arc<MemoryDisk>, target: &Arc<MemoryDisk>, options: MirrorOptions) -> Outcome {
    MirrorJob::start(Arc::clone(source) as _, Arc::clone(target) as _, options).unwrap().wait().unwrap()
}

fn faulty(disk: &Arc<MemoryDisk>) -> (Arc<FaultDisk>, Faults) {
    let faults = Faults::new();
    (Arc::new(FaultDisk::new(Arc::clone(disk) as _, faults.clone())), faults)
}

#[test]
fn odd_sizes_and_all_granularities_give_equal_disks() {
    for len in [0, 1, 511, 512, 1000, 65535, (1 << 20) + 512] {
        for shift in 9..=26 {
            let source = MemoryDisk::new(len).with_cluster_size(4096);
            if len > 300 {
                write(&source, len / 3, len / 4, 1);
                write(&source, len - 1, 1, 2);
            }
            let source = Arc::new(source);
            let target = Arc::new(MemoryDisk::new(len).with_cluster_size(65536));
            if len > 0 {
                write(&*target, len / 2, len - len / 2, 9);
            }
            let outcome = mirror(&source, &target, MirrorOptions::new().granularity(1 << shift));
            assert_eq!(target.contents().unwrap(), source.contents().unwrap(), "{len} by {}", 1 << shift);
            assert_eq!(outcome.copied + outcome.zeroed + outcome.skipped, len);
        }
    }
}

/// Bytes of whole target units that the source's data touches.
fn touched(source: &MemoryDisk, unit: u64, sync: SyncMode) -> u64 {
    let mut bytes = 0;
    let mut last = 0;
    let len = source.len();
    source
        .extents(ByteRange::new(0, len), &mut |extent: Extent| {
            if extent.kind == ExtentKind::Data && (sync == SyncMode::Full || extent.in_top()) {
                let units = extent.range.align_outward(unit).intersect(ByteRange::new(last, len));
                bytes += units.len();
                last = last.max(units.end());
            }
            Visit::Continue(())
        })
        .unwrap();
    bytes
}

#[test]
fn no_target_cluster_is_allocated_that_the_sources_data_does_not_touch() {
    const LEN: u64 = (4 << 20) + 512;
    for source_cluster in [512, 4096, 65536, 2 << 20] {
        for target_cluster in [None, Some(512), Some(4096), Some(65536), Some(2 << 20)] {
            for granularity in [512, 4096, 65536, 1 << 20, 64 << 20] {
                let source = MemoryDisk::new(LEN).with_cluster_size(source_cluster);
                for at in [100, 300_000, 700_001, 2_500_000, LEN - 1] {
                    write(&source, at, 1, 7);
                }
                write(&source, 1 << 20, 100_000, 8);
                let target = MemoryDisk::new(LEN);
                let target = match target_cluster {
                    Some(size) => target.with_cluster_size(size),
                    None => target,
                };
                let (source, target) = (Arc::new(source), Arc::new(target));
                // Zeros inside data are not sought: the bound must hold by the map alone.
                let options = MirrorOptions::new().granularity(granularity).min_zero_run(0);
                mirror(&source, &target, options);
                assert_eq!(target.contents().unwrap(), source.contents().unwrap());
                let bound = touched(&source, target_cluster.unwrap_or(512), SyncMode::Full);
                assert_eq!(
                    target.allocated_bytes(),
                    bound,
                    "{source_cluster} to {target_cluster:?} by {granularity}"
                );
            }
        }
    }
}

#[test]
fn top_lets_the_backing_disk_show_however_coarse_the_granule() {
    const LEN: u64 = 4 << 20;
    let base: Arc<dyn BlockDevice> = filled(LEN);
    let source = MemoryDisk::new(LEN).with_cluster_size(4096).with_backing(Arc::clone(&base));
    write(&source, 1 << 20, 4096, 40);
    source.write_zeroes(ByteRange::at(2 << 20, 8192), ZeroFlags::NONE).unwrap();
    let source = Arc::new(source);
    for granularity in [512, 64 << 20] {
        let target = MemoryDisk::new(LEN).with_cluster_size(4096).with_backing(Arc::clone(&base));
        let target = Arc::new(target);
        let options = MirrorOptions::new().sync(SyncMode::Top).granularity(granularity);
        let outcome = mirror(&source, &target, options);
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
        assert_eq!((outcome.copied, outcome.zeroed), (4096, 8192));
        assert_eq!(target.allocated_bytes(), 4096);
    }
}

#[test]
fn zeros_inside_data_are_left_out_or_take_the_place_of_old_contents() {
    const LEN: u64 = 4 << 20;
    let source = MemoryDisk::new(LEN);
    source.write_at(&vec![0; LEN as usize], 0, WriteFlags::NONE).unwrap();
    write(&source, 1 << 20, 65536, 5);
    let source = Arc::new(source);

    let fresh = Arc::new(MemoryDisk::new(LEN).with_cluster_size(65536));
    let outcome = mirror(&source, &fresh, MirrorOptions::new());
    assert_eq!((outcome.copied, outcome.skipped), (65536, LEN - 65536));
    assert_eq!(fresh.allocated_bytes(), 65536);

    let old = filled(LEN);
    let outcome = mirror(&source, &old, MirrorOptions::new());
    assert_eq!((outcome.copied, outcome.zeroed), (65536, LEN - 65536));
    assert_eq!(old.contents().unwrap(), source.contents().unwrap());
    assert_eq!(old.allocated_bytes(), 65536);

    let as_it_is = Arc::new(MemoryDisk::new(LEN));
    let outcome = mirror(&source, &as_it_is, MirrorOptions::new().min_zero_run(0));
    assert_eq!(outcome.copied, LEN);
}

#[test]
fn zeros_that_the_maps_tell_of_are_written_where_all_is_to_be_allocated() {
    const LEN: u64 = 4 << 20;
    let base: Arc<dyn BlockDevice> = filled(LEN);
    let source = MemoryDisk::new(LEN).with_cluster_size(4096).with_backing(Arc::clone(&base));
    write(&source, 1 << 20, 4096, 40);
    source.write_zeroes(ByteRange::at(2 << 20, 8192), ZeroFlags::NONE).unwrap();
    let source = Arc::new(source);
    for (sync, is_zero, allocated) in
        [(SyncMode::Full, true, LEN), (SyncMode::Full, false, LEN), (SyncMode::Top, false, 4096 + 8192)]
    {
        let target = MemoryDisk::new(LEN).with_cluster_size(4096);
        let target = Arc::new(match sync {
            SyncMode::Top => target.with_backing(Arc::clone(&base)),
            _ => target,
        });
        let options = MirrorOptions::new().sync(sync).target_is_zero(is_zero).min_zero_run(0).allocate(true);
        let planned = plan(&*source, PlanTarget::Existing(&*target), &options).unwrap();
        let outcome = mirror(&source, &target, options);
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
        assert_eq!((outcome.copied, outcome.zeroed, target.allocated_bytes()), (allocated, 0, allocated));
        assert_eq!((planned.copy, planned.zero, planned.skip), (allocated, 0, LEN - allocated));
    }
    // An empty disk of no clusters is data all over, too.
    let empty = Arc::new(MemoryDisk::new(LEN));
    let target = Arc::new(MemoryDisk::new(LEN));
    let outcome = mirror(&empty, &target, MirrorOptions::new().min_zero_run(0).allocate(true));
    assert_eq!((outcome.copied, target.allocated_bytes()), (LEN, LEN));
}

#[test]
fn a_huge_sparse_disk_takes_a_handful_of_queries() {
    const RUNS: u64 = 256;
    const RUN: u64 = 64 << 10;
    let source = MemoryDisk::new(8 << 40).with_cluster_size(65536);
    for i in 0..RUNS {
        write(&source, i * (32 << 30), RUN, i as u8);
    }
    let source = Arc::new(source);
    let target = Arc::new(MemoryDisk::new(8 << 40).with_cluster_size(65536));
    let ((watched_source, asked_source), (watched_target, asked_target)) = (faulty(&source), faulty(&target));
    let outcome =
        MirrorJob::start(watched_source, watched_target, MirrorOptions::new()).unwrap().wait().unwrap();
    assert_eq!((outcome.copied, outcome.zeroed), (RUNS * RUN, 0));
    assert_eq!(target.allocated_bytes(), RUNS * RUN);
    let asked = (asked_source.seen(OpKind::Extents), asked_target.seen(OpKind::Extents));
    assert_eq!(asked, (1, 1));
    assert_eq!(asked_target.seen(OpKind::WriteZeroes), 0);
}

#[test]
fn a_plan_says_what_the_job_then_does() {
    let source = MemoryDisk::new(8 << 20);
    write(&source, 3 << 20, 100_000, 1);
    let target = MemoryDisk::new(8 << 20);
    write(&target, 0, 1 << 20, 2);
    let (source, target) = (Arc::new(source), Arc::new(target));
    let options = MirrorOptions::new();
    let plan = plan(&*source, PlanTarget::Existing(&*target), &options).unwrap();
    let outcome = mirror(&source, &target, options);
    assert_eq!(plan.granularity, outcome.granularity);
    assert_eq!((plan.copy, plan.zero, plan.skip), (outcome.copied, outcome.zeroed, outcome.skipped));
}

#[test]
fn guests_that_write_and_mark_lose_nothing() {
    const LEN: u64 = 1 << 20;
    const WRITERS: u64 = 4;
    let source = filled(LEN);
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(65536));
    let (held, faults) = faulty(&target);
    // The job cannot end before the writers have.
    let flush = faults.hold(OpKind::Flush, None);
    let job =
        MirrorJob::start(Arc::clone(&source) as _, held, MirrorOptions::new().granularity(65536)).unwrap();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (source, control) = (&source, job.control());
            scope.spawn(move || {
                for round in 0..200u64 {
                    let at = (round * 7919 + writer * 131) % (LEN - 3000);
                    write(&**source, at, 1 + round * 13 % 3000, (round + writer) as u8);
                    control.mark_dirty(ByteRange::at(at, 1 + round * 13 % 3000));
                }
            });
        }
    });
    flush.open();
    let outcome = job.wait().unwrap();
    assert!(outcome.copied >= LEN);
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn refusals_name_both_lengths_and_touch_nothing() {
    let source = filled(1000);
    let target = Arc::new(MemoryDisk::new(1024).named("t"));
    let error = MirrorJob::start(Arc::clone(&source) as _, target, MirrorOptions::new()).unwrap_err();
    assert_eq!(error.to_string(), "source memory disk has 1000 bytes, target t has 1024: they must be equal");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);

    let read_only = Arc::new(MemoryDisk::new(1000).read_only());
    let error = MirrorJob::start(Arc::clone(&source) as _, read_only, MirrorOptions::new()).unwrap_err();
    assert!(matches!(error, Error::TargetReadOnly { .. }));

    let target = Arc::new(MemoryDisk::new(1000).logged());
    let bad = MirrorOptions::new().granularity(3000);
    assert!(MirrorJob::start(source, Arc::clone(&target) as _, bad).is_err());
    assert_eq!(target.take_log(), []);
}

#[test]
fn a_cancelled_job_ends_although_its_peers_are_stuck() {
    let source = filled(8 << 20);
    let (stuck, faults) = faulty(&source);
    let gate = faults.hold(OpKind::Read, None);
    let job = MirrorJob::start(stuck, Arc::new(MemoryDisk::new(8 << 20)), MirrorOptions::new()).unwrap();
    gate.wait_held(2);
    // No lock is held while a device is waited for.
    assert!(job.control().progress().in_flight > 0);
    assert!(!job.control().wait_timeout(Duration::ZERO));
    job.control().cancel();
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
}

#[test]
fn a_dropped_job_is_cancelled() {
    let source = filled(8 << 20);
    let (stuck, faults) = faulty(&source);
    let gate = faults.hold(OpKind::Read, None);
    let job = MirrorJob::start(stuck, Arc::new(MemoryDisk::new(8 << 20)), MirrorOptions::new()).unwrap();
    let control = job.control().clone();
    gate.wait_held(1);
    drop(job);
    assert_eq!(control.progress().state, JobState::Concluded);
}

/// A thread that already had its action when the job was given up, but called the source only after the
/// source had been asked to end blocked calls, used to wait there for ever. Many jobs are dropped at the
/// moment their threads start to read, so that some of them are caught in between.
#[test]
fn no_call_is_forgotten_when_a_job_is_dropped() {
    for _ in 0..200 {
        let source = filled(4 << 20);
        let (stuck, faults) = faulty(&source);
        let _gate = faults.hold(OpKind::Read, None);
        let job = MirrorJob::start(stuck, Arc::new(MemoryDisk::new(4 << 20)), MirrorOptions::new()).unwrap();
        let control = job.control().clone();
        while control.progress().in_flight == 0 {
            thread::yield_now();
        }
        drop(job);
        assert_eq!(control.progress().state, JobState::Concluded);
    }
}

#[test]
fn a_paused_job_stands_still_until_it_is_resumed() {
    let source = filled(8 << 20);
    let target = Arc::new(MemoryDisk::new(8 << 20));
    let (held, faults) = faulty(&target);
    let gate = faults.hold(OpKind::Write, None);
    let options = MirrorOptions::new().max_in_flight(2);
    let job = MirrorJob::start(Arc::clone(&source) as _, held, options).unwrap();
    gate.wait_held(2);
    job.control().pause().unwrap();
    gate.open();
    while job.control().progress().in_flight > 0 {
        thread::yield_now();
    }
    let still = job.control().progress();
    assert_eq!((still.state, still.offset), (JobState::Paused, 1 << 20));
    assert!(!job.control().wait_timeout(Duration::from_millis(10)));
    assert_eq!(job.control().progress().offset, 1 << 20);
    job.control().resume().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn a_full_target_stops_the_job_and_resume_goes_on() {
    let source = filled(4 << 20);
    let target = Arc::new(MemoryDisk::new(4 << 20));
    let (full, faults) = faulty(&target);
    faults.inject(Fault::on(OpKind::Write).after(1).forever().with(DiskError::NoSpace));
    let options = MirrorOptions::new().on_target_error(OnError::Enospc);
    let job = MirrorJob::start(Arc::clone(&source) as _, full, options).unwrap();
    while job.control().progress().state != JobState::Paused {
        thread::yield_now();
    }
    assert_eq!(job.control().progress().io_status, IoStatus::NoSpace);
    let events = job.control().events();
    assert!(matches!(
        events.iter().find(|event| matches!(event, Event::Error { .. })),
        Some(Event::Error { operation: Operation::Write, action: ErrorAction::Stop, .. })
    ));
    // Not always the last: what was in flight beside it fails too.
    assert!(events.contains(&Event::Status(JobState::Paused)), "{events:?}");
    faults.heal();
    job.control().resume().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn the_nth_failure_is_reported_for_every_n() {
    for kind in [OpKind::Read, OpKind::Write, OpKind::WriteZeroes, OpKind::Extents, OpKind::Flush] {
        for n in 0.. {
            let source = MemoryDisk::new(3 << 20);
            write(&source, 0, 1 << 20, 1);
            write(&source, 2 << 20, 1 << 20, 1);
            let target = filled(3 << 20);
            let ((source, on_source), (target, on_target)) = (faulty(&Arc::new(source)), faulty(&target));
            on_source.inject(Fault::on(kind).after(n));
            on_target.inject(Fault::on(kind).after(n));
            let result = MirrorJob::start(source, target, MirrorOptions::new()).unwrap().wait();
            match (on_source.failed(), on_target.failed()) {
                (0, 0) => {
                    result.unwrap();
                    assert!(n > 0, "{kind:?} never happened");
                    break;
                }
                (failed, _) => {
                    let expected = if failed > 0 { ErrorKind::Source } else { ErrorKind::Target };
                    let error = result.unwrap_err();
                    assert!(
                        error.kind() == expected || (on_source.failed() > 0 && on_target.failed() > 0),
                        "{kind:?} {n}: {error}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_ignore_leaves_out_is_listed_and_the_rest_is_right() {
    let source = filled(2 << 20);
    let target = Arc::new(MemoryDisk::new(2 << 20));
    let (bad, faults) = faulty(&source);
    faults.inject(Fault::on(OpKind::Read).forever().within(ByteRange::at(70_000, 10)));
    let options = MirrorOptions::new().on_source_error(OnError::Ignore);
    let job = MirrorJob::start(bad, Arc::clone(&target) as _, options).unwrap();
    assert!(job.control().wait_timeout(FOREVER));
    let outcome = job.wait().unwrap();
    let gap = ByteRange::new(69_632, 70_144);
    assert_eq!(outcome.given_up.iter().map(|g| g.range).collect::<Vec<_>>(), [gap]);
    let (source, mut target) = (source.contents().unwrap(), target.contents().unwrap());
    let gap = gap.start() as usize..gap.end() as usize;
    target[gap.clone()].copy_from_slice(&source[gap]);
    assert_eq!(source, target);
}

/// Panics when it is read.
#[derive(Debug)]
struct Broken;

impl BlockDevice for Broken {
    fn len(&self) -> u64 {
        1 << 20
    }
    fn name(&self) -> &str {
        "broken"
    }
    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> DiskResult<()> {
        panic!("a bug in a device")
    }
    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> DiskResult<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> DiskResult<()> {
        Ok(())
    }
    fn discard(&self, _: ByteRange) -> DiskResult<()> {
        Ok(())
    }
    fn flush(&self) -> DiskResult<()> {
        Ok(())
    }
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> DiskResult<()> {
        let _ = visit(Extent::new(range, ExtentKind::Data));
        Ok(())
    }
}

#[test]
fn a_device_that_panics_ends_the_job_instead_of_hanging_it() {
    let target = Arc::new(MemoryDisk::new(1 << 20));
    let job = MirrorJob::start(Arc::new(Broken), target, MirrorOptions::new()).unwrap();
    assert!(matches!(job.wait(), Err(Error::Panicked)));
}

#[test]
fn one_thread_is_enough() {
    let source = filled(5 << 20);
    let target = Arc::new(MemoryDisk::new(5 << 20));
    mirror(&source, &target, MirrorOptions::new().threads(NonZeroUsize::MIN));
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

/// Cannot say what it holds, and counts what it is asked to zero.
#[derive(Debug)]
struct Opaque {
    len: u64,
    zeroed: AtomicU64,
    calls: AtomicU64,
}

impl BlockDevice for Opaque {
    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &str {
        "opaque"
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> DiskResult<()> {
        buf.fill(1);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> DiskResult<()> {
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroFlags) -> DiskResult<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.zeroed.fetch_add(range.len(), Ordering::SeqCst);
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> DiskResult<()> {
        Ok(())
    }

    fn flush(&self) -> DiskResult<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> DiskResult<()> {
        let _ = visit(Extent::new(range, ExtentKind::Data));
        Ok(())
    }
}

#[test]
fn zeroing_100_gib_takes_under_a_thousand_calls() {
    let len = 100 << 30;
    let target = Arc::new(Opaque { len, zeroed: AtomicU64::new(0), calls: AtomicU64::new(0) });
    let source = Arc::new(MemoryDisk::new(len));
    let outcome =
        MirrorJob::start(source, Arc::clone(&target) as _, MirrorOptions::new()).unwrap().wait().unwrap();
    assert_eq!((outcome.zeroed, target.zeroed.load(Ordering::SeqCst)), (len, len));
    let calls = target.calls.load(Ordering::SeqCst);
    assert!(calls < 1000, "{calls}");
}

/// One bad sector of 512 bytes once cost the 4 KiB around it.
#[test]
fn a_bad_sector_costs_one_block_of_the_source_and_few_reads() {
    let len = 1 << 20;
    let source = filled(len);
    let (faulty, faults) = faulty(&source);
    let bad = ByteRange::at(40_960 + 1024, 512);
    faults.inject(Fault::on(OpKind::Read).within(bad).forever());
    let target = Arc::new(MemoryDisk::new(len));
    let options = MirrorOptions::new().on_source_error(OnError::Ignore);
    let job = MirrorJob::start(faulty, Arc::clone(&target) as _, options).unwrap();
    let control = job.control().clone();
    let outcome = job.wait().unwrap();
    let lost: Vec<_> = outcome.given_up.iter().map(|lost| lost.range).collect();
    assert_eq!(lost, [bad]);
    let mut expected = source.contents().unwrap();
    expected[bad.start() as usize..bad.end() as usize].fill(0);
    assert!(target.contents().unwrap() == expected);
    let last = control.events().into_iter().rev().find_map(|event| match event {
        Event::Error { action: ErrorAction::GiveUp, range, .. } => Some(range),
        _ => None,
    });
    assert_eq!(last, Some(bad));
    // Three sizes of pieces, ten tries, and eight blocks once.
    assert!(faults.seen(OpKind::Read) < 100, "{}", faults.seen(OpKind::Read));
}

/// A block whose extents cannot be had was given up, with all of its 4 KiB, although it can be read.
#[test]
fn what_the_source_does_not_map_is_read() {
    let len = 1 << 20;
    let source = filled(len);
    let (faulty, faults) = faulty(&source);
    let (unmapped, bad) = (ByteRange::at(40_960 + 1024, 512), ByteRange::at(90_112, 512));
    faults.inject(Fault::on(OpKind::Extents).within(unmapped).forever());
    faults.inject(Fault::on(OpKind::Extents).within(bad).forever());
    faults.inject(Fault::on(OpKind::Read).within(bad).forever());
    let target = Arc::new(MemoryDisk::new(len));
    let options = MirrorOptions::new().on_source_error(OnError::Ignore);
    let outcome = MirrorJob::start(faulty, Arc::clone(&target) as _, options).unwrap().wait().unwrap();
    let ranges = |list: &[GivenUp]| list.iter().map(|one| one.range).collect::<Vec<_>>();
    assert_eq!(ranges(&outcome.unmapped), [unmapped, bad]);
    assert_eq!(ranges(&outcome.given_up), [bad]);
    let mut expected = source.contents().unwrap();
    expected[bad.start() as usize..bad.end() as usize].fill(0);
    assert!(target.contents().unwrap() == expected);
}
