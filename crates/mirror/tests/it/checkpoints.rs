//! Checkpoints: what counts as durable, how much is at risk, and a job that goes on from one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Result, WriteFlags};
use blockmirror_mirror::{
    CheckpointSink, Checkpoints, Error, MirrorControl, MirrorJob, MirrorOptions, OnError,
};

const LEN: u64 = 16 << 20;
const INTERVAL: u64 = 1 << 20;
/// One data operation of a job with the smallest buffer.
const OPERATION: u64 = 64 << 10;

fn source() -> Arc<MemoryDisk> {
    let bytes: Vec<_> = (0..LEN).map(|at| (at / 4096 % 251) as u8 + 1).collect();
    Arc::new(MemoryDisk::with_contents(&bytes))
}

fn options() -> MirrorOptions {
    MirrorOptions::new().buf_size(OPERATION * 16)
}

/// What a job has reported, and what was at risk when it did.
#[derive(Debug, Default)]
struct Sink {
    control: OnceLock<MirrorControl>,
    records: Mutex<Vec<Vec<ByteRange>>>,
    /// Copied bytes that the records before did not cover.
    at_risk: Mutex<Vec<u64>>,
    fails: bool,
}

impl Sink {
    fn missing(&self) -> DirtyBitmap {
        bitmap(self.records.lock().last().unwrap())
    }
}

fn bitmap(ranges: &[ByteRange]) -> DirtyBitmap {
    let mut bitmap = DirtyBitmap::new(LEN, 4096).unwrap();
    for range in ranges {
        bitmap.set(range.start()..range.end());
    }
    bitmap
}

impl CheckpointSink for Sink {
    fn record(&self, missing: &[ByteRange]) -> Result<()> {
        if self.fails {
            return Err(blockmirror_block::Error::new(ErrorKind::NoSpace, "write").in_file("the log"));
        }
        if let Some(control) = self.control.get() {
            let covered = self.records.lock().last().map_or(0, |missing| LEN - bitmap(missing).dirty_bytes());
            self.at_risk.lock().push(control.progress().copied.saturating_sub(covered));
        }
        self.records.lock().push(missing.to_vec());
        Ok(())
    }
}

fn start(source: &Arc<MemoryDisk>, target: Arc<dyn BlockDevice>, sink: &Arc<Sink>) -> MirrorJob {
    let checkpoints = Checkpoints::new(Arc::clone(sink) as _, INTERVAL);
    let job =
        MirrorJob::start_with_checkpoints(Arc::clone(source) as _, target, options(), checkpoints).unwrap();
    let _ = sink.control.set(job.control().clone());
    job
}

