//! What a copy-up takes from which layer, and that it never undoes a write.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::thread;

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, ExtentKind, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2, Version};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 65536;

fn overlay(version: Version, below: Arc<dyn BlockDevice>) -> Qcow2 {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    options.version = version;
    options.backing_file = Some(b"below".to_vec());
    options.create(&*storage, None).unwrap();
    OpenOptions::new().writable(true).backing(below).open(storage).unwrap()
}

/// A base full of ones; above it a layer with a cluster of twos, one of zeros by statement, one of zero
/// bytes.
fn middle() -> Arc<dyn BlockDevice> {
    let middle = overlay(Version::V3, Arc::new(MemoryDisk::with_contents(&vec![1; SIZE as usize])));
    middle.write_at(&[2; CLUSTER as usize], CLUSTER, WriteFlags::NONE).unwrap();
    middle.write_zeroes(ByteRange::at(2 * CLUSTER, CLUSTER), ZeroFlags::MAY_UNMAP).unwrap();
    middle.write_at(&[0; CLUSTER as usize], 3 * CLUSTER, WriteFlags::NONE).unwrap();
    Arc::new(middle)
}

fn kinds(disk: &Qcow2) -> Vec<(u64, ExtentKind, u32)> {
    let mut out = Vec::new();
    disk.extents(ByteRange::new(0, SIZE), &mut |e| {
        out.push((e.range.start() / CLUSTER, e.kind, e.depth));
        Visit::Continue(())
    })
    .unwrap();
    out
}

fn contents(disk: &Qcow2) -> Vec<u8> {
    let mut out = vec![0; SIZE as usize];
    disk.read_at(&mut out, 0).unwrap();
    out
}

#[test]
fn only_layers_in_reach_come_up_and_zeros_stay_zeros() {
    use ExtentKind::{Data, Zero};
    let top = overlay(Version::V3, middle());
    let before = contents(&top);
    assert_eq!(top.copy_up(ByteRange::new(0, SIZE), 0).unwrap(), 0);
    assert_eq!(top.copy_up(ByteRange::new(0, SIZE), 1).unwrap(), 3 * CLUSTER);
    assert_eq!(kinds(&top), [(0, Data, 2), (1, Data, 0), (2, Zero, 0), (4, Data, 2)]);
    assert_eq!(top.copy_up(ByteRange::at(5 * CLUSTER + 7, 1), 2).unwrap(), CLUSTER, "whole clusters");
    assert_eq!(top.copy_up(ByteRange::at(5 * CLUSTER + 7, 1), 2).unwrap(), 0, "it is there already");
    assert!(contents(&top) == before);
    assert!(top.copy_up(ByteRange::new(0, SIZE + 1), 1).is_err());
}

/// The layer in reach ends in the middle, the base does not: without the layer the base would show.
#[test]
fn where_a_layer_in_reach_ends_the_image_says_zero() {
    use ExtentKind::{Data, Unallocated, Zero};
    let base: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&vec![1; SIZE as usize]));
    let short =
        Arc::new(MemoryDisk::new(SIZE / 2 + 100).with_cluster_size(CLUSTER).with_backing(Arc::clone(&base)));
    let top = overlay(Version::V3, short);
    let before = contents(&top);
    assert_eq!(kinds(&top), [(0, Data, 2), (8, Unallocated, 0)]);
    assert_eq!(top.copy_up(ByteRange::new(0, SIZE), 1).unwrap(), SIZE / 2);
    assert_eq!(kinds(&top), [(0, Data, 2), (8, Data, 0), (9, Zero, 0)]);
    top.replace_backing(Some(base));
    assert!(contents(&top) == before);
}

#[test]
fn version_2_cannot_say_zero_and_writes_it() {
    use ExtentKind::Data;
    let top = overlay(Version::V2, middle());
    let before = contents(&top);
    assert_eq!(top.copy_up(ByteRange::new(0, SIZE), 1).unwrap(), 3 * CLUSTER);
    assert_eq!(kinds(&top), [(0, Data, 2), (1, Data, 0), (4, Data, 2)]);
    assert!(contents(&top) == before);
}

/// The guest writes while the copy has read the old bytes but not written them: its write waits and is then
/// done.
#[test]
fn a_write_during_the_copy_is_not_undone() {
    let faults = Faults::default();
    let base = Arc::new(MemoryDisk::with_contents(&vec![1; SIZE as usize]));
    let top = overlay(Version::V3, Arc::new(FaultDisk::new(base, faults.clone())));
    let gate = faults.hold(OpKind::Read, None);
    thread::scope(|s| {
        let copy = s.spawn(|| top.copy_up(ByteRange::at(0, CLUSTER), 1));
        gate.wait_held(1);
        let write = s.spawn(|| top.write_at(&[9; 512], 1024, WriteFlags::NONE));
        gate.open();
        assert_eq!(copy.join().unwrap().unwrap(), CLUSTER);
        write.join().unwrap().unwrap();
    });
    let mut want = vec![1; SIZE as usize];
    want[1024..1536].fill(9);
    assert!(contents(&top) == want);
}

#[test]
fn a_read_only_image_and_one_with_nothing_below() {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(SIZE).create(&*storage, None).unwrap();
    let disk = OpenOptions::new().open(storage.clone()).unwrap();
    assert_eq!(disk.copy_up(ByteRange::at(0, 1), 1).unwrap_err().kind(), ErrorKind::ReadOnly);
    let disk = OpenOptions::new().writable(true).open(storage).unwrap();
    assert_eq!(disk.copy_up(ByteRange::new(0, SIZE), u32::MAX).unwrap(), 0);
}
