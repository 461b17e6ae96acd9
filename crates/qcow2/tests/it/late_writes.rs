//! Data, or a table, that nothing points at yet and whose write has failed: the operation fails, and may be
//! tried again. Over a network the failed write may still reach the disk, so that its place is not used any
//! more, unless the write was refused, or there was no room for it. So it is of freed clusters whose discard
//! has failed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use crate::common::qemu_check_finds_nothing;
use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, Logged, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Result, WriteFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

fn written(entry: &Logged) -> Option<ByteRange> {
    match entry {
        Logged::Write { offset, data } => Some(ByteRange::at(*offset, data.len() as u64)),
        _ => None,
    }
}

const ANYWHERE: ByteRange = ByteRange::new(0, u64::MAX);

/// The first write of `change` within `place`, in an image with clusters of 512 bytes, fails with each kind
/// of error although it was done.
fn first_write_fails(place: ByteRange, change: fn(&Qcow2) -> Result<()>) {
    first_write_fails_after(|_| Ok(()), place, change);
}

/// The same in an image that was prepared.
fn first_write_fails_after(
    prepare: fn(&Qcow2) -> Result<()>,
    place: ByteRange,
    change: fn(&Qcow2) -> Result<()>,
) {
    let refused = |kind| Fault::on(OpKind::Write).with(kind).refused();
    for (fault, kind, is_late) in [
        (Fault::on(OpKind::Write), ErrorKind::Io, true),
        (Fault::on(OpKind::Write).with(ErrorKind::Cancelled), ErrorKind::Cancelled, true),
        (Fault::on(OpKind::Write).with(ErrorKind::NoSpace), ErrorKind::NoSpace, false),
        // The answer of a server, which cost space until the image was opened anew.
        (refused(ErrorKind::ReadOnly), ErrorKind::ReadOnly, false),
    ] {
        let empty = MemoryStorage::new();
        let mut options = CreateOptions::new(1 << 20);
        (options.cluster_size, options.refcount_bits) = (512, 64);
        options.create(&empty, None).unwrap();
        let recording = Arc::new(RecordingStorage::with_contents(&empty.to_vec()));
        let faults = Faults::new();
        let faulty = Arc::new(FaultStorage::new(recording.clone(), faults.clone()));
        let disk = OpenOptions::new().writable(true).open(faulty).unwrap();
        prepare(&disk).unwrap();
        faults.inject(fault.within(place).having_done(Done::Everything));
        assert_eq!(change(&disk).unwrap_err().kind(), kind);
        assert!(!disk.is_poisoned());
        let failed = recording.log().last().and_then(written).unwrap();
        assert!(failed.overlaps(place));
        let position = recording.position();
        change(&disk).unwrap();
        disk.flush().unwrap();
        let mut later = recording.log().into_iter().skip(position);
        let used = later.any(|entry| written(&entry).is_some_and(|range| range.overlaps(failed)));
        assert_eq!(used, !is_late, "{kind:?}: {failed:?}");
        qemu_check_finds_nothing(&recording.to_vec(), "a write failed");
    }
}

#[test]
fn of_a_new_l2_table() {
    first_write_fails(ANYWHERE, |disk| disk.write_at(&[1; 512], 0, WriteFlags::NONE));
}

#[test]
fn of_a_new_refcount_block() {
    // A block counts 64 clusters, and lies at the first of them.
    let block = ByteRange::at(64 * 512, 512);
    first_write_fails(block, |disk| disk.write_at(&[1; 65_536], 0, WriteFlags::NONE));
}

#[test]
fn of_a_longer_l1_table() {
    // Behind the refcount blocks that are added for it: the table does not fit into what one block counts.
    let table = ByteRange::new(128 * 512, u64::MAX);
    first_write_fails(table, |disk| disk.resize(1 << 28, false));
}

fn write_first_cluster(disk: &Qcow2) -> Result<()> {
    disk.write_at(&[1; 512], 0, WriteFlags::NONE)
}

#[test]
fn of_new_data() {
    let change = |disk: &Qcow2| disk.write_at(&[2; 512], 512, WriteFlags::NONE);
    first_write_fails_after(write_first_cluster, ANYWHERE, change);
}

