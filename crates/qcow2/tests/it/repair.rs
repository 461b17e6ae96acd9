//! Repairs that lose nothing: what could be read is kept, also once each cluster that is free has been
//! written anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage};
use blockmirror_block::{BlockDevice, ErrorKind, Storage, WriteFlags};
use blockmirror_qcow2::{
    CheckObserver, CreateOptions, CutShort, Header, Mending, OpenOptions, Repair, check, repair,
};

use crate::check::{image, readable, repaired};
use crate::common::qemu_check_finds_nothing;
use crate::raw_image::{COPIED, OFFSET, RawImage};

const BOTH: [Repair; 2] = [Repair::Leaks, Repair::All];
pub(crate) const LONG: u64 = 256 << 10;

/// Two L2 tables, each of which maps half of what is written, the second behind the first in the file.
pub(crate) fn two_tables(refcount_bits: u32) -> RawImage {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(LONG);
    (options.cluster_size, options.refcount_bits) = (1024, refcount_bits);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[0x11; 100_000], 0, WriteFlags::NONE).unwrap();
    disk.write_at(&[0x22; 100_000], LONG / 2, WriteFlags::FUA).unwrap();
    drop(disk);
    RawImage(storage.to_vec())
}

/// A fixed length has room, but not for growing.
fn fixed(image: &RawImage) -> MemoryStorage {
    let storage = MemoryStorage::fixed(image.len() + (1 << 20));
    storage.write_at(&image.0, 0).unwrap();
    storage
}

fn keeps(damaged: &RawImage, what: Repair) -> RawImage {
    let before = readable(&damaged.0);
    let after = RawImage(repaired(&damaged.0, what).0);
    assert!(before == readable(&after.0), "{what:?}: it reads differently");
    assert!(before == readable(&after.free_overwritten()), "{what:?}: a cluster was freed");
    after
}

#[test]
fn a_compressed_cluster_with_a_subcluster_bitmap_is_kept() {
    let mut damaged = RawImage(image(|o| (o.cluster_size, o.extended_l2) = (16384, true)));
    damaged.compress(1);
    assert!(check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap().is_clean());
    let at = damaged.l2_at(1);
    damaged.set(at + 8, 1);
    for what in BOTH {
        let after = keeps(&damaged, what);
        assert_eq!(after.get(at + 8), u64::from(what == Repair::Leaks));
        if what == Repair::All {
            qemu_check_finds_nothing(&after.0, "a_compressed_cluster_with_a_subcluster_bitmap_is_kept");
        }
    }
}

#[test]
fn a_compressed_run_that_ends_past_the_file_is_kept() {
    let mut damaged = RawImage(image(|o| o.cluster_size = 4096));
    let host = |guest: &u64| damaged.get(damaged.l2_at(*guest)) & OFFSET;
    let guest = (0..64).max_by_key(host).unwrap();
    let last = host(&guest);
    damaged.0.resize(last as usize + 4096, 0);
    damaged.compress(guest);
    damaged.set_compressed(guest, last, 15);
    for what in BOTH {
        keeps(&damaged, what);
    }
}

/// A table that cannot be found maps clusters that nothing else does: they are not free.
#[test]
fn new_refcounts_are_not_written_over_what_a_missing_table_maps() {
    let sound = two_tables(16);
    let mut damaged = sound.clone();
    damaged.change(damaged.l1_at(0), |entry| entry + 512);
    damaged.change(damaged.refcount_table(), |entry| entry + 512);
    let storage = fixed(&damaged);
    let error = repair(&storage, Repair::All, &mut ()).unwrap_err();
    let mut after = RawImage(storage.to_vec());
    after.set(after.l1_at(0), sound.get(sound.l1_at(0)));
    assert!(readable(&after.0) == readable(&sound.0), "guest data was overwritten");
    assert_eq!(blockmirror_block::Error::from(error).kind(), ErrorKind::NoSpace);
}

/// The refcounts of what the missing table maps: known in one block, unreadable in the other.
#[test]
fn new_refcounts_keep_what_a_missing_table_maps() {
    let sound = two_tables(64);
    for (lost, block) in [(1, 0), (1, 1), (0, 0)] {
        let mut damaged = sound.clone();
        let place = damaged.l1_at(lost);
        damaged.change(place, |entry| entry + 512);
        damaged.change(damaged.refcount_table() + block * 8, |entry| entry + 512);
        let mut after = RawImage(repaired(&damaged.0, Repair::All).0);
        assert_ne!(after.refcount_table(), damaged.refcount_table(), "they are not new");
        after.0 = after.free_overwritten();
        after.set(place, sound.get(place));
        let is_kept = readable(&after.0) == readable(&sound.0);
        assert!(is_kept, "the table {lost} and the block {block}: clusters were freed");
    }
}

