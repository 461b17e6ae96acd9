//! Committing chains of files, from the top under a guest and from the middle, with QEMU as the judge of what
//! is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::common::{Chain, SIZE, backing_name, contents, guest, img, judge, name, qemu};
use blockmirror_block::testing::{Fault, FaultDisk, Faults, OpKind};
use blockmirror_block::{BlockDevice, ErrorKind, WriteFlags};
use blockmirror_mirror::{CopyMode, Event, MirrorOptions, OnError, Tap};
use blockmirror_ops::{Base, CommitJob, Error, JobOptions, commit_active};

fn commit_under_a_guest(lens: &[u64], base: usize, mode: CopyMode) {
    let chain = Chain::new(lens);
    let tap = Tap::new(Arc::clone(chain.top()) as _);
    let before = contents(&**chain.top());
    let layers = (lens.len() - 1 - base) as u32;
    let stop = AtomicBool::new(false);
    let now = thread::scope(|s| {
        let guest = s.spawn(|| guest(&*tap, before, &stop));
        let base = Arc::clone(&chain.layers[base]) as Arc<dyn BlockDevice>;
        let job = commit_active(&tap, base, layers, MirrorOptions::new().copy_mode(mode)).unwrap();
        while job.control().next_event(None).is_some_and(|event| event != Event::Ready) {}
        job.control().complete().unwrap();
        let result = job.wait();
        stop.store(true, Ordering::Relaxed);
        let now = guest.join().unwrap();
        result.unwrap();
        now
    });
    assert!(Arc::ptr_eq(&tap.device(), &(Arc::clone(&chain.layers[base]) as _)));
    assert!(contents(&*tap) == now, "{lens:?}");
    tap.flush().unwrap();
    if qemu("commit") {
        judge(chain.dir(), &name(base), &now);
    }
}

#[test]
fn the_guests_image_goes_down_and_the_guest_follows() {
    commit_under_a_guest(&[SIZE, SIZE], 0, CopyMode::WriteBlocking);
}

#[test]
fn several_layers_go_down_into_a_base_that_stands_on_another() {
    commit_under_a_guest(&[SIZE, SIZE, SIZE, SIZE], 1, CopyMode::WriteBlocking);
}

#[test]
fn a_short_base_grows_and_short_layers_hide_what_they_hid() {
    commit_under_a_guest(&[SIZE, SIZE / 2, SIZE], 1, CopyMode::WriteBlocking);
    commit_under_a_guest(&[SIZE, SIZE / 2 + 512, SIZE], 0, CopyMode::WriteBlocking);
    commit_under_a_guest(&[SIZE / 4, SIZE, SIZE], 0, CopyMode::WriteBlocking);
}

#[test]
fn a_middle_goes_down_and_its_overlay_follows() {
    for (lens, base, layers) in [
        ([SIZE, SIZE, SIZE, SIZE], 1, 1),
        ([SIZE, SIZE, SIZE, SIZE], 0, 2),
        ([SIZE / 2, SIZE / 4, SIZE, SIZE], 0, 2),
        ([SIZE, SIZE, SIZE / 2 + 512, SIZE / 2 + 512], 0, 1),
    ] {
        let chain = Chain::new(&lens);
        let (top, overlay) = (base + layers, base + layers + 1);
        let refused = lens[base] > lens[top];
        let copy = chain.copy();
        let before = contents(&*chain.layers[overlay]);
        let of_top = contents(&*chain.layers[top]);
        let job = CommitJob::start(
            Arc::clone(&chain.layers[overlay]),
            Arc::clone(&chain.layers[top]) as _,
            chain.base(base),
            layers as u32,
            JobOptions::default(),
        );
        if refused {
            assert!(matches!(job, Err(Error::BaseLonger { .. })));
            continue;
        }
        job.unwrap().wait().unwrap();
        assert!(contents(&*chain.layers[overlay]) == before, "{lens:?}");
        assert!(contents(&*chain.layers[base]) == of_top, "{lens:?}: the base is what the top was");
        assert_eq!(backing_name(chain.dir(), &name(overlay)), Some(name(base)));
        // What was committed is not needed any more.
        for between in base + 1..=top {
            std::fs::remove_file(chain.path(between)).unwrap();
        }
        if qemu("commit") {
            judge(chain.dir(), &name(overlay), &before);
            judge(chain.dir(), &name(base), &of_top);
            img(copy.path(), &["commit", "-q", "-d", "-f", "qcow2", "-b", &name(base), &name(top)]);
            judge(copy.path(), &name(base), &of_top);
        }
    }
}

#[test]
fn a_failure_leaves_the_overlay_where_it_stands() {
    let chain = Chain::new(&[SIZE, SIZE, SIZE]);
    let before = contents(&**chain.top());
    let faults = Faults::new();
    let base = FaultDisk::new(Arc::clone(&chain.layers[0]) as _, faults.clone());
    let base = Base { device: Arc::new(base), name: name(0).into_bytes(), format: Some("qcow2".into()) };
    let start = |policy| {
        CommitJob::start(
            Arc::clone(chain.top()),
            Arc::clone(&chain.layers[1]) as _,
            base.clone(),
            1,
            JobOptions::default().on_error(policy),
        )
        .unwrap()
    };
    faults.inject(Fault::on(OpKind::Write).after(3));
    let error = start(OnError::Report).wait().unwrap_err();
    assert!(matches!(error, Error::Write(_)) && error.device_error().unwrap().kind() == ErrorKind::Io);
    assert!(contents(&**chain.top()) == before);
    assert_eq!(backing_name(chain.dir(), &name(2)), Some(name(1)));
    // A flush that fails at the end does as well.
    faults.inject(Fault::on(OpKind::Flush));
    assert!(start(OnError::Report).wait().is_err());
    assert_eq!(backing_name(chain.dir(), &name(2)), Some(name(1)));
    start(OnError::Report).wait().unwrap();
    assert!(contents(&**chain.top()) == before);
    assert_eq!(backing_name(chain.dir(), &name(2)), Some(name(0)));
}

#[test]
fn a_commit_that_is_given_up_leaves_the_guest_on_its_image() {
    let chain = Chain::new(&[SIZE, SIZE]);
    let tap = Tap::new(Arc::clone(chain.top()) as _);
    let mut now = contents(&*tap);
    let base = Arc::clone(&chain.layers[0]) as Arc<dyn BlockDevice>;
    let job = commit_active(&tap, Arc::clone(&base), 1, MirrorOptions::new()).unwrap();
    while job.control().next_event(None) != Some(Event::Ready) {}
    job.control().force_cancel().unwrap();
    assert!(job.wait().is_err());
    tap.write_at(&[3; 512], 0, WriteFlags::NONE).unwrap();
    now[..512].fill(3);
    assert!(contents(&*tap) == now && !Arc::ptr_eq(&tap.device(), &base));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let chain = Chain::new(&[SIZE, SIZE / 2]);
    let tap = Tap::new(Arc::clone(chain.top()) as _);
    let base = Arc::clone(&chain.layers[0]) as Arc<dyn BlockDevice>;
    let commit = |layers| commit_active(&tap, Arc::clone(&base), layers, MirrorOptions::new()).unwrap_err();
    assert!(matches!(commit(0), Error::NoLayers { .. }));
    assert!(matches!(commit(1), Error::BaseLonger { .. }));
}
