//! Images that are marked dirty: a writable open repairs them first, a cut repair can be repeated, and this
//! crate's own writes never need the mark.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::process::Command;
use std::sync::Arc;

use blockmirror_block::testing::{MemoryStorage, RecordingStorage};
use blockmirror_block::{BlockDevice, ErrorKind, WriteFlags};
use blockmirror_qcow2::{CreateOptions, Header, OpenOptions, check};
use blockmirror_testing::qemu::have;

use crate::check::readable;
use crate::common::qemu_check_finds_nothing;
use crate::raw_image::RawImage;

const INCOMPATIBLE: u64 = 72;

/// An image with lazy refcounts whose writer has not closed it: what was written has no refcounts, or, as a
/// later writer may have left it, too many.
fn dirty() -> RawImage {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(256 << 10);
    (options.cluster_size, options.lazy_refcounts) = (4096, true);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[0x11; 70_000], 1000, WriteFlags::FUA).unwrap();
    drop(disk);
    let mut image = RawImage(storage.to_vec());
    let block = image.get(image.refcount_table());
    // Sixteen bits for each cluster: the L2 table, and what it maps.
    for cluster in 4..12 {
        image.set_len(block + cluster * 2, 0, 2);
    }
    image.set_len(block + 200, 1, 2);
    image.change(INCOMPATIBLE, |features| features | 1);
    image
}

#[test]
fn a_writable_open_repairs_first() {
    let image = dirty();
    let before = readable(&image.0);
    let storage = Arc::new(MemoryStorage::with_contents(&image.0));
    let disk = OpenOptions::new().open(storage.clone()).unwrap();
    drop(disk);
    assert!(storage.to_vec() == image.0, "a reader repairs nothing");
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    assert!(!disk.header().is_dirty() && disk.header().lazy_refcounts());
    disk.write_at(&[0x33; 100_000], 150_000, WriteFlags::FUA).unwrap();
    drop(disk);
    let after = storage.to_vec();
    assert!(check(&*storage, &mut ()).unwrap().is_clean());
    qemu_check_finds_nothing(&after, "a_writable_open_repairs_first");
    let untouched = 150_000 / 4096;
    assert!(readable(&after)[..untouched] == before[..untouched]);
}

#[test]
fn a_repair_at_open_that_was_cut_short_is_repeated() {
    let image = dirty();
    let before = readable(&image.0);
    let recording = Arc::new(RecordingStorage::with_contents(&image.0));
    drop(OpenOptions::new().writable(true).open(recording.clone()).unwrap());
    let mut points = 0;
    for point in recording.crash_points() {
        points += 1;
        let storage = Arc::new(point.storage());
        let marked = Header::read(&*storage).unwrap().is_dirty();
        assert!(marked || check(&*storage, &mut ()).unwrap().is_clean(), "{point:?}");
        drop(OpenOptions::new().writable(true).open(storage.clone()).unwrap());
        assert!(check(&*storage, &mut ()).unwrap().is_clean(), "{point:?}");
        assert!(readable(&storage.to_vec()) == before, "{point:?}");
    }
    assert!(points > 3, "{points}");
}

#[test]
fn what_a_repair_cannot_mend_is_not_written() {
    let mut image = dirty();
    let entry = image.l2_at(3);
    image.change(entry, |entry| entry + 512);
    let storage = Arc::new(MemoryStorage::with_contents(&image.0));
    let error = OpenOptions::new().writable(true).open(storage.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("marked dirty"), "{error}");
    assert!(Header::read(&*storage).unwrap().is_dirty());
    assert!(OpenOptions::new().open(storage).is_ok());
}

/// Whatever instant it ends at, an image with lazy refcounts that this crate wrote needs no repair.
#[test]
fn own_writes_need_no_mark() {
    let storage = MemoryStorage::new();
    let mut options = CreateOptions::new(256 << 10);
    (options.cluster_size, options.lazy_refcounts) = (4096, true);
    options.create(&storage, None).unwrap();
    let recording = Arc::new(RecordingStorage::with_contents(&storage.to_vec()));
    let disk = OpenOptions::new().writable(true).open(recording.clone()).unwrap();
    disk.write_at(&[0x11; 30_000], 1000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    disk.write_at(&[0x22; 9000], 100_000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    for point in recording.crash_points() {
        let storage = point.storage();
        assert!(!Header::read(&storage).unwrap().is_dirty(), "{point:?}");
        let report = check(&storage, &mut ()).unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{point:?}");
    }
}

/// What a writer of QEMU's leaves that was killed.
#[test]
fn an_image_that_qemu_left_dirty_is_repaired() {
    if !have("an_image_that_qemu_left_dirty_is_repaired", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let run = |tool: &str, args: &[&str]| Command::new(tool).args(args).arg(&path).output().unwrap();
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k"])
        .arg(&path)
        .arg("1M")
        .status();
    assert!(created.unwrap().success());
    let out = run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 0 300k", "-c", "flush", "-c", "abort"]);
    assert!(!out.status.success(), "{out:?}");
    let storage = Arc::new(MemoryStorage::with_contents(&std::fs::read(&path).unwrap()));
    assert!(Header::read(&*storage).unwrap().is_dirty());
    assert!(check(&*storage, &mut ()).unwrap().corruptions > 0, "refcounts are behind");
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    let mut found = vec![0; 300 << 10];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found.iter().all(|byte| *byte == 0x5a));
    disk.write_at(&[1; 200_000], 400_000, WriteFlags::FUA).unwrap();
    drop(disk);
    qemu_check_finds_nothing(&storage.to_vec(), "an_image_that_qemu_left_dirty_is_repaired");
}
