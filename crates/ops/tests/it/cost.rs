//! What checkpoints and logs of live jobs cost, counted: flushes of their file.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{Logged, RecordingStorage};
use blockmirror_block::{
    BlockDevice, ByteRange, Extent, ExtentKind, Geometry, Result, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_checkpoint::{ActivityLog, Checkpoint, Identity, region_size};
use blockmirror_mirror::{
    CheckpointSink, Checkpoints, CopyMode, Event, LiveLog, MirrorJob, MirrorOptions, Tap,
};
use blockmirror_ops::DEFAULT_CHECKPOINT_INTERVAL;

use crate::region_log::LogOnStorage;

const MIB: u64 = 1 << 20;
const FOREVER: Duration = Duration::from_secs(120);

/// A disk full of one byte, which forgets what is written.
#[derive(Debug)]
struct Full(u64);

impl BlockDevice for Full {
    fn len(&self) -> u64 {
        self.0
    }

    fn name(&self) -> &str {
        "full"
    }

    fn geometry(&self) -> Geometry {
        Geometry::plain()
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(7);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let _ = visit(Extent::new(range, ExtentKind::Data));
        Ok(())
    }
}

/// Flushes so far.
fn flushes(log: &RecordingStorage) -> u64 {
    log.log().iter().filter(|entry| **entry == Logged::Flush).count() as u64
}

#[derive(Debug)]
struct Sink(Mutex<Checkpoint>);

impl CheckpointSink for Sink {
    fn record(&self, missing: &[ByteRange]) -> Result<()> {
        self.0.lock().mark_except(missing).unwrap();
        Ok(())
    }
}

#[test]
fn a_checkpoint_costs_one_flush_for_256_mib() {
    let len = 3 << 30;
    let storage = Arc::new(RecordingStorage::default());
    let log = Checkpoint::create(Arc::clone(&storage) as _, len, region_size(len, 1), Identity::new());
    let made = flushes(&storage);
    let sink = Arc::new(Sink(Mutex::new(log.unwrap())));
    let checkpoints = Checkpoints::new(sink, DEFAULT_CHECKPOINT_INTERVAL);
    let (source, target) = (Arc::new(Full(len)), Arc::new(Full(len)));
    let job = MirrorJob::start_with_checkpoints(source, target, MirrorOptions::new(), checkpoints).unwrap();
    let copied = job.wait().unwrap().copied;
    assert_eq!(copied, len);
    let flushes = flushes(&storage) - made;
    assert!((4..=len / (256 * MIB)).contains(&flushes), "{flushes} flushes");
}

/// A mirror that is ready, its log, and the flushes of that until then but for those that made it.
fn mirror(
    len: u64,
    mode: CopyMode,
    active: Option<usize>,
) -> (Arc<Tap>, MirrorJob, Arc<RecordingStorage>, u64) {
    let storage = Arc::new(RecordingStorage::default());
    let log = LogOnStorage::create(Arc::clone(&storage) as _, len, region_size(len, 1));
    let made = flushes(&storage);
    let live = LiveLog::new(log);
    let live = active.map_or(live.clone(), |active| live.active_regions(active));
    let tap = Tap::new(Arc::new(Full(len)));
    let options = MirrorOptions::new().copy_mode(mode).live_log(live);
    let job = MirrorJob::attach(&tap, Arc::new(Full(len)), options).unwrap();
    while job.control().next_event(Some(FOREVER)).expect("it gets ready") != Event::Ready {}
    let copying = flushes(&storage) - made;
    (tap, job, storage, copying)
}

#[test]
fn a_live_log_costs_one_flush_for_256_mib_and_one_for_each_new_region() {
    let len = 2 << 30;
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let (tap, job, storage, copying) = mirror(len, mode, None);
        assert!((4..=len / (256 * MIB)).contains(&copying), "{copying} flushes for the copy");
        for (round, want) in [(0, len / MIB), (1, 0), (2, 0)] {
            let before = flushes(&storage);
            for region in 0..len / MIB {
                tap.write_at(&[9; 4096], region * MIB + round * 8192, WriteFlags::NONE).unwrap();
            }
            assert_eq!(flushes(&storage) - before, want, "{mode}, round {round}");
        }
        job.control().cancel();
        assert!(job.wait().is_err());
    }
}

/// Beyond the active regions, room is made for a quarter of them at once.
#[test]
fn writes_all_over_a_disk_cost_little_more_than_a_flush_for_each_region() {
    let (len, active) = (1 << 30, 64);
    let (tap, job, storage, _) = mirror(len, CopyMode::WriteBlocking, Some(active));
    let before = flushes(&storage);
    for region in 0..len / MIB {
        tap.write_at(&[9; 4096], region * MIB, WriteFlags::NONE).unwrap();
    }
    let (flushes, regions) = (flushes(&storage) - before, len / MIB);
    assert!(flushes >= regions && flushes <= regions + 8 * regions / active as u64, "{flushes} flushes");
    // After a crash no more than the active regions are copied again: the target has all else.
    let log = ActivityLog::open(Arc::new(storage.snapshot())).unwrap();
    assert!(log.marked_bytes() <= active as u64 * MIB, "{} bytes", log.marked_bytes());
    job.control().cancel();
    assert!(job.wait().is_err());
}