/// The write of the bytes around the data comes first.
#[test]
fn of_the_edges_of_new_data() {
    let prepare = |disk: &Qcow2| {
        // The cluster's new place was used before, so that zeros must be written there.
        write_first_cluster(disk)?;
        disk.write_at(&[2; 512], 512, WriteFlags::NONE)?;
        disk.discard(ByteRange::at(512, 512))?;
        disk.flush()
    };
    first_write_fails_after(prepare, ANYWHERE, |disk| disk.write_at(&[3; 10], 1100, WriteFlags::NONE));
}

/// What the guest discards is given back to the host, which may be done late as well.
#[test]
fn a_place_whose_discard_has_failed_is_not_used() {
    for (kind, is_used) in [(ErrorKind::Io, false), (ErrorKind::Unsupported, true)] {
        let empty = MemoryStorage::new();
        CreateOptions::new(1 << 20).create(&empty, None).unwrap();
        let recording = Arc::new(RecordingStorage::with_contents(&empty.to_vec()));
        let faults = Faults::new();
        let faulty = Arc::new(FaultStorage::new(recording.clone(), faults.clone()));
        let disk = OpenOptions::new().writable(true).open(faulty).unwrap();
        write_first_cluster(&disk).unwrap();
        let place = recording.log().last().and_then(written).unwrap();
        disk.flush().unwrap();
        faults.inject(Fault::on(OpKind::Discard).with(kind));
        disk.discard(ByteRange::at(0, 65_536)).unwrap();
        disk.flush().unwrap();
        let position = recording.position();
        disk.write_at(&[2; 65_536], 65_536, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        let mut later = recording.log().into_iter().skip(position);
        let used = later.any(|entry| written(&entry).is_some_and(|range| range.overlaps(place)));
        assert_eq!(used, is_used, "{kind:?}");
        qemu_check_finds_nothing(&recording.to_vec(), "a discard failed");
    }
}

/// The places whose discard had failed were handed out again if the refcounts could not all be lowered.
#[test]
fn a_place_whose_discard_has_failed_is_not_used_where_refcounts_cannot_be_lowered_either() {
    /// What an L2 table maps, and a refcount block counts; how many there are, more than the smallest cache
    /// holds.
    const TABLE: u64 = 64 * 512;
    const TABLES: u64 = 24;
    let empty = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(TABLES * TABLE);
    (options.cluster_size, options.refcount_bits) = (512, 64);
    options.create(&*empty, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(Arc::clone(&empty) as _).unwrap();
    // The clusters of each table lie in all of the file.
    for cluster in (0..TABLE).step_by(512) {
        for table in 0..TABLES {
            disk.write_at(&[1; 512], table * TABLE + cluster, WriteFlags::NONE).unwrap();
        }
    }
    disk.flush().unwrap();
    drop(disk);
    let mut failed = 0;
    for nth in 0.. {
        let recording = Arc::new(RecordingStorage::with_contents(&empty.to_vec()));
        let faults = Faults::new();
        let faulty = Arc::new(FaultStorage::new(recording.clone(), faults.clone()));
        let disk = OpenOptions::new().writable(true).cache_bytes(0).open(faulty).unwrap();
        faults.inject(Fault::on(OpKind::Discard).forever().having_done(Done::Everything));
        faults.inject(Fault::on(OpKind::Read).after(nth as u64));
        let reads = faults.seen(OpKind::Read);
        let position = recording.position();
        let discarded = disk.discard(ByteRange::at(0, 4 * TABLE)).and_then(|()| disk.flush());
        let zeroed = |entry| match entry {
            Logged::Zero(range) => Some(range),
            _ => None,
        };
        let places: Vec<_> = recording.log().into_iter().skip(position).filter_map(zeroed).collect();
        faults.heal();
        if faults.seen(OpKind::Read) - reads <= nth {
            break;
        }
        if discarded.is_ok() {
            continue;
        }
        let position = recording.position();
        if disk.write_at(&[2; TABLE as usize], 0, WriteFlags::NONE).is_err() {
            continue;
        }
        failed += usize::from(!places.is_empty());
        for write in recording.log().into_iter().skip(position).filter_map(|entry| written(&entry)) {
            let used = places.iter().any(|place| place.overlaps(write));
            assert!(!used, "read {nth}: {write:?} is used again");
        }
    }
    assert!(failed > 0);
}
