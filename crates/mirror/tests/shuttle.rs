//! Core, engine, tap and the ends of a job under a model checker: `cargo xtask model` runs it.
//!
//! Each model is a job on a tap with a few writers. The checker chooses at every lock, also at those inside
//! of the memory disks, who runs next, so that a read and the write beside it fall apart wherever they can.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a model that cannot go on has found something")]

#[path = "shuttle/queues.rs"]
mod queues;

use std::num::NonZeroUsize;
use std::sync::Arc;

use blockmirror_block::sync::thread::{self, JoinHandle};
use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind, explore};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_mirror::{
    BitmapMode, CopyMode, Error, Event, GroupEvent, GroupMember, MirrorGroup, MirrorJob, MirrorOptions,
    OnError, SyncMode, Tap,
};

const UNIT: u64 = 512;
const LEN: u64 = 4 * UNIT;

fn disk(byte: u8) -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::with_contents(&[byte; LEN as usize]))
}

fn options() -> MirrorOptions {
    MirrorOptions::new().granularity(UNIT).threads(NonZeroUsize::new(2))
}

/// A job that copies only what is written, to a target that has the rest: short, so that many orders can be
/// tried.
fn short() -> MirrorOptions {
    options().sync(SyncMode::None)
}

fn attach(tap: &Arc<Tap>, target: &Arc<MemoryDisk>, options: MirrorOptions) -> MirrorJob {
    MirrorJob::attach(tap, Arc::clone(target) as _, options).unwrap()
}

fn until_ready(job: &MirrorJob) {
    while job.control().next_event(None).unwrap() != Event::Ready {}
}

/// A thread that writes `versions` one after another to one place through the tap; what it wrote last.
fn writer(tap: &Arc<Tap>, at: u64, versions: &'static [u8]) -> JoinHandle<(u64, u8)> {
    let tap = Arc::clone(tap);
    thread::spawn(move || {
        for version in versions {
            tap.write_at(&[*version; 8], at, WriteFlags::NONE).unwrap();
        }
        (at, *versions.last().unwrap())
    })
}

fn assert_readable(disk: &dyn BlockDevice, writers: Vec<JoinHandle<(u64, u8)>>) {
    let last: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
    for (at, version) in last {
        let mut found = [0; 8];
        disk.read_at(&mut found, at).unwrap();
        assert_eq!(found, [version; 8], "acknowledged at {at}");
    }
}

/// Whatever the writers were doing when the tap went over to the target: what was acknowledged is there.
#[test]
fn no_write_is_lost_in_a_pivot() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        explore(move || {
            let (source, target) = (disk(1), disk(0));
            let tap = Tap::new(Arc::clone(&source) as _);
            // One comes before the job, and may be writing when it comes.
            let mut writers = vec![writer(&tap, 0, &[2, 3])];
            let job = attach(&tap, &target, options().copy_mode(mode));
            writers.push(writer(&tap, 100, &[5, 6]));
            until_ready(&job);
            job.control().complete().unwrap();
            job.wait().unwrap();
            assert_readable(&*tap, writers);
            tap.write_at(&[9], 0, WriteFlags::NONE).unwrap();
            assert_eq!(target.contents().unwrap()[0], 9, "the tap has gone over");
        });
    }
}

/// A write that lands after the job has come is copied, whenever it began.
#[test]
fn a_write_under_way_while_a_job_comes_is_not_missed() {
    explore(|| {
        let (source, target) = (disk(1), disk(1));
        let tap = Tap::new(Arc::clone(&source) as _);
        let writers = vec![writer(&tap, 0, &[2, 3]), writer(&tap, UNIT, &[4])];
        let job = attach(&tap, &target, short());
        let before = source.contents().unwrap();
        for writer in writers {
            writer.join().unwrap();
        }
        until_ready(&job);
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        let (source, target) = (source.contents().unwrap(), target.contents().unwrap());
        for at in (0..LEN as usize).filter(|at| source[*at] != before[*at]) {
            assert_eq!(target[at], source[at], "at {at}");
        }
    });
}

/// The same with a whole copy: nothing at all may differ.
#[test]
fn a_whole_copy_that_begins_under_writers_is_whole() {
    explore(|| {
        let (source, target) = (disk(1), disk(0));
        let tap = Tap::new(Arc::clone(&source) as _);
        let writers = vec![writer(&tap, 0, &[2, 3]), writer(&tap, UNIT - 4, &[4])];
        let job = attach(&tap, &target, options());
        for writer in writers {
            writer.join().unwrap();
        }
        until_ready(&job);
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    });
}

