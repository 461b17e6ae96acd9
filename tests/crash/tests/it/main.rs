//! Crash replay, some seconds of it; the front page says what is checked. `cargo xtask crash` plays it all.
//!
//! Here: all single operations and a part of the pairs on every start, stories of bugs that were found,
//! lengths that change over a longer backing file, and failed writes before the crash.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

mod faults;
mod resize;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, Storage, WriteFlags};
use blockmirror_crash::{
    Allowed, Contents, DataPlace, FaultTally, FaultyOp, Op, Sequence, Start, Tally, check,
};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Version};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use std::sync::Arc;

/// One pair of operations of so many is played.
const PAIRS: usize = 13;
/// One point of so many is looked at in an image of megabytes.
const LARGE: u64 = 24;

fn replay_all(name: &str, sequences: &[Sequence]) -> Tally {
    let qemu = Qemu::find("crash_replay");
    let mut tally = Tally::default();
    for sequence in sequences {
        tally.replay(sequence, qemu);
    }
    report(format_args!("crash replay, {name}: {tally}"));
    assert!(tally.violations.is_empty(), "{}", tally.violations.join("\n"));
    tally
}

fn replay(name: &str, is_wanted: fn(&Start) -> bool) {
    let mut sequences = Vec::new();
    for start in Start::all().into_iter().filter(is_wanted) {
        sequences.extend(Sequence::all(start, 1));
        sequences.extend(Sequence::all(start, 2).into_iter().step_by(PAIRS));
    }
    let tally = replay_all(name, &sequences);
    assert!(tally.points >= 2000, "only {} points", tally.points);
}

fn is_plain(start: &Start) -> bool {
    start.data == DataPlace::Inside && matches!(start.contents, Contents::Empty | Contents::Populated)
}

#[test]
fn version_2() {
    replay("version 2", |start| is_plain(start) && start.version == Version::V2);
}

#[test]
fn version_3() {
    replay("version 3", |start| is_plain(start) && start.version == Version::V3 && !start.extended);
}

#[test]
fn extended_l2() {
    replay("extended L2", |start| is_plain(start) && start.extended);
}

#[test]
fn external_data_files() {
    replay("external data files", |start| start.data != DataPlace::Inside);
}

#[test]
fn internal_snapshots() {
    replay("internal snapshots", |start| start.contents == Contents::Snapshots);
}

#[test]
fn persistent_bitmaps() {
    replay("persistent bitmaps", |start| start.contents == Contents::Bitmaps);
}

#[test]
fn images_that_are_repaired_first() {
    replay("repaired first", |start| matches!(start.contents, Contents::Dirty | Contents::Damaged));
}

/// Zeros that keep their cluster's place, then data that begins inside a sector of it, and no flush. The head
/// of that sector was once filled by itself: a crash before the data came left it half zero and half as it
/// was before both, because the entry on disk still showed the place.
#[test]
fn a_sector_cut_by_a_write_into_a_zero_cluster_is_never_a_mixture() {
    let start = Start::new(4096, Contents::Populated);
    let sequence = Sequence { start, ops: vec![Op::Write4K, Op::Zero, Op::WriteAcross], thin: 1 };
    assert!(replay_all("a cut sector", &[sequence]).points >= 20);
}

/// What the disk had gained was not mapped: the process was killed after a write that nothing had flushed,
/// and the image showed zeros where the raw file had the data.
#[test]
fn a_raw_data_file_is_what_the_image_shows_after_it_has_grown() {
    for start in Start::all().into_iter().filter(|start| start.data == DataPlace::Raw) {
        let ops = vec![Op::Shrink, Op::Grow, Op::WriteAcross, Op::Write4K, Op::Kill];
        let sequence = Sequence { start, ops, thin: 1 };
        assert!(replay_all("a raw data file that grows", &[sequence]).points >= 20);
    }
}

/// A disk with bitmaps was cut to nothing, and the image with tables of no entries could not be opened any
/// more.
#[test]
fn a_disk_with_bitmaps_is_not_cut_to_nothing() {
    let mut sequences = Vec::new();
    for start in Start::all().into_iter().filter(|start| start.contents == Contents::Bitmaps) {
        let rest = [Op::Write4K, Op::Grow, Op::Write4K, Op::Close];
        sequences.push(Sequence { start, ops: [&[Op::Shrink; 12][..], &rest].concat(), thin: 3 });
    }
    assert!(replay_all("cut to nothing", &sequences).refused > 0);
}

/// The refcount table moves to a larger place, and the header with it.
#[test]
fn a_refcount_table_that_grows() {
    let start = Start::new(512, Contents::TableFull);
    // The image is large; `cargo xtask crash` looks at all points.
    let single = Sequence::all(start, 1).into_iter().map(|sequence| Sequence { thin: LARGE, ..sequence });
    let mut sequences: Vec<_> = single.collect();
    sequences.push(Sequence { start, ops: vec![Op::WriteAcross, Op::Write4K], thin: 1 });
    assert!(replay_all("a refcount table that grows", &sequences).points >= 100);
}

