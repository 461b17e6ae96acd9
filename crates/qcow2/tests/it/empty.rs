//! Emptying an image whose content lies below it: at each instant, whatever fails, it reads as before.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{
    Fault, FaultStorage, Faults, MemoryDisk, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, ByteRange, ExtentKind, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, NewSnapshot, OpenOptions, Qcow2, SnapshotRef, Version, check};

const LEN: u64 = 5 << 19;

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0; disk.len() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

/// An image in a version with clusters of a size, which holds data, zeros and holes; and what it reads as.
fn image(
    version: Version,
    cluster: u64,
    extended: bool,
    data: Option<&Arc<MemoryStorage>>,
) -> (Vec<u8>, Vec<u8>) {
    let storage = Arc::new(RecordingStorage::default());
    let mut options = CreateOptions::new(LEN);
    (options.version, options.cluster_size, options.extended_l2) = (version, cluster, extended);
    options.backing_file = Some(b"base".to_vec());
    options.data_file = data.map(|_| b"data".to_vec());
    options.create(&*storage, data.map(|data| &**data as &dyn Storage)).unwrap();
    let base: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&vec![0x11; LEN as usize]));
    let mut open = OpenOptions::new().writable(true).backing(base);
    if let Some(data) = data {
        open = open.data_file(Arc::clone(data) as _);
    }
    let image = open.open(Arc::clone(&storage) as _).unwrap();
    for at in (0..LEN - 70_000).step_by(200_000) {
        image.write_at(&vec![(at / 1000) as u8 | 1; 70_000], at, WriteFlags::NONE).unwrap();
        image.write_zeroes(ByteRange::at(at + 90_000, 50_000), ZeroFlags::MAY_UNMAP).unwrap();
    }
    image.flush().unwrap();
    let read = contents(&image);
    (storage.to_vec(), read)
}

fn open(storage: Arc<dyn Storage>, below: &[u8], data: Option<&Arc<MemoryStorage>>) -> Qcow2 {
    let mut options =
        OpenOptions::new().writable(true).backing(Arc::new(MemoryDisk::with_contents(below)) as _);
    if let Some(data) = data {
        options = options.data_file(Arc::clone(data) as _);
    }
    options.open(storage).unwrap()
}

/// Whether the image itself holds something.
fn holds_something(image: &Qcow2) -> bool {
    let mut own = false;
    let all = ByteRange::new(0, image.len());
    image
        .extents(all, &mut |extent| {
            own |= extent.in_top() && extent.kind != ExtentKind::Unallocated;
            Visit::Continue(())
        })
        .unwrap();
    own
}

#[test]
fn each_crash_leaves_what_it_read() {
    for (version, cluster, extended) in [
        (Version::V3, 512, false),
        (Version::V3, 4096, false),
        (Version::V2, 4096, false),
        (Version::V3, 16 << 10, true),
        (Version::V3, 65536, false),
    ] {
        let (bytes, want) = image(version, cluster, extended, None);
        let storage = Arc::new(RecordingStorage::with_contents(&bytes));
        let image = open(Arc::clone(&storage) as _, &want, None);
        assert!(holds_something(&image));
        image.empty().unwrap();
        assert!(contents(&image) == want && !holds_something(&image));
        drop(image);
        for (number, point) in storage.crash_points().enumerate() {
            let left = Arc::new(point.storage());
            if number % 16 == 0 {
                assert_eq!(check(&*left, &mut ()).unwrap().corruptions, 0, "{cluster}: {point}");
            }
            let image = open(left, &want, None);
            assert!(contents(&image) == want, "{cluster}: {point}");
            image.empty().unwrap();
            assert!(!holds_something(&image) && contents(&image) == want, "{cluster}: {point}: once more");
        }
        // Over other contents: nothing of its own is left, and all of its space is free.
        let other = vec![0x77; LEN as usize];
        let image = open(Arc::new(storage.snapshot()), &other, None);
        assert!(contents(&image) == other);
        let report = check(&storage.snapshot(), &mut ()).unwrap();
        assert!(report.is_clean() && report.allocated_clusters == 0, "{cluster}: {report:?}");
    }
}

