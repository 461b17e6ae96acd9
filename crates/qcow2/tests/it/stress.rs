//! Many threads on one image: neighbours within a cluster, whole clusters that come and go, flushes in
//! between. Each thread owns its bytes and knows what they must be; at the end the image holds all of them
//! and nothing leaks.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::common::{backing_disk, qemu_check_finds_no_corruption};
use blockmirror_block::testing::{FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

const THREADS: u64 = 4;
const SECTOR: u64 = 1024;
/// Below this the threads' sectors interleave; above, each owns whole stretches.
const SHARED: u64 = 256 << 10;
const OWN: u64 = 256 << 10;
const SIZE: u64 = SHARED + THREADS * OWN;

/// A small linear generator: the test only needs variety, and the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

fn owned_sector(thread: u64, dice: &mut Dice) -> ByteRange {
    let slot = dice.roll(SHARED / SECTOR / THREADS);
    ByteRange::at((slot * THREADS + thread) * SECTOR, SECTOR)
}

fn owned_stretch(thread: u64, dice: &mut Dice) -> ByteRange {
    let base = SHARED + thread * OWN;
    let start = dice.roll(OWN);
    let len = 1 + dice.roll(64 << 10);
    ByteRange::new(base + start, (base + start + len).min(base + OWN))
}

fn work(disk: &Qcow2, thread: u64, model: &mut [u8], rounds: u32) {
    let mut dice = Dice(thread + 1);
    for round in 0..rounds {
        let range = if dice.roll(2) == 0 {
            owned_sector(thread, &mut dice)
        } else {
            owned_stretch(thread, &mut dice)
        };
        let span = range.start() as usize..range.end() as usize;
        match dice.roll(7) {
            0..=2 => {
                let byte = (round as u8) | 1;
                disk.write_at(&vec![byte; span.len()], range.start(), WriteFlags::NONE).unwrap();
                model[span].fill(byte);
            }
            3 => {
                disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap();
                model[span].fill(0);
            }
            4 => {
                disk.discard(range).unwrap();
                disk.read_at(&mut model[span], range.start()).unwrap();
            }
            5 => {
                // Others may write there at the same time.
                disk.copy_up(ByteRange::at(dice.roll(SIZE - 5000), 5000), u32::MAX).unwrap();
            }
            _ => {
                let mut found = vec![0; span.len()];
                disk.read_at(&mut found, range.start()).unwrap();
                assert!(found == model[span], "thread {thread}, round {round}: {range:?} differs");
            }
        }
        if dice.roll(50) == 0 {
            disk.flush().unwrap();
        }
    }
}

fn stress(cluster_size: u64, extended: bool, backed: bool) {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    options.extended_l2 = extended;
    options.create(&*storage, None).unwrap();
    let mut options = OpenOptions::new().writable(true).cache_bytes(0);
    if backed {
        options = options.backing(backing_disk(SIZE));
    }
    let disk = options.clone().open(storage.clone()).unwrap();
    let mut start = vec![0; SIZE as usize];
    disk.read_at(&mut start, 0).unwrap();
    let done = AtomicBool::new(false);
    let models: Vec<Vec<u8>> = thread::scope(|s| {
        let workers: Vec<_> = (0..THREADS)
            .map(|t| {
                let (disk, mut model) = (&disk, start.clone());
                s.spawn(move || {
                    work(disk, t, &mut model, 1500);
                    model
                })
            })
            .collect();
        let (disk, done) = (&disk, &done);
        s.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                disk.flush().unwrap();
                thread::yield_now();
            }
        });
        let models = workers.into_iter().map(|w| w.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        models
    });
    disk.flush().unwrap();
    drop(disk);
    let disk = options.open(storage.clone()).unwrap();
    let mut found = vec![0; SIZE as usize];
    disk.read_at(&mut found, 0).unwrap();
    for (at, byte) in found.iter().enumerate() {
        let owner =
            if (at as u64) < SHARED { at as u64 / SECTOR % THREADS } else { (at as u64 - SHARED) / OWN };
        assert_eq!(*byte, models[owner as usize][at], "byte {at} of thread {owner}");
    }
    drop(disk);
    qemu_check_finds_no_corruption(&storage.to_vec(), "after stress");
}

#[test]
fn threads_share_small_clusters() {
    stress(4096, false, false);
}

#[test]
fn threads_share_large_clusters_over_a_backing_disk() {
    stress(65536, false, true);
}

#[test]
fn threads_share_subclusters() {
    stress(16384, true, true);
}

/// No allocating write waits until another one has written its data.
#[test]
fn allocating_writes_move_their_data_at_once() {
    const CLUSTER: u64 = 64 << 10;
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(16 * CLUSTER).create(&*storage, None).unwrap();
    let faults = Faults::new();
    let held = Arc::new(FaultStorage::new(storage, faults.clone()));
    let disk = OpenOptions::new().writable(true).open(held).unwrap();
    // The L2 table is made, so that all that is written from now on is data.
    disk.write_at(&[1; 512], 0, WriteFlags::FUA).unwrap();
    let gate = faults.hold(OpKind::Write, None);
    thread::scope(|scope| {
        for thread in 1..=THREADS {
            let disk = &disk;
            scope.spawn(move || {
                disk.write_at(&[7; CLUSTER as usize], thread * CLUSTER, WriteFlags::NONE).unwrap();
            });
        }
        gate.wait_held(THREADS as usize);
        gate.open();
    });
    let mut found = vec![0; (THREADS * CLUSTER) as usize];
    disk.read_at(&mut found, CLUSTER).unwrap();
    assert!(found.iter().all(|byte| *byte == 7));
}
