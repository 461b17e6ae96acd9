//! Allocation, copy-on-write and write-back under a model checker: `cargo xtask model` runs it.
//!
//! A few writers on an image of tiny clusters, so that they meet in clusters, in L2 tables and in refcount
//! blocks, with flushes in between.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a model that cannot go on has found something")]

use std::sync::Arc;

use blockmirror_block::sync::thread;
use blockmirror_block::testing::{MemoryDisk, MemoryStorage, RecordingStorage, explore};
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

const CLUSTER: u64 = 512;
const LEN: u64 = 8 * CLUSTER;

fn empty_image() -> MemoryStorage {
    let mut options = CreateOptions::new(LEN);
    options.cluster_size = CLUSTER;
    let storage = MemoryStorage::new();
    options.create(&storage, None).unwrap();
    storage
}

fn backing() -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDisk::with_contents(&[0xbb; LEN as usize]))
}

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    OpenOptions::new().writable(true).backing(backing()).open(storage).unwrap()
}

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Writers of one cluster and of its neighbours: each finds its bytes, and the bytes of the others unchanged.
#[test]
fn writers_who_meet_in_a_cluster_keep_each_others_bytes() {
    explore(|| {
        let storage = Arc::new(empty_image());
        let disk = Arc::new(open(storage.clone()));
        let plans = [
            [ByteRange::new(0, 100), ByteRange::new(1000, 1100)],
            [ByteRange::new(200, 300), ByteRange::new(500, 600)],
            [ByteRange::new(300, 500), ByteRange::new(1100, 2100)],
        ];
        let threads: Vec<_> = (1u8..)
            .zip(plans)
            .map(|(byte, plan)| {
                let disk = Arc::clone(&disk);
                thread::spawn(move || {
                    for range in plan {
                        let bytes = vec![byte; range.len() as usize];
                        disk.write_at(&bytes, range.start(), WriteFlags::NONE).unwrap();
                    }
                    if byte == 2 {
                        disk.flush().unwrap();
                    } else if byte == 3 {
                        disk.write_zeroes(ByteRange::at(6 * CLUSTER, CLUSTER), ZeroFlags::MAY_UNMAP).unwrap();
                        disk.discard(ByteRange::at(6 * CLUSTER, CLUSTER)).unwrap();
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let mut wanted = vec![0xbb; LEN as usize];
        for (byte, plan) in (1u8..).zip(plans) {
            for range in plan {
                wanted[range.start() as usize..range.end() as usize].fill(byte);
            }
        }
        wanted[6 * CLUSTER as usize..7 * CLUSTER as usize].fill(0);
        assert_eq!(contents(&*disk), wanted);
        disk.flush().unwrap();
        drop(disk);
        assert_eq!(contents(&open(storage)), wanted, "opened again");
    });
}

/// A writer whose flush was answered finds its bytes after any crash from then on, whatever others were
/// doing.
#[test]
fn a_flush_is_answered_when_what_came_before_it_is_durable() {
    explore(|| {
        let storage = Arc::new(RecordingStorage::with_contents(&empty_image().to_vec()));
        let disk = Arc::new(open(storage.clone()));
        let threads = [1u8, 2, 3].map(|byte| {
            let (disk, storage) = (Arc::clone(&disk), Arc::clone(&storage));
            thread::spawn(move || {
                let at = u64::from(byte) * 300;
                disk.write_at(&[byte; 200], at, WriteFlags::NONE).unwrap();
                if byte == 3 {
                    // A writer that keeps the image busy.
                    disk.write_at(&[byte; 200], 5 * CLUSTER, WriteFlags::NONE).unwrap();
                    return None;
                }
                disk.flush().unwrap();
                Some((storage.position(), at, byte))
            })
        });
        let answers: Vec<_> = threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect();
        let last = storage.position();
        for point in storage
            .crash_points()
            .filter(|point| [answers[0].0, answers[1].0, last].contains(&point.position()))
        {
            let image = contents(&open(Arc::new(point.storage())));
            for (answered, at, byte) in &answers {
                let found = &image[*at as usize..*at as usize + 200];
                assert!(point.position() < *answered || found == [*byte; 200], "lost by a crash");
            }
        }
    });
}
