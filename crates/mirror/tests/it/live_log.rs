//! Logs of live jobs: no guest write before its regions are marked, what is cleared and when, and a job that
//! goes on where another has ended.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod end;
mod queue;
mod room;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use blockmirror_block::cancel::CancelSource;
use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{Fault, Faults, MemoryDisk, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, Error as DiskError, ErrorKind, Extent, Geometry, Result, Visit, WriteFlags,
    ZeroFlags,
};
use blockmirror_mirror::{
    Begin, CopyMode, Error, Event, GroupMember, LiveLog, LogStart, MirrorGroup, MirrorJob, MirrorOptions,
    OnError, RegionLog, SyncMode, Tap,
};

use crate::tap::{FOREVER, empty, faulty, filled, until, write};

const REGION: u64 = 256 << 10;
const LEN: u64 = 4 << 20;
const REGIONS: u64 = LEN / REGION;

/// A log in memory. Each of its operations flushes `disk`, whose faults are its own.
#[derive(Debug)]
struct Log {
    kept: Mutex<Kept>,
    disk: Arc<dyn BlockDevice>,
}

#[derive(Clone, Debug, Default)]
struct Kept {
    marked: BTreeSet<u64>,
    resumed: bool,
    /// What each update has marked and cleared.
    updates: Vec<(Vec<u64>, Vec<u64>)>,
    ended: bool,
    invalid: bool,
}

impl Log {
    /// A new one, with its faults.
    fn new() -> (Arc<Self>, Faults) {
        Self::of(Kept { marked: (0..REGIONS).collect(), ..Kept::default() })
    }

    fn of(kept: Kept) -> (Arc<Self>, Faults) {
        let (disk, faults) = faulty(&empty());
        (Arc::new(Self { kept: Mutex::new(kept), disk }), faults)
    }

    /// What a process finds that comes after this one was killed.
    fn after_kill(&self) -> Arc<Self> {
        let marked = self.kept.lock().marked.clone();
        Self::of(Kept { marked, resumed: true, ..Kept::default() }).0
    }

    fn marked(&self) -> Vec<u64> {
        self.kept.lock().marked.iter().copied().collect()
    }

    fn updates(&self) -> Vec<(Vec<u64>, Vec<u64>)> {
        self.kept.lock().updates.clone()
    }
}

impl RegionLog for Log {
    fn name(&self) -> &str {
        "the log"
    }

    fn region_size(&self) -> u64 {
        REGION
    }

    fn attach(&self) -> Result<LogStart> {
        let kept = self.kept.lock();
        let ranges = kept.marked.iter().map(|region| ByteRange::at(region * REGION, REGION));
        Ok(match kept.resumed {
            true => LogStart::resumed(ranges.collect()),
            false => LogStart::new_log(LEN),
        })
    }

    fn update(&self, mark: &[Range<u64>], clear: &[Range<u64>]) -> Result<()> {
        self.disk.flush()?;
        let mut kept = self.kept.lock();
        let (mark, clear): (Vec<_>, Vec<_>) =
            (mark.iter().cloned().flatten().collect(), clear.iter().cloned().flatten().collect());
        kept.marked.extend(&mark);
        kept.marked.retain(|region| !clear.contains(region));
        kept.updates.push((mark, clear));
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.disk.flush()?;
        self.kept.lock().ended = true;
        Ok(())
    }

    fn invalidate(&self) -> Result<()> {
        self.disk.discard(ByteRange::new(0, 4096))?;
        self.kept.lock().invalid = true;
        Ok(())
    }
}

/// A source that keeps the rule: what is written to it is marked, or the log is invalid.
#[derive(Debug)]
struct Watched {
    disk: Arc<dyn BlockDevice>,
    log: Arc<Log>,
}

impl Watched {
    fn check(&self, range: ByteRange) {
        let kept = self.log.kept.lock();
        let regions = range.start() / REGION..range.end().div_ceil(REGION);
        let marked = regions.clone().all(|region| kept.marked.contains(&region));
        assert!(marked || kept.invalid || kept.ended, "{regions:?} is written and not marked: {kept:?}");
    }
}

impl BlockDevice for Watched {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn name(&self) -> &str {
        "watched"
    }

    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.check(ByteRange::at(offset, buf.len() as u64));
        self.disk.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.check(range);
        self.disk.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.check(range);
        self.disk.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.disk.extents(range, visit)
    }
}

/// A tap in front of `disk`, which is watched.
fn tap(disk: &Arc<impl BlockDevice>, log: &Arc<Log>) -> Arc<Tap> {
    let disk: Arc<dyn BlockDevice> = Arc::clone(disk) as _;
    Tap::new(Arc::new(Watched { disk, log: Arc::clone(log) }))
}

