//! Persistent bitmaps and failures: wherever the power fails, and whichever operation of the storage does, a
//! bitmap is in use or covers every write, and each change of the list is there as a whole or not at all.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{BitmapBits, BitmapOptions, BitmapProblem, Error, OpenOptions, Qcow2, check};

use crate::bitmaps::{LEN, image, open};

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
    Store,
    Add,
    Remove,
    Disable,
    Enable,
    Resize(u64),
}

const SEQUENCES: [&[Op]; 6] = [
    &[Op::Write(5000, 100), Op::Flush, Op::Zero(100_000, 9000), Op::Store, Op::Write(300_000, 3000)],
    &[Op::Write(5000, 9000), Op::Store, Op::Discard(4096, 8192), Op::Flush, Op::Store],
    &[Op::Write(0, 512), Op::Add, Op::Write(70_000, 512), Op::Remove, Op::Write(900_000, 512)],
    &[Op::Disable, Op::Write(0, 4096), Op::Enable, Op::Write(8192, 4096), Op::Flush],
    &[Op::Write(0, 512), Op::Resize(LEN + 70_144), Op::Write(LEN, 512), Op::Resize(LEN / 2)],
    &[Op::Write(0, 512), Op::Resize(LEN + 70_144)],
];

impl Op {
    fn apply(self, disk: &Qcow2) -> Result<(), Error> {
        match self {
            Self::Write(at, len) => Ok(disk.write_at(&vec![0x77; len as usize], at, WriteFlags::NONE)?),
            Self::Zero(at, len) => Ok(disk.write_zeroes(ByteRange::at(at, len), ZeroFlags::MAY_UNMAP)?),
            Self::Discard(at, len) => Ok(disk.discard(ByteRange::at(at, len))?),
            Self::Flush => Ok(disk.flush()?),
            Self::Store => disk.store_bitmaps(),
            Self::Add => disk.add_bitmap("new", &BitmapOptions::new().granularity(512)),
            Self::Remove => disk.remove_bitmap("off"),
            Self::Disable => disk.disable_bitmap("on"),
            Self::Enable => disk.enable_bitmap("on"),
            Self::Resize(len) => Ok(disk.resize(len, true)?),
        }
    }

    fn written(self) -> Option<ByteRange> {
        match self {
            Self::Write(at, len) | Self::Zero(at, len) | Self::Discard(at, len) => {
                Some(ByteRange::at(at, len))
            }
            _ => None,
        }
    }
}

/// The image before, with a write that its bitmap has recorded.
fn start(cluster: u64) -> Vec<u8> {
    let storage = image(cluster);
    open(storage.clone()).write_at(&[9; 4096], 500_000, WriteFlags::NONE).unwrap();
    storage.to_vec()
}