/// Where the old refcounts lie past the end of the file, or in a cluster of something else, they say nothing.
#[test]
fn refcounts_that_cannot_be_believed_free_nothing() {
    let sound = two_tables(64);
    for block in [1 << 28, sound.get(sound.refcount_table() + 8), sound.get(40)] {
        let mut damaged = sound.clone();
        let place = damaged.l1_at(0);
        damaged.change(place, |entry| entry + 512);
        damaged.set(damaged.refcount_table(), block);
        let mut after = RawImage(repaired(&damaged.0, Repair::All).0);
        after.0 = after.free_overwritten();
        after.set(place, sound.get(place));
        assert!(readable(&after.0) == readable(&sound.0), "{block:#x}: clusters were freed");
    }
}

/// An L1 entry may point at guest data, where only a missing table says so.
#[test]
fn while_a_table_is_missing_no_entry_is_changed() {
    let sound = two_tables(16);
    for lost in [[0, 1], [1, 0]] {
        let [missing, wrong] = lost.map(|index| sound.l1_at(index));
        let data = sound.get(sound.l2_at(lost[0] * 128 + 3)) & OFFSET;
        let mut damaged = sound.clone();
        // What a guest may have written: entries with reserved bits, and with wrong flags.
        damaged.set(data, 0x8000 | 0x17);
        damaged.set(data + 8, damaged.l1_at(0) | 1 << 57);
        damaged.set(data + 16, sound.get(sound.l2_at(lost[0] * 128 + 4)) & OFFSET);
        let before = damaged.clone();
        damaged.change(missing, |entry| entry + 512);
        damaged.set(wrong, data | COPIED);
        for what in BOTH {
            let after = RawImage(repaired(&damaged.0, what).0);
            let cluster = |image: &RawImage| image.0[data as usize..][..1024].to_vec();
            assert!(cluster(&after) == cluster(&before), "{what:?}: guest data was changed");
        }
    }
}

/// A bitmap behind one that is damaged keeps its clusters as long as its image says that it is valid.
#[test]
fn leaks_of_damaged_bitmaps_are_left() {
    let mut damaged = RawImage(image(|o| o.cluster_size = 4096));
    damaged.add_bitmaps();
    qemu_check_finds_nothing(&damaged.0, "leaks_of_damaged_bitmaps_are_left");
    let directory = damaged.len() - 5 * 4096;
    // The flags of the first, whose type and name are right.
    damaged.set_len(directory + 12, 0xf8, 4);
    let report = check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap();
    assert!(report.corruptions > 0 && report.leaks > 0, "{report:?}");
    let after = RawImage(repaired(&damaged.0, Repair::Leaks).0);
    assert!(after.0 == damaged.0, "clusters of bitmaps were freed");
    let (after, report) = repaired(&damaged.0, Repair::All);
    assert!(report.unwrap().is_clean());
    assert_eq!(RawImage(after).get(88) & 1, 0, "the bitmaps are stale");
}