fn options(log: &Arc<Log>) -> MirrorOptions {
    MirrorOptions::new().live_log(LiveLog::new(Arc::clone(log) as _))
}

fn attach(tap: &Arc<Tap>, target: &Arc<impl BlockDevice>, options: MirrorOptions) -> MirrorJob {
    MirrorJob::attach(tap, Arc::clone(target) as _, options).unwrap()
}

/// Cancels the job.
fn end(job: MirrorJob) {
    job.control().cancel();
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
}

#[test]
fn a_region_is_marked_before_the_first_write_to_it_and_cleared_when_both_disks_have_it() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    assert_eq!(log.marked(), [], "the copy is flushed");
    for at in [3 * REGION, 3 * REGION + 4096, 5 * REGION - 10] {
        write(&*tap, at, 20, 7);
    }
    tap.discard(ByteRange::at(9 * REGION, 3 * REGION)).unwrap();
    tap.write_zeroes(ByteRange::at(15 * REGION, 512), ZeroFlags::NONE).unwrap();
    let updates: Vec<_> = log.updates().into_iter().skip_while(|(mark, _)| mark.is_empty()).collect();
    let marks: Vec<_> = updates.into_iter().map(|(mark, _)| mark).collect();
    assert_eq!(marks, [vec![3], vec![4, 5], vec![9, 10, 11], vec![15]], "one update for each new region");
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    assert!(log.kept.lock().ended);
}

#[test]
fn a_job_goes_on_with_what_the_log_of_another_has_marked() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let tap_1 = tap(&source, &log);
    let (held, faults) = faulty(&target);
    let job = attach(&tap_1, &held, options(&log));
    until(&job, &Event::Ready);
    // From here on the target gets nothing.
    let gate = faults.hold(OpKind::Write, None);
    for region in [2, 7, 8] {
        write(&*tap_1, region * REGION + 5, 1000, 99);
    }
    let found = log.after_kill();
    assert_eq!(found.marked(), [2, 7, 8]);
    job.control().cancel();
    gate.open();
    drop(job);
    // Whatever is not marked is not even looked at.
    let mut want = source.contents().unwrap();
    target.write_at(&[1, 2, 3], 0, WriteFlags::NONE).unwrap();
    want[..3].copy_from_slice(&[1, 2, 3]);
    let tap_2 = tap(&source, &found);
    let job = attach(&tap_2, &target, options(&found));
    until(&job, &Event::Ready);
    let progress = job.control().progress();
    assert_eq!(progress.copied + progress.zeroed + progress.skipped, 3 * REGION);
    assert!(target.contents().unwrap() == want);
    end(job);
}

/// What the options promise of the target was so before an earlier job wrote to it.
#[test]
fn a_target_that_a_job_has_written_is_not_zero_any_more() {
    let (source, target) = (empty(), filled());
    let log = Log::of(Kept { marked: (0..REGIONS).collect(), resumed: true, ..Kept::default() }).0;
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log).target_is_zero(true));
    until(&job, &Event::Ready);
    assert!(target.contents().unwrap() == source.contents().unwrap());
    end(job);
}

#[test]
fn the_log_has_ended_before_the_guest_is_on_the_target() {
    let (source, target, (log, faults)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Flush, None);
    job.control().complete().unwrap();
    gate.wait_held(1);
    assert_eq!(tap.device().name(), "watched");
    gate.open();
    job.wait().unwrap();
    assert!(log.kept.lock().ended && tap.device().name() != "watched");
    // It belongs to the tap no longer.
    write(&*tap, 0, 100, 1);
    assert_eq!(log.marked(), []);
}

/// Else the same mirror, begun anew, would copy the old disk over the new one.
#[test]
fn a_log_that_cannot_be_ended_keeps_the_guest_on_the_source() {
    for invalidates in [true, false] {
        let (source, target, (log, faults)) = (filled(), empty(), Log::new());
        let tap = Tap::named(Arc::clone(&source) as _, "watched");
        let job = attach(&tap, &target, options(&log));
        until(&job, &Event::Ready);
        faults.inject(Fault::on(OpKind::Flush).forever());
        if !invalidates {
            faults.inject(Fault::on(OpKind::Discard).forever());
        }
        job.control().complete().unwrap();
        let Err(Error::Log(error)) = job.wait() else { panic!("it did not fail") };
        assert_eq!(error.to_string().contains("remove the log"), !invalidates, "{error}");
        assert_eq!(log.kept.lock().invalid, invalidates);
        let on_source: Arc<dyn BlockDevice> = source;
        assert!(Arc::ptr_eq(&tap.device(), &on_source));
        write(&*tap, 0, 100, 1);
    }
}

