//! A target overlay whose backing file is not attached while it is filled (the sixth way to get a mirror wrong): its
//! clusters are larger than what is copied, and the rest of each must come from the source's chain, not from nowhere.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_mirror::{CowTarget, MirrorJob, MirrorOptions, SyncMode};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

const SIZE: u64 = (6 << 20) + 512;

fn base() -> Arc<dyn BlockDevice> {
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 | 1).collect();
    Arc::new(MemoryDisk::with_contents(&bytes))
}

fn overlay(cluster_size: u64, extended_l2: bool) -> Arc<MemoryStorage> {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    options.extended_l2 = extended_l2;
    options.backing_file = Some(b"base.raw".to_vec());
    options.backing_format = Some("raw".into());
    let storage = Arc::new(MemoryStorage::new());
    options.create(&*storage, None).unwrap();
    storage
}

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.len()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A source overlay with one sector written, some zeros and some data at the end.
fn source(cluster_size: u64) -> Arc<Qcow2> {
    let disk = OpenOptions::new().writable(true).backing(base()).open(overlay(cluster_size, false)).unwrap();
    disk.write_at(&[0xaa; 512], (1 << 20) + 4608, WriteFlags::NONE).unwrap();
    disk.write_zeroes(ByteRange::at((3 << 20) + 1024, 70_000), ZeroFlags::MAY_UNMAP).unwrap();
    disk.write_at(&[0xbb; 700], SIZE - 700, WriteFlags::NONE).unwrap();
    Arc::new(disk)
}

fn fill(cluster_size: u64, extended_l2: bool, sync: SyncMode, granularity: u64) {
    let source = source(4096);
    let storage = overlay(cluster_size, extended_l2);
    let target = Arc::new(OpenOptions::new().writable(true).open(storage.clone()).unwrap());
    let cow = Arc::new(CowTarget::new(target, source.clone()));
    let options = MirrorOptions::new().sync(sync).granularity(granularity);
    MirrorJob::start(source.clone(), cow, options).unwrap().wait().unwrap();
    // Now, as at the pivot, with the backing file.
    let target = OpenOptions::new().backing(base()).open(storage).unwrap();
    let (found, wanted) = (contents(&target), contents(&*source));
    let differs = (0..found.len()).find(|&at| found[at] != wanted[at]);
    assert_eq!(
        differs, None,
        "clusters of {cluster_size}, {sync:?}, granularity {granularity}: first different byte"
    );
}

#[test]
fn the_rest_of_a_cluster_comes_from_the_source() {
    for sync in [SyncMode::Top, SyncMode::Full] {
        for granularity in [512, 65536, 64 << 20] {
            fill(2 << 20, false, sync, granularity);
            fill(1 << 20, false, sync, granularity);
            fill(64 << 10, true, sync, granularity);
            fill(4096, false, sync, granularity);
        }
    }
}
