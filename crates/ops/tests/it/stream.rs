//! Streaming chains of files while a guest writes, with QEMU as the judge of what is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{Chain, SIZE, backing_name, contents, guest, img, judge, name, qemu};
use blockmirror_block::testing::{
    Fault, FaultDisk, FaultStorage, Faults, MemoryDisk, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{
    BlockDevice, ByteRange, ErrorKind, ExtentKind, Storage, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{Event, IoStatus, JobState, OnError, Refused, Tap};
use blockmirror_ops::{Base, Error, JobOptions, StreamJob};
use blockmirror_qcow2::{CreateOptions, Header, OpenOptions, Qcow2, Version};

fn stands_alone(image: &Qcow2) {
    image
        .extents(ByteRange::new(0, image.len()), &mut |e| {
            assert!(e.depth == 0, "{e:?} is below");
            Visit::Continue(())
        })
        .unwrap();
}

/// The guest writes through a tap from the beginning to after the end, as it would.
fn stream_under_a_guest(chain: &Chain, base: Option<(Base, u32)>) -> Vec<u8> {
    let tap = Tap::new(Arc::clone(chain.top()) as _);
    let before = contents(&**chain.top());
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let guest = s.spawn(|| guest(&*tap, before, &stop));
        let job = StreamJob::start(Arc::clone(chain.top()), base, JobOptions::default()).unwrap();
        let result = job.wait();
        stop.store(true, Ordering::Relaxed);
        let now = guest.join().unwrap();
        result.unwrap();
        assert!(contents(&*tap) == now);
        tap.flush().unwrap();
        now
    })
}

#[test]
fn everything_comes_up_and_the_image_stands_alone() {
    let chain = Chain::new(&[SIZE, SIZE, SIZE]);
    let now = stream_under_a_guest(&chain, None);
    stands_alone(chain.top());
    assert!(chain.top().backing().is_none());
    assert_eq!(backing_name(chain.dir(), &name(2)), None);
    if qemu("stream") {
        judge(chain.dir(), &name(2), &now);
    }
}

#[test]
fn the_layers_above_the_base_are_taken_out() {
    let chain = Chain::new(&[SIZE, SIZE, SIZE, SIZE]);
    let base_before = contents(&*chain.layers[1]);
    let now = stream_under_a_guest(&chain, Some((chain.base(1), 2)));
    assert_eq!(backing_name(chain.dir(), &name(3)).as_deref(), Some("layer1.qcow2"));
    assert!(contents(&*chain.layers[1]) == base_before);
    // The layer that was taken out is not needed any more.
    std::fs::remove_file(chain.path(2)).unwrap();
    if qemu("stream") {
        judge(chain.dir(), &name(3), &now);
    }
}

/// What the middle layer is too short for reads as zeros, though the base has data there.
#[test]
fn a_short_layer_between_keeps_the_base_hidden() {
    for lens in [[SIZE, SIZE / 2 + 512, SIZE], [SIZE + 65536, SIZE / 4, SIZE], [SIZE / 2, SIZE / 4, SIZE]] {
        let chain = Chain::new(&lens);
        let before = contents(&**chain.top());
        let job = StreamJob::start(Arc::clone(chain.top()), Some((chain.base(0), 2)), JobOptions::default());
        job.unwrap().wait().unwrap();
        assert!(contents(&**chain.top()) == before, "{lens:?}");
        chain.top().flush().unwrap();
        if qemu("stream") {
            judge(chain.dir(), &name(2), &before);
        }
    }
}

/// What the guest discards and zeroes past the end of a short layer, before the stream takes that layer out,
/// stays as the guest has read it: the longer base must not show there. The image counts as backed past the
/// end of its backing device.
#[test]
fn zeros_past_a_short_layer_stay_when_a_longer_base_follows() {
    let layer = |version, len, below: Arc<dyn BlockDevice>| {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(len);
        options.version = version;
        options.backing_file = Some(b"below".to_vec());
        options.create(&*storage, None).unwrap();
        Arc::new(OpenOptions::new().writable(true).backing(below).open(storage).unwrap())
    };
    for version in [Version::V2, Version::V3] {
        let base: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&[0xbb; 1 << 20]));
        let middle = layer(version, 512 << 10, Arc::clone(&base));
        let top = layer(version, 1 << 20, middle);
        let whole = |at: u64| ByteRange::at(at << 10, 64 << 10);
        for at in [640u64, 704, 768, 832] {
            top.write_at(&[7; 64 << 10], at << 10, WriteFlags::NONE).unwrap();
        }
        // The job has not come here yet: nothing is allocated.
        top.write_zeroes(whole(896), ZeroFlags::MAY_UNMAP).unwrap();
        top.write_zeroes(ByteRange::at((960 << 10) + 512, 4096), ZeroFlags::NONE).unwrap();
        let base = Base { device: base, name: b"base".to_vec(), format: Some("raw".into()) };
        let options = JobOptions::default().auto_finalize(false);
        let job = StreamJob::start(Arc::clone(&top), Some((base, 2)), options).unwrap();
        while job.control().next_event(None) != Some(Event::Pending) {}
        top.discard(whole(640)).unwrap();
        top.write_zeroes(whole(704), ZeroFlags::MAY_UNMAP).unwrap();
        top.write_zeroes(whole(768), ZeroFlags::NONE).unwrap();
        top.write_zeroes(ByteRange::at((832 << 10) + 100, 5000), ZeroFlags::MAY_UNMAP).unwrap();
        let before = contents(&*top);
        job.control().finalize().unwrap();
        job.wait().unwrap();
        let after = contents(&*top);
        let differs = before.iter().zip(&after).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{version:?}: the base shows");
    }
}