/// It would go on to say where the source differs from what has become newer.
#[test]
fn a_pivot_of_a_job_without_the_log_ends_the_log_of_the_tap() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    job.control().keep_log();
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    let job = attach(&tap, &target, MirrorOptions::new());
    until(&job, &Event::Ready);
    let other = Log::new().0;
    let refused = MirrorJob::attach(&tap, empty(), options(&other)).unwrap_err();
    assert!(matches!(refused, Error::Busy { .. }));
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert!(log.kept.lock().ended && tap.log_name().is_none());
}

#[test]
fn a_disk_with_a_log_is_no_member_of_a_group() {
    let (log, _) = Log::new();
    let tap = Tap::new(filled());
    let member = || GroupMember::new(&tap, empty(), options(&log));
    assert!(matches!(MirrorGroup::attach(vec![member()]), Err(Error::LogInGroup { .. })));
}

/// The guest's write goes on; it does so after the log has been invalidated.
#[test]
fn a_log_that_fails_ends_the_job_and_no_write() {
    for on_error in [OnError::Report, OnError::Ignore, OnError::Stop] {
        let (source, target, (log, faults)) = (filled(), empty(), Log::new());
        let tap = tap(&source, &log);
        let job = attach(&tap, &target, options(&log).on_target_error(on_error));
        until(&job, &Event::Ready);
        faults.inject(Fault::on(OpKind::Flush).with(ErrorKind::NoSpace));
        write(&*tap, 3 * REGION, 10, 7);
        assert!(log.kept.lock().invalid);
        let Err(Error::Log(error)) = job.wait() else { panic!("it did not fail") };
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        write(&*tap, 4 * REGION, 10, 7);
        assert_eq!(log.marked(), [], "it is not used any more");
    }
}

#[test]
fn a_log_that_cannot_be_invalidated_either_is_named() {
    let (source, target, (log, faults)) = (filled(), empty(), Log::new());
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    faults.inject(Fault::on(OpKind::Flush).forever());
    faults.inject(Fault::on(OpKind::Discard).forever());
    write(&*tap, 3 * REGION, 10, 7);
    let Err(Error::Log(error)) = job.wait() else { panic!("it did not fail") };
    assert!(error.to_string().contains("remove the log"), "{error}");
}

#[test]
fn a_log_that_fails_when_regions_are_cleared_ends_the_job() {
    let (source, target, (log, faults)) = (filled(), empty(), Log::new());
    faults.inject(Fault::on(OpKind::Flush));
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    assert!(matches!(job.wait(), Err(Error::Log(_))));
    assert!(log.kept.lock().invalid);
}

/// A flush of one disk is not enough: the power may fail.
#[test]
fn nothing_is_cleared_before_both_disks_are_flushed() {
    for side in [0, 1] {
        let (log, _) = Log::new();
        let disks = [faulty(&filled()), faulty(&empty())];
        let gate = disks[side].1.hold(OpKind::Flush, None);
        let tap = tap(&disks[0].0, &log);
        let job = attach(&tap, &disks[1].0, options(&log));
        while gate.held() == 0 {
            assert_eq!(log.marked().len() as u64, REGIONS);
            thread::yield_now();
        }
        assert_eq!(log.marked().len() as u64, REGIONS);
        gate.open();
        until(&job, &Event::Ready);
        assert_eq!(log.marked(), []);
        disks[side].1.inject(Fault::on(OpKind::Flush).forever());
        write(&*tap, 0, 10, 1);
        job.control().complete().unwrap();
        assert!(job.wait().is_err());
        assert_eq!(log.marked(), [0]);
    }
}

#[test]
fn a_caller_that_only_polls_gets_its_region_marked() {
    let (source, target, (log, faults)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log).copy_mode(CopyMode::WriteBlocking));
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Flush, None);
    let range = ByteRange::at(5 * REGION, 512);
    assert!(matches!(tap.try_begin_write(range).unwrap(), Begin::Wait { .. }));
    gate.wait_held(1);
    assert!(matches!(tap.try_begin_write(range).unwrap(), Begin::Wait { .. }));
    gate.open();
    let limit = Instant::now() + FOREVER.unwrap();
    let ticket = loop {
        match tap.try_begin_write(range).unwrap() {
            Begin::Go(ticket) => break ticket,
            Begin::Wait { .. } => assert!(Instant::now() < limit, "it is never admitted"),
        }
        thread::yield_now();
    };
    let write = |disk: &dyn BlockDevice| disk.write_at(&[9; 512], range.start(), WriteFlags::NONE);
    let at_source = write(&**ticket.source());
    let at_target = ticket.target().map(|target| write(&*target));
    ticket.complete(at_source, at_target).unwrap();
    assert_eq!(log.marked(), [5]);
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert!(target.contents().unwrap() == source.contents().unwrap());
}

