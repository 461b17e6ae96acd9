//! Images that make a check, or a repair, work as much as they can: tables that many entries share, and
//! directories and tables at their caps.

use crate::check::image;
use crate::raw_image::{COPIED, OFFSET, RawImage};

const SNAPSHOTS: u64 = 65536;
const BITMAPS: u64 = 65535;
/// Bytes of an entry of the snapshot table here, and of the bitmap directory.
const SNAPSHOT: u64 = 64;
const BITMAP: u64 = 32;
/// Snapshots whose strings are as long as can be, as many as a table of 64 MiB holds.
const LONG_SNAPSHOTS: u64 = (64 << 20) / LONG_SNAPSHOT;
const LONG_SNAPSHOT: u64 = (40 + 16 + 2 * 65535_u64).next_multiple_of(8);
/// Bytes of an entry of a bitmap directory that has [`BITMAPS`] of them in 64 MiB.
const LONG_BITMAP: u64 = 1024;

/// The first of all: a sound image.
pub(super) const SOUND: &str = "nothing";

/// A change that makes a check read as much as it can.
pub(super) struct Shape {
    pub(super) name: &'static str,
    /// Entries of directories that it adds.
    pub(super) entries: u64,
    change: fn(&mut RawImage),
}

/// All shapes.
pub(super) const ALL: [Shape; 17] = [
    Shape::new(SOUND, 0, |_| {}),
    Shape::new("one L2 table for all", 0, one_table),
    Shape::new("one L2 table for an L1 table of 32 MiB", 0, |image| long_l1(image, 0)),
    Shape::new("an L1 table of 32 MiB of reserved bits", 0, |image| long_l1(image, 1 << 57 | 1)),
    Shape::new("one refcount block for all", 0, one_block),
    Shape::new("one refcount block for a table of 8 MiB", 0, |image| long_table(image, 0)),
    Shape::new("a refcount table of 8 MiB that points between clusters", 0, |image| long_table(image, 512)),
    Shape::new("refcount blocks far apart", 0, far_blocks),
    Shape::new("entries that follow each other are counted in pieces that share a place", 0, far_pieces),
    Shape::new("entries past the end, all counted in one block", 0, past_the_end),
    Shape::new("an L1 table over all of the file, and each cluster an L2 table", 0, tables_in_a_table),
    Shape::new("L1 tables of snapshots over all of the file", SNAPSHOTS, snapshots_over_everything),
    Shape::new("tables of bitmaps over all of the file", BITMAPS, bitmaps_over_everything),
    Shape::new("a snapshot table of 64 MiB", LONG_SNAPSHOTS, long_snapshots),
    Shape::new("a bitmap directory of 64 MiB", BITMAPS, long_bitmaps),
    Shape::new("a bitmap directory of 64 MiB, each with a table of its own", BITMAPS, sound_bitmaps),
    Shape::new("both directories of 64 MiB", LONG_SNAPSHOTS + BITMAPS, |image| {
        long_bitmaps(image);
        long_snapshots(image);
    }),
];

impl Shape {
    const fn new(name: &'static str, entries: u64, change: fn(&mut RawImage)) -> Self {
        Self { name, entries, change }
    }

    pub(super) fn make(&self) -> RawImage {
        let mut image = RawImage(image(|o| (o.cluster_size, o.refcount_bits) = (4096, 64)));
        (self.change)(&mut image);
        image
    }
}

fn one_table(image: &mut RawImage) {
    let entries = 4096;
    let l1 = image.append(entries * 8);
    let table = image.get(image.l1_at(0)) & OFFSET;
    (0..entries).for_each(|index| image.set(l1 + index * 8, table | COPIED));
    image.set(40, l1);
    image.set_len(36, entries, 4);
}

/// An L1 table of 2^22 entries, which all name the first L2 table, and have `more` bits.
fn long_l1(image: &mut RawImage, more: u64) {
    const ENTRIES: u64 = 1 << 22;
    let table = image.get(image.l1_at(0)) & OFFSET;
    let l1 = image.append(ENTRIES * 8);
    (0..ENTRIES).for_each(|index| image.set(l1 + index * 8, table | COPIED | more));
    image.set(40, l1);
    image.set_len(36, ENTRIES, 4);
}

/// A refcount table of 2^20 entries, which all name what lies `past` the first block.
fn long_table(image: &mut RawImage, past: u64) {
    const ENTRIES: u64 = 1 << 20;
    let block = image.get(image.refcount_table()) + past;
    let table = image.append(ENTRIES * 8);
    (0..ENTRIES).for_each(|index| image.set(table + index * 8, block));
    image.set(48, table);
    image.set_len(56, ENTRIES * 8 / image.cluster(), 4);
}

