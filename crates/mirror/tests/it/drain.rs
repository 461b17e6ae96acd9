//! Holding the guest of a tap, and putting another disk below it. Through the published interface.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, Error as DiskFailure, ErrorKind as DiskError, Extent, Geometry, Result, Visit,
    WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{Begin, CopyMode, Error, Event, MirrorControl, MirrorJob, MirrorOptions, Tap};

const LEN: u64 = 1 << 20;

fn disk(len: u64) -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(len))
}

fn put(disk: &dyn BlockDevice, offset: u64, len: usize, byte: u8) {
    disk.write_at(&vec![byte; len], offset, WriteFlags::NONE).unwrap();
}

fn ready(job: &MirrorJob) {
    while job.control().next_event(Some(Duration::from_secs(60))).unwrap() != Event::Ready {}
}

#[test]
fn draining_waits_for_the_writes_under_way_and_quiesces_the_next() {
    for listened in [false, true] {
        let below = disk(LEN);
        let faults = Faults::new();
        let tap = Tap::new(Arc::new(FaultDisk::new(Arc::clone(&below) as _, faults.clone())));
        if listened {
            tap.add_bitmap("b", 65_536).unwrap();
        }
        let gate = faults.hold(OpKind::Write, None);
        let stage = AtomicU64::new(0);
        thread::scope(|scope| {
            let (tap, stage) = (&tap, &stage);
            scope.spawn(move || {
                put(&**tap, 0, 512, 1);
                stage.store(1, Ordering::SeqCst);
            });
            gate.wait_held(1);
            assert_eq!(tap.writes_under_way(), 1);
            assert!(tap.drain_for(Duration::from_millis(10)).is_none(), "a write is under way");
            let drainer = scope.spawn(|| tap.drain());
            gate.open();
            let drained = drainer.join().unwrap();
            assert_eq!(tap.writes_under_way(), 0);
            let late = scope.spawn(move || put(&**tap, 512, 512, 2));
            // A second one who drains shares the hold.
            drop(tap.drain());
            thread::sleep(Duration::from_millis(5));
            assert!(!late.is_finished());
            assert_eq!(below.contents().unwrap()[..1024], [[1; 512], [0; 512]].concat());
            drop(drained);
            late.join().unwrap();
        });
        assert_eq!(stage.load(Ordering::SeqCst), 1);
        assert_eq!(below.contents().unwrap()[512..1024], [2; 512]);
    }
}

#[test]
fn a_replaced_disk_gets_no_write_and_is_dropped() {
    let (old, new) = (disk(LEN), disk(LEN));
    let tap = Tap::new(Arc::clone(&old) as _);
    // Every lane has seen the old disk.
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| put(&*tap, 0, 512, 1));
        }
    });
    let mut drained = tap.drain();
    let handed_back = drained.replace(Arc::clone(&new) as _).unwrap();
    assert_eq!(drained.device().name(), new.name());
    drop((drained, handed_back));
    assert_eq!(Arc::strong_count(&old), 1, "nothing keeps the old disk open");
    put(&*tap, 512, 512, 2);
    assert_eq!((old.contents().unwrap()[512], new.contents().unwrap()[512]), (0, 2));
}

#[test]
fn while_a_job_sits_there_or_has_pivoted_nothing_is_replaced() {
    let tap = Tap::new(disk(LEN) as _);
    let target = disk(LEN);
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new()).unwrap();
    ready(&job);
    let mut drained = tap.drain();
    assert!(matches!(drained.replace(disk(LEN) as _), Err(Error::Busy { .. })));
    job.control().complete().unwrap();
    job.wait().unwrap();
    // What the caller prepared was for the disk that lay there when it drained.
    assert!(matches!(drained.replace(disk(LEN) as _), Err(Error::DiskChanged { .. })));
    drop(drained);
    let mut drained = tap.drain();
    drained.replace(disk(LEN) as _).unwrap();
}

