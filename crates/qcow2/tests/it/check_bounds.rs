//! What a check reads is bounded by the file, whatever the image says of itself: counted, never timed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_qcow2::check;

use crate::check::image;
use crate::hostile::counted::Counted;
use crate::raw_image::{COPIED, OFFSET, RawImage};

const SNAPSHOTS: u64 = 65536;
const BITMAPS: u64 = 65535;
/// Bytes of an entry of the snapshot table here, and of the bitmap directory.
const SNAPSHOT: u64 = 64;
const BITMAP: u64 = 32;

/// A change that makes a check read as much as it can, and the entries of directories that it adds.
type Hostile = (&'static str, u64, fn(&mut RawImage));

const ALL: &[Hostile] = &[
    ("nothing", 0, |_| {}),
    ("one L2 table for all", 0, one_table),
    ("one refcount block for all", 0, one_block),
    ("refcount blocks far apart", 0, far_blocks),
    ("L1 tables of snapshots over all of the file", SNAPSHOTS, snapshots_over_everything),
    ("tables of bitmaps over all of the file", BITMAPS, bitmaps_over_everything),
];

fn one_table(image: &mut RawImage) {
    let entries = 4096;
    let l1 = image.append(entries * 8);
    let table = image.get(image.l1_at(0)) & OFFSET;
    (0..entries).for_each(|index| image.set(l1 + index * 8, table | COPIED));
    image.set(40, l1);
    image.set_len(36, entries, 4);
}

fn one_block(image: &mut RawImage) {
    let (table, size) = (image.refcount_table(), image.cluster());
    let block = image.get(table);
    (0..size / 8).for_each(|index| image.set(table + index * 8, block));
    // As many clusters as the table counts.
    let reach = size / 8 * (size * 8 / 64) * size;
    image.0.resize(reach.min(16 << 20) as usize, 0);
}

/// Entries that follow each other are counted in different blocks, which lie 2 MiB from each other.
fn far_blocks(image: &mut RawImage) {
    const TABLES: u64 = 2000;
    const BLOCKS: u64 = 12;
    let size = image.cluster();
    image.0.resize(16 << 20, 0);
    let first = image.append(TABLES * size);
    for (index, at) in (0..TABLES * size / 8).zip((first..).step_by(8)) {
        image.set(at, ((index % BLOCKS * 512 + 300) * size) | COPIED);
    }
    let l1 = image.append(TABLES * 8);
    (0..TABLES).for_each(|index| image.set(l1 + index * 8, (first + index * size) | COPIED));
    image.set(40, l1);
    image.set_len(36, TABLES, 4);
    image.0.resize(25 << 20, 0);
    let table = image.refcount_table();
    (0..BLOCKS).for_each(|index| image.set(table + index * 8, (index << 21) + (1 << 20)));
}

fn snapshots_over_everything(image: &mut RawImage) {
    let table = image.append(SNAPSHOTS * SNAPSHOT);
    for index in 0..SNAPSHOTS {
        let at = table + index * SNAPSHOT;
        let start = index * image.cluster() % table;
        image.set(at, start);
        image.set_len(at + 8, (image.len() - start) / 8, 4);
        image.set_len(at + 12, 0x0001_0001, 4);
        image.set_len(at + 36, 16, 4);
    }
    image.set_len(60, SNAPSHOTS, 4);
    image.set(64, table);
}

fn bitmaps_over_everything(image: &mut RawImage) {
    image.add_bitmaps();
    let directory = image.append(BITMAPS * BITMAP);
    for index in 0..BITMAPS {
        let at = directory + index * BITMAP;
        let start = (index * image.cluster() % directory).max(image.cluster());
        image.set(at, start);
        image.set_len(at + 8, (image.len() - start) / 8, 4);
        image.set_len(at + 16, 0x0110_0002, 4);
        image.set_len(at + 24, index, 2);
    }
    let extension = image.number(100, 4) + 8;
    image.set_len(extension, BITMAPS, 4);
    image.set(extension + 8, BITMAPS * BITMAP);
    image.set(extension + 16, directory);
}

#[test]
fn what_is_read_is_bounded_by_the_file() {
    for (name, entries, change) in ALL {
        let mut hostile = RawImage(image(|o| (o.cluster_size, o.refcount_bits) = (4096, 64)));
        change(&mut hostile);
        let storage = Counted::over(Arc::new(MemoryStorage::with_contents(&hostile.0)));
        let report = check(&storage, &mut ()).unwrap();
        let (reads, clusters) = (storage.reads() as u64, hostile.len().div_ceil(hostile.cluster()));
        assert_eq!(report.is_clean(), *name == "nothing", "{name}");
        assert!(reads <= 16 + 7 * clusters + 4 * entries, "{name}: {reads} reads, {clusters} clusters");
    }
}