/// QEMU's rebase, which does the same without a guest, leaves the same contents.
#[test]
fn as_qemu_img_rebase() {
    if !qemu("stream") {
        return;
    }
    let chain = Chain::new(&[SIZE, SIZE, SIZE]);
    let copy = chain.copy();
    let before = contents(&**chain.top());
    StreamJob::start(Arc::clone(chain.top()), Some((chain.base(0), 2)), JobOptions::default())
        .unwrap()
        .wait()
        .unwrap();
    chain.top().flush().unwrap();
    img(copy.path(), &["rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &name(0), &name(2)]);
    judge(copy.path(), &name(2), &before);
    judge(chain.dir(), &name(2), &before);
}

/// An overlay in memory on `below`.
fn overlay(below: Arc<dyn BlockDevice>) -> Arc<Qcow2> {
    overlay_in(Arc::new(MemoryStorage::new()), below)
}

fn overlay_in(storage: Arc<dyn Storage>, below: Arc<dyn BlockDevice>) -> Arc<Qcow2> {
    let mut options = CreateOptions::new(SIZE);
    options.backing_file = Some(b"base".to_vec());
    options.create(&*storage, None).unwrap();
    Arc::new(OpenOptions::new().writable(true).backing(below).open(storage).unwrap())
}

/// Whenever the power fails while everything is brought up, the image reads as before through whatever its
/// header names then.
#[test]
fn a_crash_changes_nothing_that_is_read() {
    const LEN: u64 = 300_032;
    for cluster in [512u64, 4096, 65536] {
        let bytes: Vec<u8> =
            (0..LEN).map(|at| if at / 20_000 % 3 == 1 { 0 } else { (at / 512) as u8 | 1 }).collect();
        let base: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&bytes));
        let storage = MemoryStorage::new();
        let mut options = CreateOptions::new(LEN);
        options.cluster_size = cluster;
        options.backing_file = Some(b"base".to_vec());
        options.create(&storage, None).unwrap();
        let recording = Arc::new(RecordingStorage::with_contents(&storage.to_vec()));
        let open = |storage, backed: bool| {
            let open = OpenOptions::new().writable(true);
            let open = if backed { open.backing(Arc::clone(&base)) } else { open };
            Arc::new(open.open(storage).unwrap())
        };
        let image = open(recording.clone(), true);
        image.write_at(&[9; 3000], 50_000, WriteFlags::FUA).unwrap();
        let (before, first) = (contents(&*image), recording.position());
        StreamJob::start(image, None, JobOptions::default()).unwrap().wait().unwrap();
        let (mut points, mut alone) = (0, 0);
        for point in recording.crash_points().filter(|point| point.position() >= first) {
            let backed = Header::read(&point.storage()).unwrap().backing.is_some();
            points += 1;
            alone += u32::from(!backed);
            let image = open(Arc::new(point.storage()), backed);
            assert!(contents(&*image) == before, "clusters of {cluster}, {point:?}, backed {backed}");
        }
        assert!(
            points > 10 && alone > 0 && alone < points,
            "{points} points, {alone} without a backing file"
        );
    }
}

fn faulty_base() -> (Faults, Arc<Qcow2>) {
    let faults = Faults::new();
    let base = Arc::new(MemoryDisk::with_contents(&vec![7; SIZE as usize]));
    (faults.clone(), overlay(Arc::new(FaultDisk::new(base, faults))))
}

#[test]
fn an_error_that_is_reported_leaves_the_chain_as_it_is() {
    let (faults, image) = faulty_base();
    faults.inject(Fault::on(OpKind::Read).after(2));
    let error =
        StreamJob::start(Arc::clone(&image), None, JobOptions::default()).unwrap().wait().unwrap_err();
    assert!(matches!(error, Error::Read(_)), "{error}");
    assert_eq!(image.header().backing.as_ref().unwrap().name.as_bytes(), b"base");
    assert!(contents(&*image) == vec![7; SIZE as usize]);
}

