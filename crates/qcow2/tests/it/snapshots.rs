//! Internal snapshots: random operations against a model, with QEMU's opinion; crashes; failures; refusals.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod crash;
mod downgrade;
mod faults;
mod limits;
mod qemu;

use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{
    CheckReport, CreateOptions, Finding, NewSnapshot, OpenOptions, Qcow2, SnapshotRef, Version, check,
};

use crate::common::{backing_disk, qemu_check_finds_nothing};

/// A disk and its snapshots as they should be.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn range(&mut self, len: u64, most: u64) -> ByteRange {
        let start = self.below(len);
        ByteRange::at(start, 1 + self.below(most.min(len - start)))
    }
}

fn id(text: &str) -> SnapshotRef {
    SnapshotRef::Id(text.into())
}

fn image(size: u64, change: impl FnOnce(&mut CreateOptions)) -> Vec<u8> {
    let storage = MemoryStorage::new();
    let mut options = CreateOptions::new(size);
    options.cluster_size = 512;
    change(&mut options);
    options.create(&storage, None).unwrap();
    storage.to_vec()
}

fn read_all(disk: &Qcow2) -> Vec<u8> {
    let mut bytes = vec![0; disk.len() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Counts the findings of a check that a crash may not leave: all but leaks and flags that are clear.
#[derive(Default)]
struct Damage(Vec<String>);

impl blockmirror_qcow2::CheckObserver for Damage {
    fn found(&mut self, finding: &Finding, _: u64) {
        if !matches!(finding, Finding::Leak { .. } | Finding::CopiedWrong { copied: false, .. }) {
            self.0.push(finding.to_string());
        }
    }
}

/// What a check finds; fails where it is neither a leak nor a flag that is clear.
fn check_for_damage(storage: &dyn Storage, what: &dyn std::fmt::Display) -> CheckReport {
    let mut damage = Damage::default();
    let report = check(storage, &mut damage).unwrap();
    assert!(damage.0.is_empty(), "{what}: {:?}", damage.0);
    report
}

/// Holds the image in `storage` against `model`, snapshots included.
fn compare(storage: &Arc<dyn Storage>, backing: Option<&Arc<dyn BlockDevice>>, model: &Model, what: &str) {
    let open = |snapshot: Option<SnapshotRef>| {
        let mut options = OpenOptions::new().snapshot(snapshot);
        if let Some(backing) = backing {
            options = options.backing(Arc::clone(backing));
        }
        options.open(Arc::clone(storage)).unwrap()
    };
    let disk = open(None);
    let listed: Vec<String> = disk.snapshots().unwrap().into_iter().map(|s| s.id).collect();
    let wanted: Vec<&str> = model.snapshots.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(listed, wanted, "{what}");
    assert!(read_all(&disk) == model.disk, "{what}: the disk differs");
    for (name, bytes) in &model.snapshots {
        assert!(read_all(&open(Some(id(name)))) == *bytes, "{what}: snapshot {name} differs");
    }
}

/// One random change of the disk, or of its snapshots.
fn step(disk: &Qcow2, model: &mut Model, random: &mut Random, next_id: &mut u32, resizes: bool) {
    let len = model.disk.len() as u64;
    let some = |random: &mut Random, model: &Model| random.below(model.snapshots.len() as u64) as usize;
    match random.below(16) {
        0..=5 => {
            let range = random.range(len, 6000);
            let bytes = vec![random.below(255) as u8 + 1; range.len() as usize];
            disk.write_at(&bytes, range.start(), WriteFlags::NONE).unwrap();
            model.disk[range.start() as usize..range.end() as usize].copy_from_slice(&bytes);
        }
        6 | 7 => {
            let range = random.range(len, 20_000);
            let flags = if random.below(2) == 0 { ZeroFlags::NONE } else { ZeroFlags::MAY_UNMAP };
            disk.write_zeroes(range, flags).unwrap();
            model.disk[range.start() as usize..range.end() as usize].fill(0);
        }
        8 => {
            let range = random.range(len, 20_000);
            disk.discard(range).unwrap();
            let part = range.start() as usize..range.end() as usize;
            disk.read_at(&mut model.disk[part], range.start()).unwrap();
        }
        9 => disk.flush().unwrap(),
        10 | 11 if model.snapshots.len() < 5 => {
            let new = next_id.to_string();
            *next_id += 1;
            disk.create_snapshot(&NewSnapshot::new("twice").id(new.as_str())).unwrap();
            model.snapshots.push((new, model.disk.clone()));
        }
        12 | 13 if !model.snapshots.is_empty() => {
            let (gone, _) = model.snapshots.remove(some(random, model));
            assert_eq!(disk.delete_snapshot(&id(&gone)).unwrap().id, gone);
        }
        14 if !model.snapshots.is_empty() => {
            let (chosen, bytes) = model.snapshots[some(random, model)].clone();
            disk.apply_snapshot(&id(&chosen)).unwrap();
            model.disk = bytes;
        }
        15 if resizes => {
            let new = 512 * (1 + random.below(400));
            disk.resize(new, true).unwrap();
            model.disk.resize(new as usize, 0);
        }
        _ => {}
    }
}

fn follows_the_model(version: Version, backed: bool, seed: u64, change: impl Fn(&mut CreateOptions)) {
    const SIZE: u64 = 100 * 1024;
    let start = image(SIZE, |options| {
        options.version = version;
        change(options);
    });
    let backing = backed.then(|| backing_disk(60_000));
    let storage = Arc::new(MemoryStorage::with_contents(&start));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let open = || {
        let mut options = OpenOptions::new().writable(true);
        if seed.is_multiple_of(2) {
            options = options.cache_bytes(0);
        }
        if let Some(backing) = &backing {
            options = options.backing(Arc::clone(backing));
        }
        options.open(Arc::clone(&dynamic)).unwrap()
    };
    let mut random = Random(seed);
    let mut model = Model { disk: read_all(&open()), snapshots: Vec::new() };
    let (mut disk, mut next_id) = (open(), 1);
    for round in 0..120 {
        let what = format!("{version:?}, backed {backed}, seed {seed}, round {round}");
        // What lies past the end of a backing file is not the model's.
        step(&disk, &mut model, &mut random, &mut next_id, version == Version::V3 && !backed);
        if round % 6 == 5 {
            disk.flush().unwrap();
            compare(&dynamic, backing.as_ref(), &model, &what);
            let report = check(&*storage, &mut ()).unwrap();
            assert!(report.is_clean(), "{what}: {report:?}");
            match round % 5 {
                0 => disk = open(),
                1 => disk = disk.reopen().unwrap(),
                _ => {}
            }
        }
    }
    for (gone, _) in std::mem::take(&mut model.snapshots) {
        disk.delete_snapshot(&id(&gone)).unwrap();
    }
    disk.flush().unwrap();
    compare(&dynamic, backing.as_ref(), &model, "at the end");
    qemu_check_finds_nothing(&storage.to_vec(), &format!("{version:?}, backed {backed}, seed {seed}"));
}

#[test]
fn random_operations_follow_a_model() {
    for seed in 0..12 {
        follows_the_model(Version::V3, seed % 3 == 2, seed, |_| ());
        follows_the_model(Version::V2, seed % 3 == 1, seed, |_| ());
    }
}

#[test]
fn random_operations_follow_a_model_with_subclusters() {
    for seed in 0..6 {
        follows_the_model(Version::V3, seed % 3 == 2, seed, |options| {
            (options.cluster_size, options.extended_l2) = (16_384, true);
        });
    }
}

/// Five snapshots and the disk are six references: three bits.
#[test]
fn random_operations_follow_a_model_with_refcounts_of_each_width() {
    for (seed, bits) in [4, 8, 16, 32, 64].into_iter().enumerate() {
        follows_the_model(Version::V3, false, seed as u64, |options| options.refcount_bits = bits);
    }
}