#[test]
fn writers_that_wait_together_take_one_update() {
    let (source, target, (log, faults)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    let before = log.updates().len();
    let gate = faults.hold(OpKind::Flush, None);
    thread::scope(|scope| {
        let write_to = |region: u64| {
            let tap = &tap;
            scope.spawn(move || write(&**tap, region * REGION, 10, 9));
        };
        write_to(0);
        gate.wait_held(1);
        for region in 1..8 {
            write_to(region);
        }
        while tap.writes_under_way() < 8 {
            thread::yield_now();
        }
        gate.open();
    });
    // One counted as under way may have asked for its region a little later.
    let updates = log.updates().len() - before;
    assert!((2..=8).contains(&updates), "{updates}");
    assert_eq!(log.marked(), (0..8).collect::<Vec<_>>());
    end(job);
}

#[test]
fn a_log_is_for_one_length_and_for_whole_copies() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let tap = tap(&source, &log);
    let none = options(&log).sync(SyncMode::None);
    let refused = MirrorJob::attach(&tap, Arc::clone(&target) as _, none);
    assert!(matches!(refused, Err(Error::LogSync)));
    let job = attach(&tap, &target, options(&log));
    until(&job, &Event::Ready);
    job.control().keep_log();
    end(job);
    let refused = tap.drain().resize(2 * LEN, false).unwrap_err();
    assert!(matches!(refused, Error::LogAttached { .. }), "{refused}");
    let refused = tap.drain().replace(Arc::new(MemoryDisk::new(LEN + 512))).unwrap_err();
    assert!(matches!(refused, Error::LogAttached { .. }), "{refused}");
}

/// A write that was under way as the log came is not in it: the log waits for it.
#[test]
fn a_log_is_attached_while_no_write_is_under_way() {
    let (log, _) = Log::of(Kept { resumed: true, ..Kept::default() });
    let (slow, faults) = faulty(&filled());
    let tap = Tap::new(Arc::clone(&slow) as _);
    let target = Arc::new(MemoryDisk::with_contents(&filled().contents().unwrap()));
    let gate = faults.hold(OpKind::Write, None);
    thread::scope(|scope| {
        let writer = scope.spawn(|| write(&*tap, 3 * REGION, 10, 7));
        gate.wait_held(1);
        let (tap, target, options) = (&tap, &target, options(&log));
        let job = scope.spawn(move || attach(tap, target, options));
        while !tap.write_would_wait(ByteRange::at(0, 1)) {
            thread::yield_now();
        }
        assert!(!tap.is_mirrored());
        gate.open();
        writer.join().unwrap();
        end(job.join().unwrap());
    });
}

/// Writers over the whole disk, few regions, both modes: what was acknowledged is in both disks at the end.
#[test]
fn writers_beside_a_small_log_lose_nothing() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let (source, target, (log, _)) = (filled(), empty(), Log::new());
        let tap = tap(&source, &log);
        let live = LiveLog::new(Arc::clone(&log) as _).active_regions(3).interval(REGION);
        let job = attach(&tap, &target, MirrorOptions::new().copy_mode(mode).live_log(live));
        until(&job, &Event::Ready);
        thread::scope(|scope| {
            for writer in 0..4_u64 {
                let tap = &tap;
                scope.spawn(move || {
                    for n in 0..60 {
                        write(&**tap, (n * 7 + writer * 5) % REGIONS * REGION + writer * 8192, 4096, n as u8);
                    }
                });
            }
        });
        job.control().complete().unwrap();
        job.wait().unwrap();
        assert!(target.contents().unwrap() == source.contents().unwrap(), "{mode}");
        let marks: usize = log.updates().iter().map(|(mark, _)| mark.len()).sum();
        assert!(marks as u64 >= REGIONS, "{marks}");
    }
}

#[test]
fn a_log_that_refuses_to_be_attached_starts_no_job() {
    #[derive(Debug)]
    struct Refuses;
    impl RegionLog for Refuses {
        fn name(&self) -> &str {
            "a log"
        }
        fn region_size(&self) -> u64 {
            REGION
        }
        fn attach(&self) -> Result<LogStart> {
            Err(DiskError::new(ErrorKind::Io, "read log"))
        }
        fn update(&self, _: &[Range<u64>], _: &[Range<u64>]) -> Result<()> {
            unreachable!("it is not attached")
        }
        fn end(&self) -> Result<()> {
            unreachable!("it is not attached")
        }
        fn invalidate(&self) -> Result<()> {
            unreachable!("it is not attached")
        }
    }
    let tap = Tap::new(filled());
    let options = MirrorOptions::new().live_log(LiveLog::new(Arc::new(Refuses)));
    assert!(matches!(MirrorJob::attach(&tap, empty(), options), Err(Error::Log(_))));
    write(&*tap, 0, 10, 1);
    assert_eq!(tap.writes_under_way(), 0);
}