#[test]
fn what_is_not_covered_is_at_most_two_intervals() {
    let (source, target, sink) = (source(), Arc::new(MemoryDisk::new(LEN)), Arc::new(Sink::default()));
    let outcome = start(&source, Arc::clone(&target) as _, &sink).wait().unwrap();
    assert_eq!(outcome.copied, LEN);
    let records = sink.records.lock();
    assert!((7..=16).contains(&records.len()), "{}", records.len());
    assert!(sink.at_risk.lock().iter().all(|bytes| *bytes <= 2 * INTERVAL), "{:?}", sink.at_risk);
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

/// The write is in flight when the flush begins and over before it ends: the flush need not cover it.
#[test]
fn a_write_that_ends_during_the_flush_is_missing() {
    let (source, sink) = (source(), Arc::new(Sink::default()));
    let faults = Faults::new();
    let target = Arc::new(FaultDisk::new(Arc::new(MemoryDisk::new(LEN)), faults.clone()));
    let slow = ByteRange::at(0, 4096);
    let write = faults.hold(OpKind::Write, Some(slow));
    let flush = faults.hold(OpKind::Flush, None);
    let job = start(&source, target, &sink);
    write.wait_held(1);
    flush.wait_held(1);
    write.open();
    while bitmap(&job.control().not_copied()).is_dirty(0) {
        std::thread::yield_now();
    }
    flush.open();
    job.wait().unwrap();
    let records = sink.records.lock();
    assert!(bitmap(&records[0]).is_dirty(0), "{:?}", records[0]);
    assert!(!bitmap(records.last().unwrap()).is_dirty(0));
}

#[test]
fn a_failed_flush_gives_no_checkpoint() {
    let (source, sink) = (source(), Arc::new(Sink::default()));
    let faults = Faults::new();
    let target = Arc::new(FaultDisk::new(Arc::new(MemoryDisk::new(LEN)), faults.clone()));
    faults.inject(Fault::on(OpKind::Flush));
    let Err(Error::Target(_)) = start(&source, target, &sink).wait() else { panic!("it did not fail") };
    assert!(sink.records.lock().is_empty());
}

#[test]
fn a_log_that_cannot_be_written_ends_the_job() {
    let sink = Arc::new(Sink { fails: true, ..Sink::default() });
    let job = start(&source(), Arc::new(MemoryDisk::new(LEN)), &sink);
    let Err(Error::Target(error)) = job.wait() else { panic!("it did not fail") };
    assert_eq!((error.kind(), error.name()), (ErrorKind::NoSpace, Some("the log")));
}

/// What a job left out is missing in every record that follows, and in what it says at its end.
#[test]
fn a_range_that_was_given_up_is_missing() {
    let (source, sink) = (source(), Arc::new(Sink::default()));
    let bad = ByteRange::at(0, 4096);
    let faults = Faults::new();
    faults.inject(Fault::on(OpKind::Read).within(bad).forever());
    let failing = Arc::new(FaultDisk::new(source, faults));
    let options = options().on_source_error(OnError::Ignore).threads(NonZeroUsize::MIN);
    let checkpoints = Checkpoints::new(Arc::clone(&sink) as _, INTERVAL);
    let target = Arc::new(MemoryDisk::new(LEN));
    let job = MirrorJob::start_with_checkpoints(failing, target, options, checkpoints).unwrap();
    let control = job.control().clone();
    let outcome = job.wait().unwrap();
    assert!(!outcome.given_up.is_empty());
    assert!(bitmap(&control.not_copied()).is_dirty(0));
    assert!(sink.records.lock().iter().all(|missing| bitmap(missing).is_dirty(0)));
}

/// A job that ends at any time leaves what another one needs to go on.
#[test]
fn a_job_goes_on_where_another_has_ended() {
    let (source, sink) = (source(), Arc::new(Sink::default()));
    let faults = Faults::new();
    let memory = Arc::new(MemoryDisk::new(LEN));
    let target = Arc::new(FaultDisk::new(Arc::clone(&memory) as _, faults.clone()));
    faults.inject(Fault::on(OpKind::Write).after(100).forever());
    let job = start(&source, target, &sink);
    let control = job.control().clone();
    assert!(job.wait().is_err());
    let left = bitmap(&control.not_copied());
    assert!((LEN - left.dirty_bytes()) >= 80 * OPERATION, "{left:?}");
    let missing = sink.missing();
    assert!(missing.dirty_bytes() >= left.dirty_bytes());
    let done = missing.next_clean(0, u64::MAX).unwrap();
    // What is done is not even looked at.
    memory.write_at(&[0xff; 512], done.start, WriteFlags::NONE).unwrap();
    let again = options().only(missing.clone());
    let outcome = MirrorJob::start(Arc::clone(&source) as _, Arc::clone(&memory) as _, again).unwrap();
    let outcome = outcome.wait().unwrap();
    assert_eq!(outcome.copied + outcome.skipped + outcome.zeroed, missing.dirty_bytes());
    let mut want = source.contents().unwrap();
    want[done.start as usize..][..512].fill(0xff);
    assert!(memory.contents().unwrap() == want);
}
