//! Whenever the power fails: each snapshot that is listed reads as when it was taken, none is half listed, no
//! refcount is too low, and no entry has COPIED whose cluster is shared.

use std::sync::Arc;

use blockmirror_block::testing::RecordingStorage;
use blockmirror_block::{BlockDevice, Storage, WriteFlags};
use blockmirror_qcow2::{NewSnapshot, OpenOptions, Qcow2, Repair, repair};

use super::{Model, check_for_damage, id, image, read_all};

const SIZE: u64 = 40 * 1024;

type Step = fn(&Qcow2, &mut Model);

fn write(disk: &Qcow2, model: &mut Model, at: u64, len: usize, byte: u8) {
    disk.write_at(&vec![byte; len], at, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    model.disk[at as usize..at as usize + len].fill(byte);
}

fn create(disk: &Qcow2, model: &mut Model, name: &str) {
    disk.create_snapshot(&NewSnapshot::new(name).id(name)).unwrap();
    model.snapshots.push((name.into(), model.disk.clone()));
}

fn delete(disk: &Qcow2, model: &mut Model, name: &str) {
    disk.delete_snapshot(&id(name)).unwrap();
    model.snapshots.retain(|(id, _)| id != name);
}

fn apply(disk: &Qcow2, model: &mut Model, name: &str) {
    disk.apply_snapshot(&id(name)).unwrap();
    let (_, bytes) = model.snapshots.iter().find(|(id, _)| id == name).unwrap();
    model.disk = bytes.clone();
}

const STEPS: &[(&str, Step)] = &[
    ("create", |disk, model| create(disk, model, "a")),
    ("write", |disk, model| write(disk, model, 300, 2000, 2)),
    ("create more", |disk, model| create(disk, model, "b")),
    ("write far", |disk, model| write(disk, model, 37_000, 1000, 3)),
    ("apply", |disk, model| apply(disk, model, "a")),
    ("write again", |disk, model| write(disk, model, 0, 700, 4)),
    ("grow", |disk, model| {
        disk.resize(70 * 1024, false).unwrap();
        model.disk.resize(70 * 1024, 0);
    }),
    ("create long", |disk, model| create(disk, model, "c")),
    ("delete", |disk, model| delete(disk, model, "a")),
    ("apply short", |disk, model| apply(disk, model, "b")),
    ("shrink", |disk, model| {
        disk.resize(20 * 1024, true).unwrap();
        model.disk.truncate(20 * 1024);
    }),
    ("apply long", |disk, model| apply(disk, model, "c")),
    ("delete more", |disk, model| delete(disk, model, "c")),
    ("write at last", |disk, model| write(disk, model, 5000, 600, 5)),
    ("delete the last", |disk, model| delete(disk, model, "b")),
];

/// Whether what `storage` holds is `model`.
fn is(storage: &Arc<dyn Storage>, disk: &Qcow2, listed: &[String], model: &Model) -> bool {
    let names: Vec<_> = model.snapshots.iter().map(|(id, _)| id).collect();
    let snapshot = |name: &str| {
        let options = OpenOptions::new().snapshot(id(name));
        read_all(&options.open(Arc::clone(storage)).unwrap())
    };
    listed.iter().eq(names)
        && read_all(disk) == model.disk
        && model.snapshots.iter().all(|(name, bytes)| snapshot(name) == *bytes)
}

#[test]
fn every_point_leaves_the_disk_and_its_snapshots_whole() {
    let mut start = image(SIZE, |_| ());
    let mut model = Model { disk: vec![0; SIZE as usize], snapshots: Vec::new() };
    let mut points = 0;
    for (name, change) in STEPS {
        let recording = Arc::new(RecordingStorage::with_contents(&start));
        let disk = OpenOptions::new().writable(true).open(recording.clone()).unwrap();
        let before = model.clone();
        if before.snapshots.is_empty() {
            write(&disk, &mut model, 0, 5000, 1);
            write(&disk, &mut model, 36_000, 4096, 6);
        }
        let (written, first) = (model.clone(), recording.position());
        change(&disk, &mut model);
        drop(disk);
        for (number, point) in recording.crash_points().enumerate() {
            if point.position() < first {
                continue;
            }
            points += 1;
            let what = format!("{name}: {point}");
            let storage: Arc<dyn Storage> = Arc::new(point.storage());
            let after = OpenOptions::new().writable(true).open(Arc::clone(&storage)).unwrap();
            let listed: Vec<_> = after.snapshots().unwrap().into_iter().map(|s| s.id).collect();
            // A write that was not flushed may be there in part.
            let is_change_of_data = name.starts_with("write");
            let mut found = if is_change_of_data {
                written.clone()
            } else {
                let found = [&written, &model].into_iter().find(|model| is(&storage, &after, &listed, model));
                found.unwrap_or_else(|| panic!("{what}: listed {listed:?}")).clone()
            };
            check_for_damage(&*storage, &what);
            if number % 5 == 0 {
                // The disk goes on, without harm to snapshots that it shares clusters with.
                after.write_at(&[9; 3000], 100, WriteFlags::FUA).unwrap();
                drop(after);
                found.disk = read_all(&open(&storage));
                assert!(is(&storage, &open(&storage), &listed, &found), "{what}: after a write");
                check_for_damage(&*storage, &what);
                let report = repair(&*storage, Repair::All, &mut ()).unwrap();
                assert!(report.is_clean(), "{what}: {report:?}");
                assert!(is(&storage, &open(&storage), &listed, &found), "{what}: after a repair");
            }
        }
        start = recording.to_vec();
    }
    assert!(points > 300, "{points}");
}

fn open(storage: &Arc<dyn Storage>) -> Qcow2 {
    OpenOptions::new().open(Arc::clone(storage)).unwrap()
}