/// The header that points at refcounts of another width was written, and then something failed. The old ones
/// were free by the new ones' count, guest data went there, and a crash that lost the header lost them all.
#[test]
fn refcounts_that_a_header_may_still_point_at_are_not_overwritten() {
    let mut tally = FaultTally::default();
    for contents in [Contents::Empty, Contents::Populated] {
        FaultyOp::new(Start::new(4096, contents), None, Op::AmendWidth).fail_each(1, &mut tally);
    }
    assert!(tally.violations.is_empty(), "{}", tally.violations.join("\n"));
    assert!(tally.points >= 1000, "{tally}");
}

/// A repair had written refcounts when a flush failed. The next one found nothing wrong, and took the mark
/// off without a flush before it: a crash could leave an image that was not marked, with the old refcounts.
#[test]
fn the_mark_of_a_dirty_image_outlasts_what_an_earlier_repair_has_not_flushed() {
    let mut tally = FaultTally::default();
    for contents in [Contents::Empty, Contents::Populated] {
        let start = Start::new(4096, contents);
        FaultyOp::new(start, Some(Op::WriteAcross), Op::OpenDirty).fail_each(1, &mut tally);
    }
    assert!(tally.violations.is_empty(), "{}", tally.violations.join("\n"));
    assert!(tally.points >= 1000, "{tally}");
}

/// A mark was written and the flush after it failed, or the process was killed there. The next one found the
/// bitmap in use and did not record; a crash could lose the mark, and keep what it had written.
#[test]
fn a_directory_that_was_found_is_durable_before_a_write_rests_on_it() {
    let mut tally = FaultTally::default();
    for start in Start::all().into_iter().filter(|start| start.contents == Contents::Bitmaps) {
        for op in [Op::Write4K, Op::ToggleBitmap, Op::RemoveBitmap] {
            FaultyOp::new(start, None, op).fail_each(3, &mut tally);
        }
        FaultyOp::new(start, Some(Op::RemoveBitmap), Op::RemoveBitmap).fail_each(1, &mut tally);
    }
    assert!(tally.violations.is_empty(), "{}", tally.violations.join("\n"));
    assert!(tally.points >= 1000, "{tally}");
}

/// A write of the header failed and had reached the file all the same: what it dropped is in use until that
/// is durable, also in an image that is opened anew.
#[test]
fn what_a_header_may_still_point_at_is_not_free_in_an_image_that_is_opened_anew() {
    let mut tally = FaultTally::default();
    for (contents, op) in [
        (Contents::Snapshots, Op::DeleteSnapshot),
        (Contents::Snapshots, Op::Apply),
        (Contents::Bitmaps, Op::DeleteSnapshot),
        (Contents::Bitmaps, Op::RemoveBitmap),
    ] {
        FaultyOp::new(Start::new(512, contents), None, op).fail_each(3, &mut tally);
    }
    assert!(tally.violations.is_empty(), "{}", tally.violations.join("\n"));
    assert!(tally.points >= 100, "{tally}");
}

/// The judge must be able to say no.
#[test]
fn the_checker_sees_damage() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(80 << 10);
    (options.cluster_size, options.refcount_bits) = (512, 64);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone() as Arc<dyn Storage>).unwrap();
    disk.write_at(&[7; 8192], 1024, WriteFlags::FUA).unwrap();
    drop(disk);
    let image = storage.to_vec();
    assert_eq!(check(&image, Allowed::default()).unwrap().allocated, 16);
    let at = |field: usize| image[field..field + 8].iter().fold(0, |n, b| n << 8 | usize::from(*b));
    let (l1, refcount_table) = (at(40), at(48));
    let mask = 0x00ff_ffff_ffff_fe00;
    let l2 = at(l1) & mask;
    let data = (0..64).map(|i| l2 + 8 * i).find(|entry| at(*entry) & mask != 0).unwrap();
    let damages = [
        ("COPIED cleared", data, image[data] & 0x7f),
        ("reserved bit", data + 7, image[data + 7] | 2),
        ("data over the header", data + 6, 0),
        ("L2 table misplaced", l1 + 7, 1),
        ("refcount of the header", at(refcount_table) + 7, 0),
        ("refcount too high for COPIED", at(refcount_table) + l2 / 512 * 8 + 7, 2),
    ];
    for (what, offset, byte) in damages {
        let mut damaged = image.clone();
        damaged[offset] = byte;
        if what == "data over the header" {
            damaged[data..data + 7].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 2]);
        }
        assert!(check(&damaged, Allowed::default()).is_err(), "{what} went unseen");
    }
}