#[test]
fn another_length_is_the_taps_and_the_bitmaps() {
    let tap = Tap::named(disk(LEN) as _, "drive0");
    tap.add_bitmap("records", 65_536).unwrap();
    tap.add_disabled_bitmap("rests", 65_536).unwrap();
    put(&*tap, LEN - 512, 512, 1);
    let user = tap.use_bitmap("rests").unwrap();
    let mut drained = tap.drain();
    let refused = drained.replace(disk(LEN + 512) as _).unwrap_err();
    assert_eq!(refused.to_string(), r#"drive0: bitmap "rests" is in use"#);
    drop(user);
    drained.replace(disk(LEN + 512) as _).unwrap();
    drop(drained);
    assert_eq!(tap.len(), LEN + 512);
    put(&*tap, LEN, 512, 1);
    let dirty = || {
        let bitmaps = tap.bitmaps();
        bitmaps.iter().map(|bitmap| bitmap.dirty_bytes).collect::<Vec<_>>()
    };
    assert_eq!(dirty(), [65_536 + 512, 0], "new bytes were not copied");

    tap.drain().replace(disk(65_536) as _).unwrap();
    assert_eq!((tap.len(), dirty()), (65_536, vec![0, 0]));
    let error = tap.write_at(&[1], 65_536, WriteFlags::NONE).unwrap_err();
    assert_eq!(error.kind(), DiskError::OutOfBounds);
    assert_eq!(tap.begin_write(ByteRange::new(0, LEN)).unwrap_err().kind(), DiskError::OutOfBounds);
    assert_eq!((dirty(), tap.writes_under_way()), (vec![0, 0], 0), "nothing was begun");
}

/// A disk that shows as much of another as its current length. What comes after a change of length may fail.
#[derive(Debug)]
struct Shown(MemoryDisk, AtomicU64, AtomicBool);

impl Shown {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self(MemoryDisk::new(LEN), AtomicU64::new(len), AtomicBool::new(false)))
    }
}

impl BlockDevice for Shown {
    fn len(&self) -> u64 {
        self.1.load(Ordering::SeqCst)
    }

    fn name(&self) -> &str {
        "shown"
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.0.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.0.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.0.extents(range, visit)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        if len < self.len() && !may_shrink {
            return Err(DiskFailure::new(DiskError::InvalidInput, "resize"));
        }
        self.1.store(len, Ordering::SeqCst);
        if self.2.load(Ordering::SeqCst) { Err(DiskFailure::new(DiskError::Io, "resize")) } else { Ok(()) }
    }
}

#[test]
fn a_disk_is_resized_while_the_guest_is_quiesced_and_no_job_is_attached() {
    let tap = Tap::new(Shown::new(LEN / 2));
    tap.add_bitmap("b", 65_536).unwrap();
    let open = tap.begin_write(ByteRange::new(0, 512)).unwrap();
    thread::scope(|scope| {
        let resize = scope.spawn(|| tap.resize(LEN, false));
        thread::sleep(Duration::from_millis(5));
        assert!(!resize.is_finished(), "a write is under way");
        open.complete(Ok(()), None).unwrap();
        resize.join().unwrap().unwrap();
    });
    put(&*tap, LEN - 512, 512, 1);
    let dirty = [ByteRange::new(0, 65_536), ByteRange::new(LEN / 2, LEN)];
    assert_eq!(tap.dirty_runs("b", ByteRange::new(0, LEN), 9).unwrap(), dirty);
    let mut drained = tap.drain();
    assert!(matches!(drained.resize(512, false), Err(Error::Disk(_))));
    assert_eq!(tap.len(), LEN);
    drained.resize(512, true).unwrap();
    drop(drained);
    assert_eq!((tap.len(), tap.bitmap("b").unwrap().dirty_bytes()), (512, 512));
    assert_eq!(tap.write_at(&[1], 512, WriteFlags::NONE).unwrap_err().kind(), DiskError::OutOfBounds);

    let job = MirrorJob::attach(&tap, disk(512) as _, MirrorOptions::new()).unwrap();
    let error = tap.resize(LEN, false).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (DiskError::Locked, "resize: shown is being mirrored")
    );
    drop(job);
    tap.resize(LEN, false).unwrap();
}

