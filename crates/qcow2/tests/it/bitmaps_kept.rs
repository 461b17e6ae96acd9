//! Persistent bitmaps whose owner has bits of its own: in use on disk until they are replaced. What is opened
//! anew, put back or given up.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a list of runs may have one")]

use std::sync::Arc;

use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_qcow2::{BitmapBits, BitmapOptions, OpenOptions, Qcow2, check};

use crate::bitmaps::{LEN, assert_clean, image, open, runs};

/// Names of the bitmaps that are in use, as a program that opens the image sees them.
fn in_use(image: &[u8]) -> Vec<String> {
    let disk = OpenOptions::new().open(Arc::new(MemoryStorage::with_contents(image))).unwrap();
    let entries = disk.bitmaps().unwrap().into_iter();
    entries.filter(|entry| entry.in_use).map(|entry| entry.name.to_string()).collect()
}

fn replace(disk: &Qcow2, name: &str, enabled: bool) {
    let mut bits = disk.read_bitmap(name).unwrap();
    bits.set(0..4096);
    disk.replace_bitmaps(vec![BitmapBits::new(name, bits, enabled)]).unwrap();
}

#[test]
fn a_kept_bitmap_stays_in_use_until_it_is_replaced() {
    let storage = image(4096);
    let disk = open(storage.clone());
    disk.keep_bitmaps_in_use(|name| name == "off").unwrap();
    let is_off = |what: &str| assert_eq!(in_use(&storage.to_vec()), ["off"], "{what}");
    is_off("kept");
    assert_eq!(disk.bitmaps().unwrap().iter().filter(|entry| entry.in_use).count(), 0, "here it is not");
    disk.add_bitmap("new", &BitmapOptions::new()).unwrap();
    is_off("another one was added");
    disk.clear_bitmap("off").unwrap();
    disk.enable_bitmap("off").unwrap();
    is_off("it was changed");
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    assert_eq!(in_use(&storage.to_vec()), ["on", "off", "new"]);
    disk.store_bitmaps().unwrap();
    is_off("the others were stored");
    disk.resize(2 * LEN, false).unwrap();
    is_off("the disk is longer");
    replace(&disk, "on", true);
    is_off("another one was replaced");
    replace(&disk, "off", false);
    assert_eq!(in_use(&storage.to_vec()), [""; 0]);
    assert_eq!(runs(&storage, "off"), [0..8192, LEN..2 * LEN]);
    disk.add_bitmap("last", &BitmapOptions::new().kept_in_use(true)).unwrap();
    assert_eq!(in_use(&storage.to_vec()), ["last"]);
    drop(disk);
    assert_eq!(in_use(&storage.to_vec()), ["last"]);
    assert_clean(&storage, "kept");
}

/// From the moment the call returns, wherever the power fails.
#[test]
fn the_mark_of_a_kept_bitmap_is_durable() {
    let storage = Arc::new(RecordingStorage::with_contents(&image(4096).to_vec()));
    let disk = open(storage.clone());
    disk.keep_bitmaps_in_use(|_| true).unwrap();
    let from = storage.position();
    disk.write_at(&[1; 5000], 5000, WriteFlags::NONE).unwrap();
    disk.add_bitmap("new", &BitmapOptions::new().kept_in_use(true)).unwrap();
    disk.flush().unwrap();
    let mut points = 0;
    for point in storage.crash_points().filter(|point| point.position() >= from) {
        points += 1;
        let names = in_use(&point.storage().to_vec());
        assert!(names == ["on", "off"] || names == ["on", "off", "new"], "{point:?}: {names:?}");
    }
    assert!(points > 10, "only {points} points");
}

#[test]
fn an_image_that_is_opened_anew_keeps_them() {
    let storage = image(4096);
    let disk = open(storage.clone());
    disk.keep_bitmaps_in_use(|_| true).unwrap();
    let again = disk.reopen().unwrap();
    drop(disk);
    assert_eq!(again.bitmaps().unwrap().iter().filter(|entry| entry.in_use).count(), 0);
    again.add_bitmap("new", &BitmapOptions::new()).unwrap();
    assert_eq!(in_use(&storage.to_vec()), ["on", "off"]);
    replace(&again, "on", true);
    replace(&again, "off", false);
    assert_eq!(in_use(&storage.to_vec()), [""; 0]);
    assert_eq!(runs(&storage, "off"), [0..4096]);
}