#[test]
fn a_failure_leaves_what_it_read_too() {
    let (bytes, want) = image(Version::V3, 4096, false, None);
    for kind in [OpKind::Write, OpKind::Flush] {
        for after in 0..6 {
            let storage = Arc::new(RecordingStorage::with_contents(&bytes));
            let faults = Faults::new();
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone()));
            let image = open(faulty, &want, None);
            faults.inject(Fault::on(kind).after(after).forever());
            let failed = image.empty().is_err();
            assert!(failed || faults.failed() == 0, "{kind:?} {after}");
            assert!(contents(&image) == want, "{kind:?} {after}");
            drop(image);
            let again = open(Arc::new(storage.snapshot()), &want, None);
            assert!(contents(&again) == want, "{kind:?} {after}");
            again.empty().unwrap();
            assert!(!holds_something(&again) && contents(&again) == want, "{kind:?} {after}");
        }
    }
}

#[test]
fn a_data_file_gives_its_space_back() {
    let data = Arc::new(MemoryStorage::new());
    let (bytes, want) = image(Version::V3, 65536, false, Some(&data));
    let storage = Arc::new(MemoryStorage::with_contents(&bytes));
    let image = open(storage, &want, Some(&data));
    image.empty().unwrap();
    assert!(contents(&image) == want && !holds_something(&image));
    let mut held = vec![1; data.len().unwrap() as usize];
    data.read_at(&mut held, 0).unwrap();
    assert!(held.iter().all(|byte| *byte == 0));
}

#[test]
fn an_image_that_is_only_read_is_not_emptied() {
    let (bytes, _) = image(Version::V3, 65536, false, None);
    let image = OpenOptions::new().open(Arc::new(MemoryStorage::with_contents(&bytes))).unwrap();
    assert_eq!(image.empty().unwrap_err().kind(), blockmirror_block::ErrorKind::ReadOnly);
}

/// A snapshot holds what it held, at each instant; its tables and clusters are shared with the disk.
#[test]
fn a_snapshot_keeps_what_the_image_drops() {
    for (version, cluster, extended) in
        [(Version::V3, 4096, false), (Version::V2, 4096, false), (Version::V3, 16 << 10, true)]
    {
        let (bytes, want) = image(version, cluster, extended, None);
        let taken = Arc::new(RecordingStorage::with_contents(&bytes));
        let disk = open(Arc::clone(&taken) as _, &want, None);
        disk.create_snapshot(&NewSnapshot::new("one")).unwrap();
        disk.write_at(&[0x66; 90_000], 10_000, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        let now = contents(&disk);
        drop(disk);
        let storage = Arc::new(RecordingStorage::with_contents(&taken.to_vec()));
        let disk = open(Arc::clone(&storage) as _, &now, None);
        disk.empty().unwrap();
        assert!(contents(&disk) == now && !holds_something(&disk));
        drop(disk);
        let of_snapshot = |storage: Arc<dyn Storage>| {
            let below = Arc::new(MemoryDisk::with_contents(&want)) as _;
            let id = SnapshotRef::Id("1".into());
            contents(&OpenOptions::new().backing(below).snapshot(id).open(storage).unwrap())
        };
        for (number, point) in storage.crash_points().enumerate() {
            let left = Arc::new(point.storage());
            if number % 16 == 0 {
                assert_eq!(check(&*left, &mut ()).unwrap().corruptions, 0, "{cluster}: {point}");
            }
            assert!(of_snapshot(Arc::clone(&left) as _) == want, "{cluster}: {point}: the snapshot");
            assert!(contents(&open(left, &now, None)) == now, "{cluster}: {point}");
        }
        assert!(check(&storage.snapshot(), &mut ()).unwrap().is_clean(), "{cluster}");
    }
}