/// The first snapshot does not say how long the disk was, so that a repair writes the table anew.
fn long_snapshots(image: &mut RawImage) {
    let table = image.append(LONG_SNAPSHOTS * LONG_SNAPSHOT);
    image.0[table as usize..].fill(0xff);
    let mut at = table;
    for index in 0..LONG_SNAPSHOTS {
        let extra = if index == 0 { 8 } else { 16 };
        image.0[at as usize..][..56].fill(0);
        image.set_len(at + 12, 0xffff_ffff, 4);
        image.set_len(at + 36, extra, 4);
        at = (at + 40 + extra + 2 * 65535).next_multiple_of(8);
    }
    image.set_len(60, LONG_SNAPSHOTS, 4);
    image.set(64, table);
}

/// Names that are no text take three times their length as text.
fn long_bitmaps(image: &mut RawImage) {
    let table = image.cluster();
    bitmaps_with_long_names(image, |_| table);
}

/// An image that can be opened for writing.
fn sound_bitmaps(image: &mut RawImage) {
    // The smallest in whose first cluster the names of features have room beside the directory's.
    *image = RawImage(crate::check::image(|o| o.cluster_size = 1024));
    let size = image.cluster();
    let tables = image.append(BITMAPS * size);
    bitmaps_with_long_names(image, |index| tables + index * size);
}

/// Disabled bitmaps, whose tables lie where `table_of` says.
fn bitmaps_with_long_names(image: &mut RawImage, table_of: impl Fn(u64) -> u64) {
    image.add_bitmaps();
    let directory = image.append(BITMAPS * LONG_BITMAP);
    image.0[directory as usize..].fill(0xff);
    for index in 0..BITMAPS {
        let at = directory + index * LONG_BITMAP;
        image.set(at, table_of(index));
        image.set_len(at + 8, 1, 4);
        image.set_len(at + 12, 0, 4);
        image.set_len(at + 16, 0x0110_03e8, 4);
        image.set_len(at + 20, 0, 4);
        image.set_len(at + 24, index, 2);
    }
    name_directory(image, BITMAPS * LONG_BITMAP, directory);
}

/// Has the header name a directory of [`BITMAPS`].
fn name_directory(image: &mut RawImage, size: u64, directory: u64) {
    let extension = image.number(100, 4) + 8;
    image.set_len(extension, BITMAPS, 4);
    image.set(extension + 8, size);
    image.set(extension + 16, directory);
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

/// An image with the smallest clusters and the widest refcounts.
fn small_clusters() -> RawImage {
    RawImage(image(|o| (o.cluster_size, o.refcount_bits) = (512, 64)))
}

/// The refcounts of the two clusters that the entries of all tables name lie 512 pieces from each other.
fn far_pieces(image: &mut RawImage) {
    const TABLES: u64 = 12_000;
    const CLUSTERS: u64 = 36_000;
    *image = small_clusters();
    let size = image.cluster();
    let per_block = size / 8;
    let (old, blocks) = (image.get(image.refcount_table()), CLUSTERS.div_ceil(per_block));
    let table = image.append(blocks * 8);
    let block = image.append(blocks * size);
    (0..blocks).for_each(|index| image.set(table + index * 8, block + index * size));
    image.set(table, old);
    image.set(48, table);
    image.set_len(56, (blocks * 8).div_ceil(size), 4);
    let first = image.append(TABLES * size);
    for (index, at) in (0..TABLES * size / 8).zip((first..).step_by(8)) {
        image.set(at, ((100 + index % 2 * 512 * per_block) * size) | COPIED);
    }
    let l1 = image.append(TABLES * 8);
    (0..TABLES).for_each(|index| image.set(l1 + index * 8, (first + index * size) | COPIED));
    image.set(40, l1);
    image.set_len(36, TABLES, 4);
    image.0.resize((CLUSTERS * size) as usize, 0);
}

/// Each entry of a table names a cluster of a block of its own, and all those are one block.
fn past_the_end(image: &mut RawImage) {
    let (size, table) = (image.cluster(), image.refcount_table());
    let (block, per_block) = (image.get(table), size / 8);
    (0..size / 8).for_each(|index| image.set(table + index * 8, block));
    let l2 = image.l2_at(0);
    (0..size / 8).for_each(|index| image.set(l2 + index * 8, ((index * per_block + 300) * size) | COPIED));
}

/// A repair copies each L2 table and the L1 table.
fn tables_in_a_table(image: &mut RawImage) {
    *image = small_clusters();
    let size = image.cluster();
    let clusters = (16 << 20) / size;
    let l1 = image.get(40);
    image.0.resize((clusters * size) as usize, 0);
    image.0[l1 as usize..].fill(0);
    let first = l1 / size;
    image.set_len(36, (clusters - first) * size / 8, 4);
    (first..clusters).for_each(|at| image.set(l1 + (at - first) * 8, (at * size) | COPIED));
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
    name_directory(image, BITMAPS * BITMAP, directory);
}