/// Names are bytes: two that are no text looked alike, and a repair gave all bitmaps up.
#[test]
fn names_of_bitmaps_are_compared_as_bytes() {
    let mut sound = RawImage(image(|o| o.cluster_size = 4096));
    sound.add_bitmaps();
    let directory = sound.len() as usize - 5 * 4096;
    (sound.0[directory + 24], sound.0[directory + 32 + 24]) = (0xff, 0xfe);
    let report = check(&MemoryStorage::with_contents(&sound.0), &mut ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(repaired(&sound.0, Repair::All).0 == sound.0, "a repair of nothing writes nothing");
}

/// QEMU opens no image with a bitmap whose table has no entries, or too few; the check called it clean, and
/// then it could not be opened for writing. Nor could one with a table that begins where the file ends.
#[test]
fn bitmaps_that_no_reader_takes_are_given_up() {
    let mut sound = RawImage(image(|o| o.cluster_size = 4096));
    sound.add_bitmaps();
    let directory = sound.len() - 5 * 4096;
    let damages: [fn(&mut RawImage, u64); 4] = [
        |image, entry| image.set(entry, image.len()),
        |image, entry| image.set_len(entry + 8, 0, 4),
        |image, entry| image.set_len(entry + 8, (512 << 20) / 4096 + 1, 4),
        // A bit for 512 bytes of a disk of 1 GiB.
        |image, entry| {
            image.set_len(entry + 17, 9, 1);
            image.set_len(36, 512, 4);
            image.set(24, 1 << 30);
        },
    ];
    for (damage, number) in damages.into_iter().zip(0..) {
        let mut damaged = sound.clone();
        // So that the longest table lies in the file.
        damaged.0.resize(4 << 20, 0);
        damage(&mut damaged, directory);
        let report = check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap();
        assert!(report.corruptions > 0, "{number}: {report:?}");
        let (after, report) = repaired(&damaged.0, Repair::All);
        assert!(report.unwrap().is_clean(), "{number}");
        OpenOptions::new().writable(true).open(Arc::new(MemoryStorage::with_contents(&after))).unwrap();
    }
}

/// What begins at the end of the file is not there, though the file may end inside its last cluster; a check
/// called it clean, and no reader took it.
#[test]
fn what_begins_at_the_end_of_the_file_is_missing() {
    let damages: [fn(&mut RawImage); 3] = [
        |image| image.set(40, image.len()),
        |image| image.set(48, image.len()),
        |image| image.set_compressed(1, image.len(), 0),
    ];
    for (damage, number) in damages.into_iter().zip(0..) {
        let mut damaged = RawImage(image(|o| o.cluster_size = 4096));
        damaged.append(1);
        let len = damaged.0.len().next_multiple_of(4096);
        damaged.0.resize(len, 0);
        damage(&mut damaged);
        let report = check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap();
        assert!(report.corruptions > 0, "{number}: {report:?}");
        let (after, report) = repaired(&damaged.0, Repair::All);
        let opened = OpenOptions::new().writable(true).open(Arc::new(MemoryStorage::with_contents(&after)));
        assert_eq!(report.unwrap().corruptions == 0, opened.is_ok(), "{number}: {opened:?}");
    }
}

/// The check took what the file lacks of a table for zeros, where no reader does. Of an L1 table that is
/// lost, so that nothing is freed; refcounts are made anew.
#[test]
fn a_table_that_the_file_has_not_all_of_is_found() {
    let mut sound = RawImage(image(|o| o.cluster_size = 4096));
    sound.add_snapshot();
    let l1 = sound.number(36, 4) * 8;
    let snapshot = sound.snapshot().unwrap();
    for (what, field, len, is_mended) in [
        ("L1 table", 40, l1, false),
        ("L1 table of a snapshot", snapshot, l1, false),
        ("refcount table", 48, 4096, true),
    ] {
        let mut damaged = sound.clone();
        let place = damaged.append_copy(damaged.get(field), len);
        damaged.set(field, place);
        damaged.settle();
        assert_eq!(damaged.get(field), place, "{what}");
        damaged.0.truncate((place + len - 8) as usize);
        let report = check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap();
        assert!(report.corruptions > 0, "{what}: {report:?}");
        let (after, report) = repaired(&damaged.0, Repair::All);
        assert_eq!(report.unwrap().is_clean(), is_mended, "{what}");
        if !is_mended {
            assert!(after[..damaged.0.len()] == damaged.0, "{what}: something was freed");
        }
        let opened = OpenOptions::new().writable(true).open(Arc::new(MemoryStorage::with_contents(&after)));
        assert_eq!(opened.is_ok(), is_mended, "{what}");
    }
}

/// With refcounts of one bit two entries on a cluster have a refcount of one, which is not theirs alone.
#[test]
fn an_entry_of_a_cluster_with_more_references_than_its_refcount_says_is_not_copied() {
    for copied in [0, COPIED] {
        let mut damaged = RawImage(image(|o| (o.cluster_size, o.refcount_bits) = (512, 1)));
        let (first, second) = (damaged.l2_at(10), damaged.l2_at(11));
        let host = damaged.get(first) & OFFSET;
        damaged.set(first, host | copied);
        damaged.set(second, host | copied);
        let after = keeps(&damaged, Repair::All);
        assert_eq!([first, second].map(|at| after.get(at)), [host; 2], "{copied:#x}");
    }
}

#[test]
fn a_snapshot_table_is_not_written_longer_than_it_may_be() {
    const ENTRY: u64 = 40 + 16 + 2 * 65535;
    let mut damaged = RawImage(image(|o| o.cluster_size = 4096));
    let table = damaged.len().next_multiple_of(4096);
    let count = (64 << 20) / ENTRY.next_multiple_of(8) + 1;
    damaged.0.resize((table + count * ENTRY.next_multiple_of(8)) as usize, b'a');
    let mut at = table;
    for index in 0..count {
        damaged.0[at as usize..][..56].fill(0);
        damaged.set_len(at + 12, 0xffff_ffff, 4);
        // The first lacks what a repair adds.
        let extra = if index == 0 { 0 } else { 16 };
        damaged.set_len(at + 36, extra, 4);
        at = (at + 40 + extra + 2 * 65535).next_multiple_of(8);
    }
    damaged.set_len(60, count, 4);
    damaged.set(64, table);
    let storage = MemoryStorage::with_contents(&damaged.0);
    let report = repair(&storage, Repair::All, &mut ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let header = Header::read(&storage).unwrap();
    assert_eq!(u64::from(header.snapshot_count), count - 1);
}

/// An image in which a cluster of guest data, and its L2 table, have the refcount 0.
fn used_as_free() -> RawImage {
    let mut damaged = RawImage(image(|o| o.cluster_size = 4096));
    let block = damaged.get(damaged.refcount_table());
    let table = damaged.get(damaged.l1_at(0)) & OFFSET;
    let data = damaged.get(damaged.l2_at(1)) & OFFSET;
    for at in [table, data] {
        damaged.set_len(block + at / 4096 * 2, 0, 2);
    }
    damaged
}

/// What a repair says that it writes.
#[derive(Default)]
struct Said(Vec<Mending>);

impl CheckObserver for Said {
    fn mending(&mut self, mending: &Mending) {
        self.0.push(*mending);
    }
}

/// As QEMU does it.
#[test]
fn where_a_cluster_in_use_counts_as_free_all_refcounts_are_written_anew() {
    let damaged = used_as_free();
    let storage = MemoryStorage::with_contents(&damaged.0);
    let mut said = Said::default();
    assert!(repair(&storage, Repair::All, &mut said).unwrap().is_clean());
    let after = RawImage(storage.to_vec());
    assert_ne!(after.refcount_table(), damaged.refcount_table());
    assert!(readable(&after.0) == readable(&damaged.0));
    assert!(readable(&after.free_overwritten()) == readable(&damaged.0));
    qemu_check_finds_nothing(&after.0, "where_a_cluster_in_use_counts_as_free");
    let table = damaged.refcount_table() / 4096;
    let freed = |cluster| Mending::Refcount { cluster, refcount: 1, references: 0 };
    assert_eq!(said.0[0], Mending::NewRefcounts);
    assert!(said.0.contains(&freed(table)), "{said:?}", said = said.0);
}

/// Where the new ones have no room: on storage that does not grow, and on a host that is full.
#[test]
fn without_room_for_new_refcounts_the_old_ones_are_set_right() {
    let damaged = used_as_free();
    let table = damaged.refcount_table();
    let is_repaired = |after: Vec<u8>| {
        let after = RawImage(after);
        assert_eq!(after.refcount_table(), table);
        assert!(check(&MemoryStorage::with_contents(&after.0), &mut ()).unwrap().is_clean());
        assert!(readable(&after.0)[..] == readable(&damaged.0)[..]);
    };
    let storage = fixed(&damaged);
    repair(&storage, Repair::All, &mut ()).unwrap();
    is_repaired(storage.to_vec());

    let memory = Arc::new(MemoryStorage::with_contents(&damaged.0));
    let faults = Faults::new();
    faults.inject(Fault::on(OpKind::Write).with(ErrorKind::NoSpace));
    let full = FaultStorage::new(Arc::clone(&memory) as _, faults);
    assert!(repair(&full, Repair::All, &mut ()).unwrap().is_clean());
    is_repaired(memory.to_vec());
}

/// The old refcounts stay until the new ones are durable.
#[test]
fn new_refcounts_that_were_cut_short_are_written_again() {
    let damaged = used_as_free();
    let recording = RecordingStorage::with_contents(&damaged.0);
    repair(&recording, Repair::All, &mut ()).unwrap();
    let mut tables = Vec::new();
    for point in recording.crash_points() {
        let left = RawImage(point.storage().to_vec());
        tables.push(left.refcount_table());
        assert!(readable(&left.0) == readable(&damaged.0), "{point:?}");
        let (after, report) = repaired(&left.0, Repair::All);
        assert!(report.unwrap().is_clean(), "{point:?}");
        assert!(readable(&after) == readable(&damaged.0), "{point:?}");
    }
    tables.dedup();
    assert_eq!(tables.len(), 2, "the header changes once: {tables:?}");
}

/// Two entries of the L1 table point at one L2 table, and all refcounts say so, as QEMU's repair leaves it.
/// It was clean, and could not be opened for writing.
pub(crate) fn one_table_twice(refcount_bits: u32) -> RawImage {
    let mut image = two_tables(refcount_bits);
    let (first, second) = (image.get(image.l1_at(0)) & OFFSET, image.get(image.l1_at(1)) & OFFSET);
    for (guest, at) in (0..).zip((second..).step_by(8)).take(128) {
        let host = image.get(at) & OFFSET;
        let other = image.get(first + guest * 8) & OFFSET;
        if host != 0 {
            image.set_refcount(host / 1024, 0);
        }
        if other != 0 {
            image.set_refcount(other / 1024, 2);
            image.change(first + guest * 8, |entry| entry & !COPIED);
        }
    }
    image.set_refcount(first / 1024, 2);
    image.set_refcount(second / 1024, 0);
    for index in 0..2 {
        let at = image.l1_at(index);
        image.set(at, first);
    }
    image
}

#[test]
fn an_l2_table_of_two_entries_becomes_two() {
    let damaged = one_table_twice(16);
    qemu_check_finds_nothing(&damaged.0, "an_l2_table_of_two_entries_becomes_two");
    let found = check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap();
    assert_eq!((found.corruptions, found.leaks, found.check_errors), (1, 0, 0));
    let open = |image: &RawImage| {
        OpenOptions::new().writable(true).open(Arc::new(MemoryStorage::with_contents(&image.0)))
    };
    assert_eq!(open(&damaged).unwrap_err().kind(), ErrorKind::Corrupt);
    let (_, report) = repaired(&damaged.0, Repair::Leaks);
    assert_eq!(report.unwrap().corruptions, 1, "no table is moved for leaks");

    let after = keeps(&damaged, Repair::All);
    assert!(check(&MemoryStorage::with_contents(&after.0), &mut ()).unwrap().is_clean());
    qemu_check_finds_nothing(&after.0, "an_l2_table_of_two_entries_becomes_two");
    let disk = open(&after).unwrap();
    disk.write_at(&[0x77; 4096], 0, WriteFlags::FUA).unwrap();
    let mut other = [0; 4096];
    disk.read_at(&mut other, LONG / 2).unwrap();
    assert_eq!(other, [0x11; 4096], "it has the same data, and its own table");

    // There is no room for a copy.
    let fixed = fixed(&damaged);
    let report = repair(&fixed, Repair::All, &mut ()).unwrap();
    assert_eq!(report.corruptions, 1);
}

/// A repair makes at most as many copies as the file has clusters: here it would take 4096.
#[test]
fn a_table_of_very_many_entries_stays() {
    let mut damaged = two_tables(64);
    let table = damaged.get(damaged.l1_at(0)) & OFFSET;
    let l1 = damaged.append(4096 * 8);
    (0..4096).for_each(|index| damaged.set(l1 + index * 8, table));
    damaged.set(40, l1);
    damaged.set_len(36, 4096, 4);
    let (bytes, report) = repaired(&damaged.0, Repair::All);
    assert_eq!(report.unwrap().corruptions, 1);
    assert!(bytes.len() <= 2 * damaged.0.len());
}

/// The file ends in an L2 table. What the missing part maps was read as zeros in part, and taken for zeros by
/// the check: then it was a leak, and given away by the repair of leaks.
#[test]
fn a_table_of_which_the_file_has_a_part_is_not_taken_for_zeros() {
    let mut damaged = two_tables(16);
    let (at, old) = (damaged.l1_at(0), damaged.get(damaged.l1_at(0)) & OFFSET);
    let copy = damaged.append_copy(old, 1024);
    damaged.set(at, copy | COPIED);
    damaged.set_refcount(copy / 1024, 1);
    damaged.set_refcount(old / 1024, 0);
    let whole = readable(&damaged.0);
    assert!(check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap().is_clean());
    // 50 entries of 1 KiB each are there.
    damaged.0.truncate(copy as usize + 50 * 8 + 3);
    let found = check(&MemoryStorage::with_contents(&damaged.0), &mut ()).unwrap();
    assert_eq!(found.corruptions, 1);
    let cut = readable(&damaged.0);
    assert!(cut[..12] == whole[..12], "what is listed can be read");
    assert!(cut[12..32].iter().all(Option::is_none), "what is not, cannot");
    assert!(cut[32..] == whole[32..], "nor does it hide what another table lists");

    let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
    let refused = OpenOptions::new().writable(true).open(storage.clone()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::CutShort);
    let lost = CutShort::find(storage.clone(), &Header::read(&*storage).unwrap()).unwrap().unwrap();
    assert_eq!((lost.first, lost.missing, lost.complete), (50 << 10, LONG / 2 - (50 << 10), true));
    for what in BOTH {
        let (mut bytes, _) = repaired(&damaged.0, what);
        bytes.truncate(copy as usize);
        bytes.extend_from_within(old as usize..old as usize + 1024);
        assert!(readable(&bytes) == whole, "{what:?}: with the rest of the table all is there again");
    }
}