/// A disabled one misses no write. It stayed in use for ever after a resize whose write of the header had
/// failed.
#[test]
fn a_disabled_bitmap_survives_a_resize_that_ends_in_doubt() {
    for (len, done) in
        [2 * LEN, LEN / 2].into_iter().flat_map(|l| [Done::Nothing, Done::Everything].map(|d| (l, d)))
    {
        let mut reopened = 0;
        for nth in 0.. {
            let storage = image(4096);
            let faults = Faults::new();
            let disk = open(Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone())));
            replace(&disk, "off", false);
            faults.inject(Fault::on(OpKind::Write).after(nth).having_done(done));
            let _ = disk.resize(len, true);
            if faults.failed() == 0 {
                break;
            }
            if !disk.is_poisoned() {
                continue;
            }
            reopened += 1;
            let again = disk.reopen().unwrap();
            drop((disk, again));
            let found = in_use(&storage.to_vec());
            assert!(!found.contains(&"off".to_owned()), "{len}, write {nth}, {done:?}: {found:?}");
            assert_eq!(runs(&storage, "off"), [0..4096], "{len}, write {nth}, {done:?}");
            let report = check(&*storage, &mut ()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
        }
        assert!(reopened > 0);
    }
}

#[test]
fn an_inconsistent_bitmap_is_put_back_as_one() {
    let storage = image(4096);
    let disk = open(storage.clone());
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    let killed = Arc::new(MemoryStorage::with_contents(&storage.to_vec()));
    let disk = open(killed.clone());
    let entry = disk.bitmaps().unwrap().swap_remove(0);
    disk.remove_bitmap("on").unwrap();
    disk.insert_inconsistent_bitmap(&entry).unwrap();
    disk.insert_inconsistent_bitmap(&entry).unwrap_err();
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    drop(disk);
    assert_eq!(in_use(&killed.to_vec()), ["on"]);
    let entries = open(killed.clone()).bitmaps().unwrap();
    let found: Vec<_> = entries.iter().map(|e| (e.name.to_string(), e.granularity, e.auto)).collect();
    assert_eq!(found, [("off".to_owned(), 4096, false), ("on".to_owned(), 4096, true)]);
    assert_clean(&killed, "put back");
}

/// Dropping the image waited for the storage once more.
#[test]
fn bitmaps_that_are_given_up_cost_no_operation_at_the_drop() {
    let storage = image(4096);
    let faults = Faults::new();
    let disk = open(Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone())));
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    let before = disk.metadata_progress();
    disk.store_bitmaps().unwrap();
    assert!(disk.metadata_progress() > before, "storing them is progress");
    disk.write_at(&[1; 10], 50_000, WriteFlags::NONE).unwrap();
    let seen = faults.seen(OpKind::Any);
    disk.give_up_bitmaps();
    drop(disk);
    assert_eq!(faults.seen(OpKind::Any), seen);
    assert_eq!(in_use(&storage.to_vec()), ["on"]);
}

/// The last one is marked before it is removed. Where the removal ended in doubt it stayed in use for ever.
#[test]
fn a_disabled_bitmap_survives_a_removal_that_ends_in_doubt() {
    let mut reopened = 0;
    for done in [Done::Nothing, Done::Everything] {
        for nth in 0.. {
            let storage = image(4096);
            let disk = open(storage.clone());
            replace(&disk, "off", false);
            disk.remove_bitmap("on").unwrap();
            drop(disk);
            let faults = Faults::new();
            let disk = open(Arc::new(FaultStorage::new(Arc::clone(&storage) as _, faults.clone())));
            faults.inject(Fault::on(OpKind::Write).after(nth).having_done(done));
            let _ = disk.remove_bitmap("off");
            if faults.failed() == 0 {
                break;
            }
            let again = disk.is_poisoned().then(|| disk.reopen().unwrap());
            reopened += usize::from(again.is_some());
            drop((disk, again));
            let what = format!("write {nth}, {done:?}");
            assert_eq!(in_use(&storage.to_vec()), [""; 0], "{what}");
            if !open(storage.clone()).bitmaps().unwrap().is_empty() {
                assert_eq!(runs(&storage, "off"), [0..4096], "{what}");
            }
            let report = check(&*storage, &mut ()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
        }
    }
    assert!(reopened > 0);
}
