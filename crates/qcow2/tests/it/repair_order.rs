//! Repairs at each point where they may be cut off, and of files that were cut short: none makes an image
//! worse than it was.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{MemoryStorage, RecordingStorage};
use blockmirror_block::{BlockDevice, ErrorKind, Storage, WriteFlags};
use blockmirror_qcow2::{CheckObserver, Finding, OpenOptions, Qcow2, Repair, check, repair};

use crate::check::{image, readable};
use crate::raw_image::{COPIED, OFFSET, RawImage};
use crate::repair::{LONG, one_table_twice, two_tables};

const INCOMPATIBLE: u64 = 72;
const CLUSTER: u64 = 1024;

fn open(storage: &Arc<MemoryStorage>) -> blockmirror_qcow2::Result<Qcow2> {
    OpenOptions::new().writable(true).open(storage.clone())
}

/// Has the image say that it was not closed.
fn marked_dirty(mut image: RawImage) -> RawImage {
    image.change(INCOMPATIBLE, |features| features | 1);
    image
}

/// An image of which the file lacks half of the L2 table at its end, and has no refcount for it.
fn cut_in_a_table() -> RawImage {
    let mut image = two_tables(16);
    let place = image.l1_at(1);
    let old = image.get(place) & OFFSET;
    let copy = image.append_copy(old, CLUSTER);
    image.set(place, copy | COPIED);
    image.set_refcount(old / CLUSTER, 0);
    image.set_refcount(copy / CLUSTER, 0);
    image.0.truncate(copy as usize + 512);
    image
}

/// An image of which the file lacks the last two clusters, which the guest has mapped; a third one has the
/// refcount 0, and so have those two if `counted` is not set.
fn cut_in_data(counted: bool) -> RawImage {
    let mut image = two_tables(16);
    let mut hosts: Vec<_> = (0..LONG / CLUSTER)
        .map(|guest| image.get(image.l2_at(guest)) & OFFSET)
        .filter(|at| *at > 0)
        .collect();
    hosts.sort_unstable();
    let lost = hosts.split_off(hosts.len() - 2);
    assert_eq!(lost[0] + CLUSTER, lost[1]);
    image.set_refcount(hosts[7] / CLUSTER, 0);
    if !counted {
        lost.iter().for_each(|at| image.set_refcount(at / CLUSTER, 0));
    }
    image.0.truncate(lost[0] as usize);
    image
}

/// New refcounts were written behind the end of the file: what was missing there was found no more, and
/// guest clusters were mapped to refcounts.
#[test]
fn a_file_that_was_cut_short_is_made_no_longer() {
    let images = [cut_in_a_table(), cut_in_data(true), cut_in_data(false)];
    for (damaged, number) in images.into_iter().flat_map(|cut| [marked_dirty(cut.clone()), cut]).zip(0..) {
        let before = readable(&damaged.0);
        assert!(before.iter().any(Option::is_none) && before.iter().any(Option::is_some), "{number}");
        let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
        for round in 0..2 {
            let opened = open(&storage);
            // One of these is not known to be cut by its refcounts, and one not marked: it opens as before.
            assert!(opened.is_err() || number == 5, "{number}, {round}: it is open");
            drop(opened);
            for what in [Repair::All, Repair::Leaks] {
                let report = repair(&*storage, what, &mut ()).unwrap();
                assert!(report.corruptions > 0, "{number}, {round}: {what:?} {report:?}");
                assert_eq!(storage.len().unwrap(), damaged.len(), "{number}, {round}: {what:?}");
                assert!(readable(&storage.to_vec()) == before, "{number}, {round}: {what:?}");
            }
        }
    }
}

/// Finds clusters in use that the refcounts call free.
#[derive(Default)]
struct UsedAsFree(Vec<u64>);

impl CheckObserver for UsedAsFree {
    fn found(&mut self, finding: &Finding, _: u64) {
        if let Finding::RefcountTooLow { cluster, refcount: 0, .. } = finding {
            self.0.push(*cluster);
        }
    }
}

/// Of a snapshot whose entry is to be completed, in a place that has no refcounts yet.
fn snapshot_to_complete() -> RawImage {
    let mut image = RawImage(image(|o| (o.cluster_size, o.refcount_bits) = (1024, 64)));
    image.add_snapshot();
    let table = image.snapshot().unwrap();
    image.set_len(table + 36, 0, 4);
    image
}