/// Two far places are stamped in turn: the copy that stays behind shows one instant.
#[test]
fn a_copy_that_is_kept_shows_one_instant() {
    explore(|| {
        let (source, target) = (disk(1), disk(1));
        let tap = Tap::new(Arc::clone(&source) as _);
        let job = attach(&tap, &target, short());
        let guest = Arc::clone(&tap);
        let stamps = thread::spawn(move || {
            for version in 2..6 {
                guest.write_at(&[version], 0, WriteFlags::NONE).unwrap();
                guest.write_at(&[version], 3 * UNIT, WriteFlags::NONE).unwrap();
            }
        });
        until_ready(&job);
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        let kept = target.contents().unwrap();
        let (first, second) = (kept[0], kept[3 * UNIT as usize]);
        assert!(first == second || first == second + 1, "{first} and {second}");
        stamps.join().unwrap();
        assert_eq!(target.contents().unwrap(), kept, "it is left alone from then on");
        assert_eq!(source.contents().unwrap()[0], 5);
    });
}

/// Writers that go through to the target, the job's own copy of the same granule, and a change of the mode.
#[test]
fn writers_through_one_granule_agree_on_both_sides() {
    explore(|| {
        let (source, target) = (disk(1), disk(0));
        let tap = Tap::new(Arc::clone(&source) as _);
        let job = attach(&tap, &target, options().copy_mode(CopyMode::WriteBlocking));
        let writers = vec![writer(&tap, 4, &[2, 3]), writer(&tap, 8, &[4, 5])];
        job.control().change(CopyMode::Background).unwrap();
        job.control().change(CopyMode::WriteBlocking).unwrap();
        for writer in writers {
            writer.join().unwrap();
        }
        until_ready(&job);
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    });
}

/// Given up at any time: nothing hangs, and the guest's disk has what was acknowledged.
#[test]
fn a_cancel_at_any_time_leaves_the_guest_its_disk() {
    explore(|| {
        let (source, target) = (disk(1), disk(0));
        let tap = Tap::new(Arc::clone(&source) as _);
        let job = attach(&tap, &target, options().copy_mode(CopyMode::WriteBlocking));
        let writers = vec![writer(&tap, 0, &[2, 3]), writer(&tap, 8, &[4, 5])];
        job.control().force_cancel().unwrap();
        assert!(matches!(job.wait(), Err(Error::Cancelled)));
        assert_readable(&*tap, writers);
        assert!(!tap.is_mirrored());
    });
}

/// A target that fails fails the job, or is tried again; never the guest.
#[test]
fn a_target_that_fails_at_any_time_does_not_fail_the_guest() {
    for policy in [OnError::Report, OnError::Ignore] {
        explore(move || {
            let (source, target) = (disk(1), disk(1));
            let faults = Faults::new();
            let bad = Arc::new(FaultDisk::new(Arc::clone(&target) as _, faults.clone()));
            let tap = Tap::new(Arc::clone(&source) as _);
            let options = short().copy_mode(CopyMode::WriteBlocking).on_target_error(policy);
            let job = MirrorJob::attach(&tap, bad, options).unwrap();
            faults.inject(Fault::on(OpKind::Write));
            let writers = vec![writer(&tap, 0, &[2, 3]), writer(&tap, 8, &[4])];
            if policy == OnError::Report {
                assert!(matches!(job.wait(), Err(Error::Target(_))));
                return assert_readable(&*tap, writers);
            }
            assert_readable(&*tap, writers);
            until_ready(&job);
            job.control().keep_copy().unwrap();
            job.wait().unwrap();
            assert_eq!(target.contents().unwrap(), source.contents().unwrap());
        });
    }
}