/// A shrink that failed with half of its work done left the tap and its bitmaps at a length that the disk no
/// longer had.
#[test]
fn the_tap_has_the_length_of_the_disk_after_a_resize_that_failed() {
    let disk = Shown::new(LEN);
    let tap = Tap::new(Arc::clone(&disk) as _);
    tap.add_bitmap("b", 65_536).unwrap();
    put(&*tap, 0, LEN as usize, 1);
    disk.2.store(true, Ordering::SeqCst);
    tap.resize(65_536, true).unwrap_err();
    assert_eq!((tap.len(), tap.bitmap("b").unwrap().dirty_bytes()), (65_536, 65_536));
    assert!(matches!(tap.drain().resize(512, true), Err(Error::Disk(_))));
    assert_eq!((tap.len(), tap.bitmap("b").unwrap().dirty_bytes()), (512, 512));
    disk.2.store(false, Ordering::SeqCst);
    tap.resize(512, true).unwrap();
    assert_eq!((tap.len(), tap.bitmap("b").unwrap().dirty_bytes()), (512, 512));
}

/// What a guest writes before and after the switch is on one of two disks, never lost and never on the old
/// one late.
#[test]
fn writers_through_many_replacements_lose_nothing() {
    let tap = Tap::new(disk(LEN) as _);
    let mut last: Vec<Arc<MemoryDisk>> = Vec::new();
    let done = AtomicU64::new(0);
    thread::scope(|scope| {
        for writer in 0..3u64 {
            let (tap, done) = (&tap, &done);
            scope.spawn(move || {
                let mut version = 0u64;
                while done.load(Ordering::Relaxed) == 0 {
                    version += 1;
                    let stamp = version.to_be_bytes();
                    tap.write_at(&stamp, writer * 512, WriteFlags::NONE).unwrap();
                    let mut read = [0; 8];
                    tap.read_at(&mut read, writer * 512).unwrap();
                    assert_eq!(read, stamp, "written to a disk that was replaced");
                }
            });
        }
        for round in 0..64 {
            if round % 8 == 0 {
                let _ = tap.add_bitmap("b", 65_536);
            } else if round % 8 == 4 {
                tap.remove_bitmap("b").unwrap();
            }
            let mut drained = tap.drain();
            let old = drained.device();
            let mut contents = vec![0; LEN as usize];
            old.read_at(&mut contents, 0).unwrap();
            let next = Arc::new(MemoryDisk::with_contents(&contents));
            last.push(Arc::clone(&next));
            drained.replace(next).unwrap();
            drop(drained);
            thread::yield_now();
        }
        done.store(1, Ordering::Relaxed);
    });
    assert_eq!(last.iter().filter(|disk| Arc::strong_count(disk) > 1).count(), 1);
}

/// A handle that is kept to look at the outcome must not keep the image locked.
#[test]
fn the_handles_of_a_job_that_is_over_keep_no_disk_open() {
    for ending in [MirrorControl::complete, MirrorControl::keep_copy, MirrorControl::force_cancel] {
        let (old, target) = (disk(LEN), disk(LEN));
        let tap = Tap::new(Arc::clone(&old) as _);
        let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new()).unwrap();
        ready(&job);
        let control = job.control().clone();
        ending(&control).unwrap();
        let _ = job.wait();
        let open = || (Arc::strong_count(&old), Arc::strong_count(&target));
        assert!(open().0 == 1 || open().1 == 1, "{:?}", open());
        drop(tap);
        assert_eq!(open(), (1, 1));
        assert_eq!(control.progress().offset, LEN);
    }
}

