//! Both ways: QEMU reads, changes and checks snapshots that are made here, and the other way round.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage, WriteFlags};
use blockmirror_file::FileOptions;
use blockmirror_qcow2::{NewSnapshot, OpenOptions, Qcow2, SnapshotRef};
use blockmirror_testing::qemu::have;

use super::read_all;
use crate::qemu::{assert_clean, img, info, io};

const SHAPES: [&str; 9] = [
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=64k",
    "cluster_size=2M",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=4k,refcount_bits=64",
    "lazy_refcounts=on",
    "compression_type=zstd,cluster_size=4k",
];

fn open(dir: &Path, writable: bool, snapshot: Option<&str>) -> Qcow2 {
    let storage: Arc<dyn Storage> =
        Arc::new(FileOptions::new().writable(writable).open(dir.join("a.qcow2")).unwrap());
    let snapshot = snapshot.map(|name| SnapshotRef::Name(name.into()));
    OpenOptions::new().writable(writable).snapshot(snapshot).open(storage).unwrap()
}

/// What QEMU reads of the disk, or of a snapshot of it.
fn theirs(dir: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(name) = snapshot {
        args.extend(["-l", name]);
    }
    img(dir, &[&args[..], &["a.qcow2", "theirs.raw"]].concat()).unwrap();
    std::fs::read(dir.join("theirs.raw")).unwrap()
}

fn same(dir: &Path, snapshots: &[&str], what: &str) {
    assert_clean(dir, "a.qcow2", what);
    for name in std::iter::once(None).chain(snapshots.iter().copied().map(Some)) {
        assert!(read_all(&open(dir, false, name)) == theirs(dir, name), "{what}: {name:?}");
    }
}