#[test]
fn a_job_that_an_error_stops_goes_on_when_told() {
    let (faults, image) = faulty_base();
    faults.inject(Fault::on(OpKind::Read).after(1).with(ErrorKind::NoSpace));
    let options = JobOptions::default().on_error(OnError::Enospc).auto_dismiss(false);
    let job = StreamJob::start(Arc::clone(&image), None, options).unwrap();
    while job.control().next_event(None) != Some(Event::Status(JobState::Paused)) {}
    let progress = job.control().progress();
    assert_eq!((progress.io_status, progress.offset), (IoStatus::NoSpace, 1 << 20));
    job.control().resume().unwrap();
    while job.control().next_event(None) != Some(Event::Completed { error: None }) {}
    job.control().dismiss().unwrap();
    assert_eq!(job.wait().unwrap().moved, SIZE);
    assert!(contents(&*image) == vec![7; SIZE as usize] && image.header().backing.is_none());
}

#[test]
fn what_is_ignored_is_left_out_and_the_chain_left_as_it_is() {
    let (faults, image) = faulty_base();
    faults.inject(Fault::on(OpKind::Read).within(ByteRange::at(2 << 20, 1)).forever());
    let options = JobOptions::default().on_error(OnError::Ignore);
    let error = StreamJob::start(Arc::clone(&image), None, options).unwrap().wait().unwrap_err();
    assert!(matches!(error, Error::LeftOut(_)), "{error}");
    assert!(image.header().backing.is_some());
    let mut up = 0;
    image
        .extents(ByteRange::new(0, SIZE), &mut |e| {
            up += if e.depth == 0 && e.kind == ExtentKind::Data { e.range.len() } else { 0 };
            Visit::Continue(())
        })
        .unwrap();
    assert_eq!(up, SIZE - (1 << 20));
}

#[test]
fn a_job_waits_to_be_finalized_and_the_guest_writes_on() {
    let (_, image) = faulty_base();
    let options = JobOptions::default().auto_finalize(false);
    let job = StreamJob::start(Arc::clone(&image), None, options).unwrap();
    while job.control().next_event(None) != Some(Event::Pending) {}
    assert!(image.backing().is_some());
    image.write_at(&[9; 1000], 5000, WriteFlags::NONE).unwrap();
    job.control().finalize().unwrap();
    job.wait().unwrap();
    let mut want = vec![7; SIZE as usize];
    want[5000..6000].fill(9);
    assert!(contents(&*image) == want && image.backing().is_none());
}

#[test]
fn a_cancelled_job_ends_while_its_device_blocks() {
    let (faults, image) = faulty_base();
    let gate = faults.hold(OpKind::Read, None);
    let job = StreamJob::start(Arc::clone(&image), None, JobOptions::default()).unwrap();
    gate.wait_held(1);
    assert!(!job.control().wait_timeout(Duration::ZERO));
    job.control().cancel().unwrap();
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
    gate.open();
    assert!(image.backing().is_some());
    assert!(contents(&*image) == vec![7; SIZE as usize]);
}

/// It was reported as cancelled although the header had its new name: the caller took the chain for
/// unchanged.
#[test]
fn a_job_that_relinks_cannot_be_cancelled_any_more() {
    let faults = Faults::new();
    let image = overlay_in(
        Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new()), faults.clone())),
        Arc::new(MemoryDisk::with_contents(&vec![7; SIZE as usize])),
    );
    let gate = faults.hold(OpKind::Write, Some(ByteRange::new(0, 512)));
    let job = StreamJob::start(Arc::clone(&image), None, JobOptions::default()).unwrap();
    gate.wait_held(1);
    let refused = [job.control().cancel(), job.control().force_cancel()];
    // Before anything can fail: the job that is dropped then waits for its write.
    gate.open();
    for refused in refused {
        assert!(matches!(refused, Err(Refused::State { state: JobState::Pending, .. })), "{refused:?}");
    }
    job.wait().unwrap();
    assert!(image.header().backing.is_none() && image.backing().is_none());
}

/// Its cancellation ended the calls of all who used the layers.
#[test]
fn a_cancelled_job_leaves_the_calls_of_others_alone() {
    let (faults, image) = faulty_base();
    let base = image.backing().unwrap();
    let gate = faults.hold(OpKind::Read, None);
    let job = StreamJob::start(image, None, JobOptions::default()).unwrap();
    thread::scope(|scope| {
        let other = scope.spawn(|| base.read_at(&mut [0; 512], 0));
        gate.wait_held(2);
        job.control().cancel().unwrap();
        assert!(matches!(job.wait(), Err(Error::Cancelled)));
        assert_eq!(gate.held(), 1);
        gate.open();
        other.join().unwrap().unwrap();
    });
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (_, image) = faulty_base();
    let base = Base { device: image.backing().unwrap(), name: b"base".to_vec(), format: None };
    let refused = StreamJob::start(image, Some((base, 0)), JobOptions::default()).unwrap_err();
    assert!(matches!(refused, Error::NoLayers { layers: 0 }));
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(SIZE).create(&*storage, None).unwrap();
    let reader = Arc::new(OpenOptions::new().open(storage).unwrap());
    let refused = StreamJob::start(reader, None, JobOptions::default()).unwrap_err();
    assert!(matches!(refused, Error::ReadOnly { .. }));
}