#[test]
fn geometry_and_messages_follow_the_pivot_and_the_name_stays() {
    let tap = Tap::new(Arc::new(MemoryDisk::new(LEN).named("old.raw")));
    let target = Arc::new(MemoryDisk::new(LEN).with_cluster_size(65_536).named("new.qcow2"));
    assert_eq!(tap.geometry().cluster_size, None);
    let job = MirrorJob::attach(&tap, target, MirrorOptions::new()).unwrap();
    ready(&job);
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(tap.geometry().cluster_size, Some(65_536));
    assert_eq!((tap.name(), tap.device().name()), ("old.raw", "new.qcow2"));
    let unknown = tap.bitmap("x").unwrap_err().to_string();
    assert_eq!(unknown, r#"new.qcow2 has no bitmap "x""#);
    let small = MirrorJob::attach(&tap, disk(1), MirrorOptions::new()).unwrap_err().to_string();
    assert!(small.starts_with("source new.qcow2 has"), "{small}");
}

/// A monitor finishes a write on the thread on which its I/O ends, and keeps drained taps in a transaction.
#[test]
fn tickets_can_go_to_other_threads() {
    let tap = Tap::new(disk(LEN) as _);
    let ticket = tap.begin_write(ByteRange::new(0, 512)).unwrap();
    thread::spawn(move || ticket.complete(Ok(()), None)).join().unwrap().unwrap();
    let drained = tap.drain();
    thread::spawn(move || drop(drained)).join().unwrap();
    put(&*tap, 0, 512, 1);
    assert_eq!(tap.writes_under_way(), 0);
}

/// A monitor whose one thread must not block asks again when a write would wait.
#[test]
fn a_write_that_would_wait_is_refused_and_forgotten() {
    let tap = Tap::new(disk(LEN) as _);
    let try_write = || tap.try_begin_write(ByteRange::new(0, 512)).unwrap();
    let drained = tap.drain();
    assert!(matches!(try_write(), Begin::Wait { .. }), "drained");
    drop(drained);
    assert!(matches!(try_write(), Begin::Go(ticket) if ticket.target().is_none()), "there is no job");

    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
    let job = MirrorJob::attach(&tap, disk(LEN), options).unwrap();
    while job.control().next_event(None) != Some(Event::Ready) {}
    let Begin::Go(first) = try_write() else { panic!("nothing is in flight") };
    assert!(matches!(try_write(), Begin::Wait { .. }), "the first write is on these bytes");
    let target = first.target().unwrap();
    first.complete(Ok(()), Some(target.write_at(&[0; 512], 0, WriteFlags::NONE))).unwrap();
    assert!(matches!(try_write(), Begin::Go(_)), "both sides have the first");
    assert_eq!(tap.writes_under_way(), 0, "a ticket that is dropped ends its write");
}

/// A disk was replaced while a copy into it from the layers below was under way.
#[test]
fn draining_waits_for_what_is_copied_up() {
    for listened in [false, true] {
        let faults = Faults::new();
        let base = Arc::new(FaultDisk::new(Arc::new(MemoryDisk::with_contents(&[7; 4096])), faults.clone()));
        let tap = Tap::new(Arc::new(MemoryDisk::new(4096).with_backing(base)));
        if listened {
            tap.add_bitmap("b", 65_536).unwrap();
        }
        let gate = faults.hold(OpKind::Extents, None);
        thread::scope(|scope| {
            let copy = scope.spawn(|| tap.copy_up(ByteRange::new(0, 4096), 1).unwrap());
            gate.wait_held(1);
            assert_eq!(tap.writes_under_way(), 1);
            assert!(tap.drain_for(Duration::from_millis(1)).is_none());
            gate.open();
            assert_eq!(copy.join().unwrap(), 4096);
        });
        assert_eq!(tap.writes_under_way(), 0);
    }
}