/// A disk with compressed clusters, zeros, and data over some of both.
fn make(dir: &Path, shape: &str) {
    let bytes: Vec<u8> =
        (0..3 << 20).map(|at: u32| if at >> 18 & 3 == 3 { 0 } else { (at / 40) as u8 }).collect();
    std::fs::write(dir.join("raw"), bytes).unwrap();
    let _ = std::fs::remove_file(dir.join("a.qcow2"));
    img(dir, &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", shape, "raw", "a.qcow2"]).unwrap();
    io(dir, "a.qcow2", &["write -P 1 100k 300k", "write -z 1M 200k", "discard 2M 64k"]).unwrap();
}

#[test]
fn qemu_reads_and_changes_our_snapshots() {
    if !have("qemu_reads_and_changes_our_snapshots", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for shape in SHAPES {
        make(dir, shape);
        let disk = open(dir, true, None);
        disk.create_snapshot(&NewSnapshot::new("one").icount(0)).unwrap();
        disk.write_at(&[2; 70_000], 90_001, WriteFlags::NONE).unwrap();
        disk.create_snapshot(&NewSnapshot::new("two").icount(0)).unwrap();
        disk.write_at(&[3; 5000], 2_500_000, WriteFlags::FUA).unwrap();
        drop(disk);
        same(dir, &["one", "two"], shape);
        let listed = &info(dir, "a.qcow2")["snapshots"];
        assert_eq!((&listed[0]["id"], &listed[1]["name"]), (&"1".into(), &"two".into()), "{shape}");
        io(dir, "a.qcow2", &["write -P 4 0 3M"]).unwrap();
        same(dir, &["one", "two"], shape);
        img(dir, &["snapshot", "-a", "one", "a.qcow2"]).unwrap();
        same(dir, &["one", "two"], shape);
        img(dir, &["snapshot", "-d", "one", "a.qcow2"]).unwrap();
        same(dir, &["two"], shape);
        let disk = open(dir, true, None);
        disk.apply_snapshot(&SnapshotRef::Name("two".into())).unwrap();
        drop(disk);
        same(dir, &["two"], shape);
        img(dir, &["snapshot", "-d", "two", "a.qcow2"]).unwrap();
        same(dir, &[], shape);
    }
}

#[test]
fn their_snapshots_are_read_and_changed_here() {
    if !have("their_snapshots_are_read_and_changed_here", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for shape in SHAPES {
        make(dir, shape);
        img(dir, &["snapshot", "-c", "one", "a.qcow2"]).unwrap();
        io(dir, "a.qcow2", &["write -P 5 1M 1M"]).unwrap();
        img(dir, &["snapshot", "-c", "two", "a.qcow2"]).unwrap();
        let disk = open(dir, true, None);
        disk.write_at(&[6; 300_000], 1_000_000, WriteFlags::NONE).unwrap();
        disk.discard(blockmirror_block::ByteRange::new(0, 1 << 20)).unwrap();
        disk.flush().unwrap();
        drop(disk);
        same(dir, &["one", "two"], shape);
        let disk = open(dir, true, None);
        disk.apply_snapshot(&SnapshotRef::IdOrName("1".into())).unwrap();
        disk.delete_snapshot(&SnapshotRef::Name("one".into())).unwrap();
        drop(disk);
        same(dir, &["two"], shape);
        open(dir, true, None).delete_snapshot(&SnapshotRef::Id("2".into())).unwrap();
        same(dir, &[], shape);
        // Nothing is left of either, and the image can be written in place.
        let header = open(dir, false, None).header();
        assert_eq!((header.snapshot_count, header.snapshots_offset), (0, 0));
    }
}

/// A snapshot of another length is applied as QEMU applies it: the disk gets its length.
#[test]
fn lengths_differ() {
    if !have("lengths_differ", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (shape, other) in
        [("cluster_size=512", "20M"), ("cluster_size=64k", "1M"), ("cluster_size=512", "7k")]
    {
        make(dir, shape);
        img(dir, &["snapshot", "-c", "one", "a.qcow2"]).unwrap();
        let whole = theirs(dir, Some("one"));
        img(dir, &["resize", "-q", "-f", "qcow2", "--shrink", "a.qcow2", other]).unwrap();
        assert!(read_all(&open(dir, false, Some("one"))) == whole, "{shape} {other}");
        std::fs::copy(dir.join("a.qcow2"), dir.join("b.qcow2")).unwrap();
        open(dir, true, None).apply_snapshot(&SnapshotRef::Name("one".into())).unwrap();
        assert!(theirs(dir, None) == whole);
        same(dir, &["one"], shape);
        std::fs::copy(dir.join("b.qcow2"), dir.join("a.qcow2")).unwrap();
        img(dir, &["snapshot", "-a", "one", "a.qcow2"]).unwrap();
        same(dir, &["one"], shape);
        let disk = open(dir, true, None);
        disk.resize(30 << 20, false).unwrap();
        disk.resize(9 << 10, true).unwrap();
        drop(disk);
        assert_clean(dir, "a.qcow2", shape);
        assert!(read_all(&open(dir, false, Some("one"))) == whole, "{shape} {other}: after a resize");
    }
}

/// VM state lies past the end of the disk. Applying brings it back, as in QEMU; the next snapshot keeps it.
#[test]
fn vm_state_comes_back_with_its_snapshot() {
    if !have("vm_state_comes_back_with_its_snapshot", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for shape in [
        "cluster_size=512",
        "cluster_size=512,compat=0.10",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
    ] {
        make(dir, shape);
        img(dir, &["snapshot", "-c", "empty", "a.qcow2"]).unwrap();
        io(dir, "a.qcow2", &["write -b -P 17 0 70k"]).unwrap();
        img(dir, &["snapshot", "-c", "state", "a.qcow2"]).unwrap();
        open(dir, true, None).apply_snapshot(&SnapshotRef::Name("empty".into())).unwrap();
        io(dir, "a.qcow2", &["read -b -P 0 0 70k"]).unwrap();
        let disk = open(dir, true, None);
        disk.apply_snapshot(&SnapshotRef::Name("state".into())).unwrap();
        disk.create_snapshot(&NewSnapshot::new("again")).unwrap();
        disk.delete_snapshot(&SnapshotRef::Name("state".into())).unwrap();
        disk.apply_snapshot(&SnapshotRef::Name("again".into())).unwrap();
        // Nothing of it is what a shrink has left.
        if !shape.contains("0.10") {
            disk.resize(disk.len(), true).unwrap();
        }
        drop(disk);
        io(dir, "a.qcow2", &["read -b -P 17 0 70k"]).unwrap();
        same(dir, &["empty", "again"], shape);
        // No guest ever reads it.
        if !shape.contains("0.10") {
            let disk = open(dir, true, None);
            disk.resize(40 << 20, false).unwrap();
            let mut grown = vec![1; 37 << 20];
            disk.read_at(&mut grown, 3 << 20).unwrap();
            assert!(grown.iter().all(|byte| *byte == 0), "{shape}");
            drop(disk);
            assert_clean(dir, "a.qcow2", shape);
        }
    }
}