/// A table was copied to where no refcount block counts, and used before there was one.
#[test]
fn what_is_written_in_a_new_range_is_counted_before_it_is_used() {
    for (mut damaged, number) in [one_table_twice(64), snapshot_to_complete()].into_iter().zip(0..) {
        // 128 clusters of a block.
        let len = damaged.0.len().next_multiple_of(128 << 10);
        damaged.0.resize(len, 0);
        let recording = RecordingStorage::with_contents(&damaged.0);
        let report = repair(&recording, Repair::All, &mut ()).unwrap();
        assert!(report.is_clean(), "{number}: {report:?}");
        assert!(recording.to_vec().len() > len, "{number}");
        for point in recording.crash_points() {
            let mut free = UsedAsFree::default();
            check(&point.storage(), &mut free).unwrap();
            assert!(free.0.is_empty(), "{number}: {point:?}: {:?}", free.0);
        }
    }
}

/// Two entries of the L1 table point at one L2 table; neither refcounts nor flags say so.
fn one_table_by_accident(refcount_bits: u32) -> RawImage {
    let mut image = two_tables(refcount_bits);
    let entry = image.get(image.l1_at(0));
    let at = image.l1_at(1);
    image.set(at, entry);
    image
}

/// How many clusters the L2 tables of the first two L1 entries both map, with a flag that calls one of them
/// the owner.
fn owned_by_two(image: &RawImage) -> usize {
    let [first, second] = [0, 1].map(|index| image.get(image.l1_at(index)) & OFFSET);
    let entries = (0..CLUSTER).step_by(8).map(|at| [first, second].map(|table| image.get(table + at)));
    let shared = entries.filter(|[one, other]| one & OFFSET > 0 && one & OFFSET == other & OFFSET);
    shared.filter(|[one, other]| (one | other) & COPIED > 0).count()
}

/// The copies were in use before flags said that they share their data: a write by one entry changed what
/// the other reads. The flags are looked at, too: a writer here sets a wrong one right when it meets it, and
/// QEMU trusts it.
#[test]
fn tables_that_become_two_share_data_by_their_flags_already() {
    let damaged = one_table_by_accident(16);
    let recording = RecordingStorage::with_contents(&damaged.0);
    let report = repair(&recording, Repair::All, &mut ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let (mut refused, mut opened) = (0, 0);
    for point in recording.crash_points() {
        let storage = Arc::new(point.storage());
        let Ok(disk) = open(&storage) else {
            refused += 1;
            continue;
        };
        opened += 1;
        assert_eq!(owned_by_two(&RawImage(storage.to_vec())), 0, "{point:?}");
        for (here, there) in [(0, LONG / 2), (LONG / 2 + 8192, 8192)] {
            disk.write_at(&[0x77; 4096], here, WriteFlags::FUA).unwrap();
            let mut other = [0; 4096];
            disk.read_at(&mut other, there).unwrap();
            assert_eq!(other, [0x11; 4096], "{point:?}: {here} is {there}");
        }
    }
    assert!(refused > 0 && opened > 0, "{refused} {opened}");
}

/// A table that lies in a cluster of guest data moves; its flags cannot be set right before, where they are.
#[test]
fn a_table_that_moves_has_the_right_flags_in_its_new_place() {
    let mut damaged = two_tables(16);
    let table = damaged.get(damaged.l1_at(0)) & OFFSET;
    let (own, other) = (damaged.l2_at(0), damaged.l2_at(CLUSTER / 8));
    let entry = damaged.get(own);
    assert!(entry & OFFSET > 0 && entry & COPIED > 0);
    damaged.set(other, entry);
    let inside = damaged.l2_at(1);
    damaged.set(inside, table | COPIED);
    let recording = RecordingStorage::with_contents(&damaged.0);
    let report = repair(&recording, Repair::All, &mut ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let mut moved = 0;
    for point in recording.crash_points() {
        let image = RawImage(point.storage().to_vec());
        if image.get(image.l1_at(0)) & OFFSET != table {
            assert_eq!(owned_by_two(&image), 0, "{point:?}");
            moved += 1;
        }
    }
    assert!(moved > 0);
}

/// A refcount of one bit cannot say that two tables share data: a write would free it. So the image stays one
/// that is not written.
#[test]
fn tables_stay_where_refcounts_cannot_count_what_they_share() {
    for bits in [1, 2] {
        let mut damaged = one_table_by_accident(bits);
        if bits == 2 {
            let l1 = damaged.append(4 * 8);
            let entry = damaged.get(damaged.l1_at(0));
            (0..4).for_each(|index| damaged.set(l1 + index * 8, entry));
            damaged.set(40, l1);
            damaged.set_len(36, 4, 4);
        }
        let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
        for round in 0..2 {
            let report = repair(&*storage, Repair::All, &mut ()).unwrap();
            assert!(report.corruptions > 0, "{bits}, {round}: {report:?}");
            let refused = open(&storage).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Corrupt, "{bits}, {round}: {refused}");
            assert!(readable(&storage.to_vec()) == readable(&damaged.0), "{bits}, {round}");
        }
    }
}
