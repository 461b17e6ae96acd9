//! The snapshot table, and the tables of snapshots.

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, Storage, WriteFlags};
use blockmirror_qcow2::SnapshotRef;

use super::row::{CLUSTER, Row, Sound};
use crate::raw_image::{OFFSET, RawImage};

const DAMAGED: &str = "snapshots whose L1 tables overlap, leave the file, or name a table past its end";

/// Where the only entry of the snapshot table lies.
fn entry(image: &RawImage) -> u64 {
    image.get(64)
}

/// A second snapshot, with the L1 table of the first.
fn twice(image: &mut RawImage) {
    let at = entry(image) as usize;
    image.0.copy_within(at..at + 64, at + 64);
    image.0[at + 64 + 56..at + 64 + 58].copy_from_slice(b"2b");
    image.set_len(60, 2, 4);
}

/// The cluster that the snapshot alone has is not counted.
fn uncount(image: &mut RawImage) {
    let l2 = image.get(image.get(entry(image))) & OFFSET;
    let mapped = (l2..l2 + CLUSTER).step_by(8).find(|at| image.get(*at) != 0).unwrap();
    let host = image.get(mapped) & OFFSET;
    let block = image.get(image.refcount_table());
    image.set_len(block + host / CLUSTER * 2, 0, 2);
}

/// A snapshot table whose entries, of 64 KiB each, take more than 64 MiB.
fn long_table() -> MemoryStorage {
    const ENTRIES: u64 = 1100;
    let mut image = Sound::Snapshot.make();
    let (first, table) = (entry(&image), image.len().next_multiple_of(CLUSTER));
    let mut fixed = image.0[first as usize..][..40].to_vec();
    fixed[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
    image.set(64, table);
    image.set_len(60, ENTRIES, 4);
    let storage = MemoryStorage::with_contents(&image.0);
    let len = (40 + 16 + 1 + u64::from(u16::MAX)).next_multiple_of(8);
    (0..ENTRIES).for_each(|index| storage.write_at(&fixed, table + index * len).unwrap());
    storage.set_len(table + ENTRIES * len).unwrap();
    storage
}

pub(super) fn rows() -> Vec<Row> {
    [table(), tables()].into_iter().flatten().collect()
}

fn table() -> Vec<Row> {
    let row = |name, change| Row::changed(name, Sound::Snapshot, change);
    vec![
        row("a snapshot table past the end of the file", |image| image.set(64, 1 << 40)),
        row("a file that ends inside the fixed part of a snapshot", |image| {
            let end = entry(image) + 39;
            image.0.truncate(end as usize);
        })
        .cap("MIN_SNAPSHOT_ENTRY"),
        row("a file that ends inside the name of a snapshot", |image| {
            let end = entry(image) + 56;
            image.0.truncate(end as usize);
        }),
        row("a snapshot with 1025 bytes of extra data", |image| {
            let at = entry(image) + 36;
            image.set_len(at, 1025, 4);
        })
        .cap("MAX_SNAPSHOT_EXTRA"),
        Row::sparse("a snapshot table of more than 64 MiB", long_table).cap("MAX_SNAPSHOT_TABLE_BYTES"),
        row("a snapshot that does not say how long the disk was", |image| {
            let at = entry(image);
            image.set_len(at + 36, 0, 4);
            image.0.copy_within(at as usize + 56..at as usize + 58, at as usize + 40);
        }),
        row("a snapshot of a disk of 2^62 bytes", |image| {
            let at = entry(image) + 48;
            image.set(at, 1 << 62);
        })
        .read_by(|options| options.snapshot(SnapshotRef::Id("1".into()))),
        row("a snapshot that is not there", |_| ())
            .read_by(|options| options.snapshot(SnapshotRef::Id("7".into()))),
    ]
}

/// What a snapshot refers to.
fn tables() -> Vec<Row> {
    let row = |name, change| Row::changed(name, Sound::Snapshot, change).limit(DAMAGED);
    vec![
        row("a snapshot whose L1 table lies between clusters", |image| {
            let at = entry(image);
            image.change(at, |l1| l1 + 512);
        }),
        row("a snapshot whose L1 table lies past 2^56", |image| {
            let at = entry(image);
            image.set(at, 1 << 56);
        })
        .cap("MAX_HOST_OFFSET"),
        row("a snapshot whose L1 table has more than 32 MiB", |image| {
            let at = entry(image) + 8;
            image.set_len(at, (4 << 20) + 1, 4);
        })
        .cap("MAX_L1_BYTES"),
        row("a snapshot whose L1 table leaves the file", |image| {
            let at = entry(image) + 8;
            image.set_len(at, 1 << 20, 4);
        }),
        row("two snapshots with one L1 table", twice),
        row("a snapshot with the L1 table of the disk", |image| {
            let (at, l1) = (entry(image), image.get(40));
            image.set(at, l1);
        }),
        row("a snapshot with an L2 table past the end of the file", |image| {
            let l1 = image.get(entry(image));
            image.set(l1, 1 << 40);
        }),
        row("a snapshot with an L2 table between clusters", |image| {
            let l1 = image.get(entry(image));
            image.change(l1, |table| table + 512);
        }),
        row("a snapshot of a cluster whose refcount is 0", uncount)
            .asked(|disk| disk.delete_snapshot(&SnapshotRef::Id("1".into())).map(drop)),
        Row::sparse("a snapshot of a cluster whose refcount is 0, on a device", || {
            let mut image = Sound::Snapshot.make();
            uncount(&mut image);
            let storage = MemoryStorage::fixed(image.len() + (1 << 20));
            storage.write_at(&image.0, 0).unwrap();
            storage
        })
        .asked(|disk| Ok(disk.write_at(&[1; 4096], 100_000, WriteFlags::NONE)?)),
        Row::changed("snapshots with refcounts of one bit", Sound::OneBit, |image| {
            let (l1, size) = (image.get(40), image.get(24));
            let at = image.append(512);
            image.set(at, l1);
            image.set_len(at + 8, image.number(36, 4), 4);
            image.set_len(at + 12, 0x0001_0001, 4);
            image.set_len(at + 36, 16, 4);
            image.set(at + 48, size);
            // Its own L1 table, with the tables of the disk.
            let copy = image.append(512);
            image.0.copy_within(l1 as usize..l1 as usize + 512, copy as usize);
            image.set(at, copy);
            image.set_len(60, 1, 4);
            image.set(64, at);
        }),
    ]
}
