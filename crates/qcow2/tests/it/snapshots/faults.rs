//! Every single storage operation fails in turn, through each operation on snapshots: a typed error, and what
//! is left opens with the disk and its snapshots as before or as after.

use std::sync::Arc;

use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ErrorKind, Storage, WriteFlags};
use blockmirror_qcow2::{NewSnapshot, OpenOptions, Qcow2};

use super::{Model, check_for_damage, compare, id, image, read_all};

const SIZE: u64 = 24 * 1024;

type Operation = fn(&Qcow2) -> blockmirror_qcow2::Result<()>;

const OPERATIONS: [(&str, Operation); 4] = [
    ("create", |disk| disk.create_snapshot(&NewSnapshot::new("new").id("new")).map(drop)),
    ("apply", |disk| disk.apply_snapshot(&id("long")).map(drop)),
    ("delete", |disk| disk.delete_snapshot(&id("first")).map(drop)),
    ("delete the other", |disk| disk.delete_snapshot(&id("long")).map(drop)),
];

/// A disk with two snapshots, of which one is of another length.
fn start() -> (Vec<u8>, Model) {
    let storage = Arc::new(MemoryStorage::with_contents(&image(SIZE, |_| ())));
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    let mut model = Model { disk: Vec::new(), snapshots: Vec::new() };
    for (name, at, len) in [("first", 0, SIZE), ("long", 3000, 2 * SIZE), ("", 20_000, SIZE)] {
        disk.resize(len, true).unwrap();
        disk.write_at(&vec![at as u8 + 1; 4000], at, WriteFlags::NONE).unwrap();
        if !name.is_empty() {
            disk.create_snapshot(&NewSnapshot::new(name).id(name)).unwrap();
            model.snapshots.push((name.into(), read_all(&disk)));
        }
    }
    disk.flush().unwrap();
    model.disk = read_all(&disk);
    (storage.to_vec(), model)
}

/// What the operation makes of `model`.
fn done(name: &str, model: &Model) -> Model {
    let mut model = model.clone();
    match name {
        "create" => model.snapshots.push(("new".into(), model.disk.clone())),
        "apply" => model.disk = model.snapshots[1].1.clone(),
        "delete" => drop(model.snapshots.remove(0)),
        _ => drop(model.snapshots.remove(1)),
    }
    model
}

fn read_model(storage: &Arc<dyn Storage>) -> Model {
    let disk = OpenOptions::new().open(Arc::clone(storage)).unwrap();
    let snapshots = disk.snapshots().unwrap().into_iter().map(|snapshot| {
        let options = OpenOptions::new().snapshot(id(&snapshot.id));
        (snapshot.id, read_all(&options.open(Arc::clone(storage)).unwrap()))
    });
    Model { disk: read_all(&disk), snapshots: snapshots.collect() }
}

fn fails_everywhere(kind: ErrorKind, what_fails: OpKind, amount: Done, forever: bool) {
    let (bytes, before) = start();
    for (name, operation) in OPERATIONS {
        let after = done(name, &before);
        for n in 0.. {
            let what = format!("{name}: {kind:?} {what_fails:?} {amount:?} forever {forever} n {n}");
            let inner = Arc::new(MemoryStorage::with_contents(&bytes));
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
            let disk = OpenOptions::new().writable(true).cache_bytes(0).open(storage).unwrap();
            let fault = Fault::on(what_fails).after(n).with(kind).having_done(amount);
            faults.inject(if forever { fault.forever() } else { fault });
            let result = operation(&disk);
            let (reached, dynamic) = (faults.failed() > 0, inner.clone() as Arc<dyn Storage>);
            faults.heal();
            let goes_on = disk.write_at(&[7; 100], 0, WriteFlags::NONE).and_then(|()| disk.flush());
            let (poisoned, live) = (disk.is_poisoned(), read_all(&disk));
            drop(disk);

            let mut found = read_model(&dynamic);
            check_for_damage(&*inner, &what);
            let mut wanted = [before.clone(), after.clone()];
            if let Err(error) = goes_on {
                assert_eq!(error.kind(), ErrorKind::Poisoned, "{what}");
                // The write may be there in part.
                found.disk[..100].copy_from_slice(&before.disk[..100]);
                wanted.iter_mut().for_each(|model| model.disk[..100].copy_from_slice(&before.disk[..100]));
            } else {
                assert!(!poisoned, "{what}");
                wanted.iter_mut().for_each(|model| model.disk[..100].fill(7));
                assert!(live == found.disk, "{what}: the disk reads otherwise when it is opened anew");
            }
            let outcome = wanted.iter().position(|model| *model == found);
            assert!(outcome.is_some(), "{what}: neither as before nor as after: {result:?}");
            match &result {
                Ok(()) => assert_eq!(outcome, Some(1), "{what}: not done"),
                Err(error) => {
                    assert!([kind, ErrorKind::Poisoned].contains(&error.kind()), "{what}: {error:?}")
                }
            }
            if !reached {
                assert!(result.is_ok() && n > 2, "{what}: {result:?}");
                compare(&dynamic, None, &wanted[1], &what);
                break;
            }
        }
    }
}

#[test]
fn writes_and_flushes_fail_once() {
    fails_everywhere(ErrorKind::Io, OpKind::Write, Done::Nothing, false);
    fails_everywhere(ErrorKind::Io, OpKind::Write, Done::Everything, false);
    fails_everywhere(ErrorKind::NoSpace, OpKind::Write, Done::Half, false);
    fails_everywhere(ErrorKind::Io, OpKind::Flush, Done::Nothing, false);
    fails_everywhere(ErrorKind::NoSpace, OpKind::Flush, Done::Everything, false);
}

#[test]
fn everything_fails_for_ever() {
    fails_everywhere(ErrorKind::Io, OpKind::Any, Done::Nothing, true);
    fails_everywhere(ErrorKind::NoSpace, OpKind::Write, Done::Nothing, true);
}

#[test]
fn reads_fail_once() {
    fails_everywhere(ErrorKind::Io, OpKind::Read, Done::Nothing, false);
}
