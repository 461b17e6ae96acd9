//! What a program needs that has jobs in it: a job without an owner, how it ended, and what is left of one.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_mirror::{
    BitmapMode, DirtyBitmap, Error, Event, JobEnd, MirrorJob, MirrorOptions, SyncMode, Tap,
};

use crate::tap::{empty, faulty, filled, until};

/// Long enough that only a hang reaches it.
const FOREVER: Duration = Duration::from_secs(60);

#[test]
fn the_outcome_says_what_is_left_behind() {
    let (source, target) = (filled(), empty());
    let copy = MirrorJob::start(Arc::clone(&source) as _, Arc::clone(&target) as _, MirrorOptions::new());
    assert_eq!(copy.unwrap().wait().unwrap().ending, JobEnd::Copied);
    let tap = Tap::new(source as _);
    for ending in [JobEnd::Kept, JobEnd::Pivoted] {
        let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new()).unwrap();
        until(&job, &Event::Ready);
        match ending {
            JobEnd::Kept => job.control().keep_copy().unwrap(),
            _ => job.control().complete().unwrap(),
        }
        assert_eq!(job.wait().unwrap().ending, ending);
    }
}

#[test]
fn a_detached_job_goes_on_and_ends_by_its_control() {
    let (source, target) = (filled(), Arc::new(MemoryDisk::new(4 << 20).named("new")));
    let tap = Tap::new(source as _);
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new()).unwrap();
    let control = job.detach().unwrap();
    while control.next_event(Some(FOREVER)).unwrap() != Event::Ready {}
    tap.write_at(&[9; 512], 0, WriteFlags::NONE).unwrap();
    control.complete().unwrap();
    assert!(control.wait_timeout(FOREVER));
    assert_eq!((tap.device().name(), target.contents().unwrap()[0]), ("new", 9));
    let job = MirrorJob::attach(&tap, empty() as _, MirrorOptions::new().speed(1)).unwrap();
    let control = job.detach().unwrap();
    control.force_cancel().unwrap();
    assert!(control.wait_timeout(FOREVER));
}

/// A job on a tap that is cancelled, and another that goes on from what it has left and what was written
/// since.
#[test]
fn another_job_goes_on_from_what_is_left() {
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    tap.add_bitmap("since", 4096).unwrap();
    let job = MirrorJob::attach(&tap, slow as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    assert_eq!(job.control().remaining().dirty_bytes(), 0);
    let gate = faults.hold(OpKind::Write, None);
    tap.write_at(&[8; 100], 1 << 20, WriteFlags::NONE).unwrap();
    gate.wait_held(1);
    let control = job.control().clone();
    assert!(control.remaining().dirty_bytes_in(1 << 20..(1 << 20) + 100) > 0, "it is being copied");
    control.force_cancel().unwrap();
    gate.open();
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
    let mut left = control.remaining();
    assert!(left.dirty_bytes() > 0 && left.dirty_bytes() < 1 << 20);
    tap.write_at(&[7; 100], 2 << 20, WriteFlags::NONE).unwrap();
    left.merge(&tap.bitmap("since").unwrap());
    let expected = left.dirty_bytes();
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new().only(left)).unwrap();
    until(&job, &Event::Ready);
    let progress = job.control().progress();
    assert!(progress.copied + progress.zeroed + progress.skipped <= expected, "no more than is left");
    tap.write_at(&[6; 100], 3 << 20, WriteFlags::NONE).unwrap();
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn a_part_of_the_disk_is_asked_for_in_one_way_only() {
    let tap = Tap::new(filled() as _);
    tap.add_bitmap("b", 4096).unwrap();
    let only = || MirrorOptions::new().only(DirtyBitmap::new(4 << 20, 4096).unwrap());
    let options =
        [only().sync(SyncMode::None), only().sync(SyncMode::Incremental).bitmap("b", BitmapMode::OnSuccess)];
    for options in options {
        let refused = MirrorJob::attach(&tap, empty() as _, options).map(drop);
        assert!(matches!(refused, Err(Error::SyncBitmap { .. })), "{refused:?}");
    }
    assert!(!tap.is_mirrored());
}
