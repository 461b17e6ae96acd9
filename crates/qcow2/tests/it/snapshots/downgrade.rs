//! Version 2 for images whose snapshots have clusters that are marked as zero, which it cannot say.

use std::ops::ControlFlow;
use std::sync::Arc;

use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{
    AmendOptions, CreateOptions, Header, NewSnapshot, OpenOptions, Result, Version, amend,
};

use super::{check_for_damage, id, read_all};
use crate::common::{backing_disk, qemu_check_finds_nothing};

const SIZE: u64 = 64 << 10;

/// Zeros that one snapshot has, that two share, and that the disk has too.
fn sample(cluster_size: u64, backed: bool) -> (Vec<u8>, OpenOptions) {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    let mut open = OpenOptions::new();
    if backed {
        options.backing_file = Some(b"base.raw".to_vec());
        options.backing_format = Some("raw".to_owned());
        open = open.backing(backing_disk(SIZE));
    }
    options.create(&*storage, None).unwrap();
    let disk = open.clone().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[0x11; 30_000], 1000, WriteFlags::NONE).unwrap();
    disk.write_zeroes(ByteRange::at(4096, 8192), ZeroFlags::NONE).unwrap();
    disk.write_zeroes(ByteRange::at(40 << 10, 8192), ZeroFlags::MAY_UNMAP).unwrap();
    disk.create_snapshot(&NewSnapshot::new("a")).unwrap();
    disk.write_zeroes(ByteRange::at(16 << 10, 8192), ZeroFlags::NONE).unwrap();
    disk.create_snapshot(&NewSnapshot::new("b")).unwrap();
    disk.write_at(&[0x22; 9000], 5000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    (storage.to_vec(), open)
}

fn to_version_2(storage: Arc<dyn Storage>, open: &OpenOptions) -> Result<()> {
    let mut options = AmendOptions::default();
    options.version = Some(Version::V2);
    amend(storage, open, &options, &mut |_, _| ControlFlow::Continue(()))
}

/// What the disk and both snapshots show.
fn shown(storage: &Arc<MemoryStorage>, open: &OpenOptions) -> Vec<Vec<u8>> {
    let of = |snapshot| read_all(&open.clone().snapshot(snapshot).open(storage.clone()).unwrap());
    vec![of(None), of(Some(id("1"))), of(Some(id("2")))]
}

#[test]
fn what_snapshots_show_stays() {
    for (cluster_size, backed) in [(512, false), (512, true), (4096, true), (4096, false)] {
        let what = format!("clusters {cluster_size}, backed {backed}");
        let (bytes, open) = sample(cluster_size, backed);
        let storage = Arc::new(MemoryStorage::with_contents(&bytes));
        let before = shown(&storage, &open);
        to_version_2(storage.clone(), &open).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(Header::read(&*storage).unwrap().version, 2, "{what}");
        assert!(shown(&storage, &open) == before, "{what}");
        let report = check_for_damage(&*storage, &what);
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{what}");
        if !backed {
            qemu_check_finds_nothing(&storage.to_vec(), &what);
        }
        // The places of the zeros have the references that they should.
        for snapshot in ["1", "2"] {
            open.clone()
                .writable(true)
                .open(storage.clone())
                .unwrap()
                .delete_snapshot(&id(snapshot))
                .unwrap();
        }
        let report = check_for_damage(&*storage, &what);
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{what}: without snapshots");
    }
}

#[test]
fn a_crash_changes_nothing_that_is_shown() {
    let mut points = 0;
    for backed in [false, true] {
        let (bytes, open) = sample(512, backed);
        let before = shown(&Arc::new(MemoryStorage::with_contents(&bytes)), &open);
        let recording = Arc::new(RecordingStorage::with_contents(&bytes));
        to_version_2(recording.clone(), &open).unwrap();
        for (nth, point) in recording.crash_points().enumerate() {
            points += 1;
            let storage = Arc::new(point.storage());
            check_for_damage(&*storage, &format_args!("backed {backed} {point:?}"));
            assert!(shown(&storage, &open) == before, "backed {backed} {point:?}");
            if nth % 16 == 0 {
                to_version_2(storage.clone(), &open).unwrap();
                assert!(shown(&storage, &open) == before, "again: backed {backed} {point:?}");
            }
        }
    }
    assert!(points > 50, "only {points} points");
}

#[test]
fn a_failure_changes_nothing_that_is_shown() {
    let (bytes, open) = sample(512, true);
    let before = shown(&Arc::new(MemoryStorage::with_contents(&bytes)), &open);
    for (kind, done) in
        [(ErrorKind::Io, Done::Nothing), (ErrorKind::Io, Done::Half), (ErrorKind::NoSpace, Done::Nothing)]
    {
        for n in 0.. {
            let what = format!("{kind:?} {done:?} n={n}");
            let inner = Arc::new(MemoryStorage::with_contents(&bytes));
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
            faults.inject(Fault::on(OpKind::Any).after(n).with(kind).having_done(done));
            let amended = to_version_2(storage, &open);
            if faults.failed() == 0 {
                amended.unwrap();
                break;
            }
            check_for_damage(&*inner, &what);
            assert!(shown(&inner, &open) == before, "{what}");
            to_version_2(inner.clone(), &open).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(shown(&inner, &open) == before, "{what}: again");
        }
    }
}