/// The bitmap that says what to copy starts anew at the instant of the end: each write is in the copy or in
/// the bitmap.
#[test]
fn a_write_around_the_end_is_in_the_copy_or_in_the_bitmap() {
    explore(|| {
        let (source, target) = (disk(1), disk(1));
        let tap = Tap::new(Arc::clone(&source) as _);
        tap.add_bitmap("b", UNIT).unwrap();
        let incremental = options().sync(SyncMode::Incremental).bitmap("b", BitmapMode::OnSuccess);
        let job = attach(&tap, &target, incremental);
        let writers = vec![writer(&tap, 0, &[2, 3]), writer(&tap, UNIT, &[4, 5])];
        until_ready(&job);
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        for writer in writers {
            writer.join().unwrap();
        }
        let bitmap = tap.bitmap("b").unwrap();
        let (source, target) = (source.contents().unwrap(), target.contents().unwrap());
        for at in (0..LEN).filter(|at| source[*at as usize] != target[*at as usize]) {
            assert!(bitmap.dirty_bytes_in(at..at + 1) > 0, "{at} is in neither");
        }
    });
}

/// Who drains the tap has no write under way, whatever a job does meanwhile, and all threads go on.
#[test]
fn a_drained_tap_stands_still() {
    explore(|| {
        let (source, target) = (disk(1), disk(1));
        let tap = Tap::new(Arc::clone(&source) as _);
        let writers = vec![writer(&tap, 0, &[2, 3]), writer(&tap, UNIT, &[4, 5])];
        let job = attach(&tap, &target, short());
        let drained = tap.drain();
        let before = drained.device().read_vec();
        thread::yield_now();
        assert_eq!(drained.device().read_vec(), before);
        drop(drained);
        until_ready(&job);
        job.control().complete().unwrap();
        job.wait().unwrap();
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

/// A group of two disks: the log is written before the data, and the copies of both show one instant.
#[test]
fn the_copies_of_a_group_show_one_instant() {
    explore(|| {
        let (log, data) = (Tap::new(disk(1)), Tap::new(disk(1)));
        let (log_copy, data_copy) = (disk(1), disk(1));
        let one = || short().threads(NonZeroUsize::new(1));
        let group = MirrorGroup::attach(vec![
            GroupMember::new(&log, Arc::clone(&log_copy) as _, one()),
            GroupMember::new(&data, Arc::clone(&data_copy) as _, one()),
        ])
        .unwrap();
        let guest = thread::spawn(move || {
            for version in 2..5 {
                log.write_at(&[version], 0, WriteFlags::NONE).unwrap();
                data.write_at(&[version], 0, WriteFlags::NONE).unwrap();
            }
        });
        while group.control().next_event(None).unwrap() != GroupEvent::Ready {}
        group.control().keep_copy().unwrap();
        group.wait().unwrap();
        let (log, data) = (log_copy.contents().unwrap()[0], data_copy.contents().unwrap()[0]);
        assert!(log == data || log == data + 1, "the log at {log}, the data at {data}");
        guest.join().unwrap();
        assert_eq!((log_copy.contents().unwrap()[0], data_copy.contents().unwrap()[0]), (log, data));
    });
}

/// Both go over or none, also when one of them is cancelled at any time.
#[test]
fn a_group_pivots_whole_or_not_at_all() {
    explore(|| {
        let (first, second) = (Tap::new(disk(1)), Tap::new(disk(1)));
        let targets = [disk(1), disk(1)];
        let one = || short().threads(NonZeroUsize::new(1));
        let group = MirrorGroup::attach(vec![
            GroupMember::new(&first, Arc::clone(&targets[0]) as _, one()),
            GroupMember::new(&second, Arc::clone(&targets[1]) as _, one()),
        ])
        .unwrap();
        let writers = vec![writer(&first, 0, &[2, 3]), writer(&second, 0, &[4])];
        while group.control().next_event(None).unwrap() != GroupEvent::Ready {}
        group.control().complete().unwrap();
        // Too late, or it takes the other with it.
        let _ = group.control().members()[1].force_cancel();
        let ended_well = group.wait().is_ok();
        for writer in writers {
            writer.join().unwrap();
        }
        for (tap, target) in [&first, &second].into_iter().zip(&targets) {
            let before = target.contents().unwrap();
            tap.write_at(&[9], 3, WriteFlags::NONE).unwrap();
            assert_eq!(target.contents().unwrap() != before, ended_well, "one went over and one did not");
        }
        let mut found = [0; 1];
        first.read_at(&mut found, 0).unwrap();
        assert_eq!(found, [3]);
        second.read_at(&mut found, 0).unwrap();
        assert_eq!(found, [4]);
    });
}

trait ReadVec {
    fn read_vec(&self) -> Vec<u8>;
}

impl ReadVec for Arc<dyn BlockDevice> {
    fn read_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len()).unwrap()];
        self.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}