fn disk_of(storage: Arc<dyn Storage>) -> (Qcow2, Vec<u8>) {
    let disk = OpenOptions::new().open(storage).unwrap();
    let mut bytes = vec![0; disk.len() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    (disk, bytes)
}

/// Whether `bits` has each granule in which `now` differs from `before`.
fn covers(bits: &DirtyBitmap, before: &[u8], now: &[u8]) -> bool {
    let both = before.len().min(now.len());
    (0..both).step_by(512).all(|at| {
        let end = (at + 512).min(both);
        before[at..end] == now[at..end] || bits.is_dirty(at as u64)
    })
}

/// `recorded` are writes that were acknowledged while the bitmap `on` was enabled.
fn judge(image: &[u8], before: &[u8], recorded: &[ByteRange], what: &str) {
    let storage = Arc::new(MemoryStorage::with_contents(image));
    let report = check(&*storage, &mut ()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
    let (disk, now) = disk_of(storage.clone());
    let list = disk.bitmaps().unwrap();
    let names: Vec<_> = list.iter().map(|entry| entry.name.to_text()).collect();
    let allowed: [&[&str]; 4] = [&["on", "off"], &["on", "off", "new"], &["on", "new"], &["on"]];
    assert!(allowed.iter().any(|allowed| names == *allowed), "{what}: {names:?}");
    let on = &list[0];
    if !on.in_use && on.auto {
        let bits = disk.read_bitmap("on").unwrap();
        assert!(covers(&bits, before, &now), "{what}: a change is not covered");
        let grown = ByteRange::new(LEN.min(disk.len()), disk.len());
        let clean = bits.next_clean(grown.start(), u64::MAX).filter(|run| run.start < grown.end());
        assert_eq!(clean, None, "{what}: what the disk has gained counts as written");
        for range in recorded {
            let range = range.intersect(ByteRange::new(0, disk.len()));
            let missed = bits.next_clean(range.start(), u64::MAX).filter(|run| run.start < range.end());
            assert_eq!(missed, None, "{what}: {range:?} was acknowledged");
        }
    }
    for entry in list.iter().filter(|entry| !entry.in_use) {
        disk.read_bitmap(&entry.name.to_text()).unwrap();
    }
    // A writer goes on, and stores what it can.
    let disk = open(storage.clone());
    disk.write_at(&[1; 700], 200_000, WriteFlags::NONE).unwrap();
    disk.store_bitmaps().unwrap();
    let found = disk.bitmaps().unwrap();
    assert_eq!(found[0].in_use, on.in_use, "{what}");
    drop(disk);
    let report = check(&*storage, &mut ()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: after another write: {report:?}");
}

#[test]
fn after_a_crash_a_bitmap_is_in_use_or_covers_every_write() {
    let mut points = 0;
    for cluster in [512, 4096] {
        let image = start(cluster);
        let before = disk_of(Arc::new(MemoryStorage::with_contents(&image))).1;
        for (number, ops) in SEQUENCES.iter().enumerate() {
            let storage = Arc::new(RecordingStorage::with_contents(&image));
            let disk = open(storage.clone());
            let (mut recorded, mut records) = (Vec::new(), true);
            for op in *ops {
                op.apply(&disk).unwrap();
                match op {
                    Op::Disable => records = false,
                    Op::Enable => records = true,
                    _ => {}
                }
                recorded.extend(op.written().filter(|_| records).map(|range| (storage.position(), range)));
            }
            drop(disk);
            // What was written while it was disabled is not its affair.
            let ignored = ops.iter().any(|op| matches!(op, Op::Disable));
            for point in storage.crash_points() {
                points += 1;
                let acknowledged: Vec<_> =
                    recorded.iter().filter(|(at, _)| *at <= point.position()).map(|(_, r)| *r).collect();
                let bytes = point.storage().to_vec();
                let before = if ignored { &before[..0] } else { &before[..] };
                judge(&bytes, before, &acknowledged, &format!("{cluster}, {number}: {point:?}"));
            }
            let (disk, _) = disk_of(storage.clone());
            assert!(disk.bitmaps().unwrap().iter().all(|entry| !entry.in_use), "stored at the end");
        }
    }
    assert!(points > 1000, "only {points} points");
}

#[test]
fn each_failed_operation_leaves_a_bitmap_in_use_or_right() {
    let mut failed = 0;
    for cluster in [512, 4096] {
        let image = start(cluster);
        let before = disk_of(Arc::new(MemoryStorage::with_contents(&image))).1;
        for (number, ops) in SEQUENCES.iter().enumerate() {
            for (kind, error) in [
                (OpKind::Write, ErrorKind::Io),
                (OpKind::Write, ErrorKind::NoSpace),
                (OpKind::Flush, ErrorKind::Io),
                (OpKind::Read, ErrorKind::Io),
            ] {
                for nth in 0.. {
                    let storage = Arc::new(MemoryStorage::with_contents(&image));
                    let faults = Faults::new();
                    let disk = open(Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone())));
                    faults.inject(Fault::on(kind).after(nth).with(error));
                    let mut recorded = Vec::new();
                    let mut records = true;
                    for op in *ops {
                        let done = op.apply(&disk);
                        match op {
                            Op::Disable => records &= done.is_err(),
                            Op::Enable => records |= done.is_ok(),
                            _ => {}
                        }
                        recorded.extend(op.written().filter(|_| records && done.is_ok()));
                    }
                    drop(disk);
                    let what = format!("{cluster}, {number}: {kind:?} {error:?} {nth}");
                    let ignored = ops.iter().any(|op| matches!(op, Op::Disable));
                    let before = if ignored { &before[..0] } else { &before[..] };
                    judge(&storage.to_vec(), before, &recorded, &what);
                    if faults.failed() == 0 {
                        break;
                    }
                    failed += 1;
                }
            }
        }
    }
    assert!(failed > 200, "only {failed} failures");
}

/// Each write of a change fails, but reaches the disk. If it is that of the header, the directory that the
/// image finds when it is opened anew has no marks.
#[test]
fn after_a_failed_write_and_a_reopen_a_bitmap_is_in_use_or_covers_every_write() {
    let mut reopened = 0;
    for cluster in [512, 4096] {
        let image = start(cluster);
        let before = disk_of(Arc::new(MemoryStorage::with_contents(&image))).1;
        for change in [Op::Store, Op::Add, Op::Remove, Op::Resize(LEN + 70_144), Op::Resize(LEN / 2)] {
            for nth in 0.. {
                let what = format!("{cluster}, {change:?}, write {nth}");
                let storage = Arc::new(MemoryStorage::with_contents(&image));
                let faults = Faults::new();
                let disk = open(Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone())));
                let first = Op::Write(5000, 100);
                first.apply(&disk).unwrap();
                faults.inject(Fault::on(OpKind::Write).after(nth).having_done(Done::Everything));
                let _ = change.apply(&disk);
                if faults.failed() == 0 {
                    break;
                }
                let again = disk.reopen().unwrap();
                reopened += 1;
                let second = Op::Write(again.len() - 4096, 100);
                second.apply(&again).unwrap();
                let recorded: Vec<_> = [first, second].into_iter().filter_map(Op::written).collect();
                judge(&storage.to_vec(), &before, &recorded, &format!("{what}, killed"));
                drop((disk, again));
                judge(&storage.to_vec(), &before, &recorded, &format!("{what}, closed"));
            }
        }
    }
    assert!(reopened > 20, "only {reopened} times");
}

#[test]
fn a_bitmap_is_replaced_as_a_whole_or_not_at_all() {
    let storage = Arc::new(RecordingStorage::with_contents(&start(4096)));
    let disk = open(storage.clone());
    disk.write_at(&[9; 512], 5000, WriteFlags::NONE).unwrap();
    let (mut new, from) = (DirtyBitmap::new(LEN, 65536).unwrap(), storage.position());
    new.set(300_000..300_001);
    disk.replace_bitmaps(vec![BitmapBits::new("off", new.clone(), true)]).unwrap();
    let mut found = [0, 0];
    for point in storage.crash_points().filter(|point| point.position() >= from) {
        let (image, _) = disk_of(Arc::new(MemoryStorage::with_contents(&point.storage().to_vec())));
        let list = image.bitmaps().unwrap();
        let names: Vec<_> = list.iter().map(|entry| entry.name.to_text()).collect();
        assert_eq!(names, ["on", "off"], "{point:?}");
        let is_new = list[1].auto;
        found[usize::from(is_new)] += 1;
        let old = DirtyBitmap::new(LEN, 4096).unwrap();
        assert_eq!(image.read_bitmap("off").unwrap(), if is_new { new.clone() } else { old }, "{point:?}");
        assert_eq!(list[0].in_use, !is_new, "{point:?}");
    }
    assert!(found[0] > 0 && found[1] > 0, "{found:?}");
    disk.write_at(&[9; 512], 0, WriteFlags::NONE).unwrap();
    assert!(disk.read_bitmap("off").unwrap().is_dirty(0), "it records now");
    let other = DirtyBitmap::new(LEN + 512, 4096).unwrap();
    let refused = disk.replace_bitmaps(vec![BitmapBits::new("off", other, true)]).unwrap_err();
    assert!(matches!(refused, Error::Bitmap { problem: BitmapProblem::OtherLength { .. }, .. }), "{refused}");
    let refused = disk.replace_bitmaps(vec![BitmapBits::new("none", new, true)]).unwrap_err();
    assert!(matches!(refused, Error::Bitmap { problem: BitmapProblem::NotFound, .. }), "{refused}");
}
