//! Persistent bitmaps: their directory, tables and bits.

use blockmirror_block::Storage;
use blockmirror_block::testing::MemoryStorage;

use super::row::{CLUSTER, Row, Sound, bitmap_directory};
use crate::raw_image::RawImage;

const BITS: &str = "bits of persistent bitmaps";

/// The entry of the first bitmap.
fn first(image: &mut RawImage, at: u64, len: usize, value: u64) {
    let directory = bitmap_directory(image);
    image.set_len(directory + at, value, len);
}

/// Where the table of the first bitmap lies.
fn table_of(image: &RawImage) -> u64 {
    image.get(bitmap_directory(image))
}

/// Three bitmaps that each have 512 MiB of stored bits, in holes of the file.
fn many_bits() -> MemoryStorage {
    const SIZE: u64 = 2 << 40;
    const BIG: u64 = 2 << 20;
    const STORED: u64 = 256;
    let storage = MemoryStorage::new();
    let mut options = blockmirror_qcow2::CreateOptions::new(SIZE);
    options.cluster_size = BIG;
    options.create(&storage, None).unwrap();
    let mut image = RawImage(storage.to_vec());
    let directory = image.append(BIG);
    let tables = image.append(3 * BIG);
    let bits = image.len();
    for index in 0..3 {
        let (entry, table) = (directory + index * 32, tables + index * BIG);
        image.set(entry, table);
        image.set_len(entry + 8, STORED, 4);
        image.set_len(entry + 12, 2, 4);
        image.set_len(entry + 16, 0x0109_0001, 4);
        image.0[entry as usize + 24] = b'a' + index as u8;
        (0..STORED).for_each(|at| image.set(table + at * 8, bits + (index * STORED + at) * BIG));
    }
    extension(&mut image, 3, 96, directory);
    let storage = MemoryStorage::with_contents(&image.0);
    storage.set_len(bits + 3 * STORED * BIG).unwrap();
    storage
}

/// The only extension of the header is that of bitmaps.
pub(super) fn extension(image: &mut RawImage, count: u64, size: u64, directory: u64) {
    let at = image.number(100, 4);
    image.set(at, 0x2385_2875 << 32 | 24);
    image.set(at + 8, count << 32);
    image.set(at + 16, size);
    image.set(at + 24, directory);
    image.set(at + 32, 0);
    image.set(88, 1);
}

pub(super) fn rows() -> Vec<Row> {
    [directory(), tables()].into_iter().flatten().collect()
}

fn directory() -> Vec<Row> {
    let row = |name, change| Row::changed(name, Sound::Bitmaps, change);
    vec![
        row("a bitmap of type 2", |image| first(image, 16, 1, 2)),
        row("a bitmap with an unknown flag", |image| first(image, 12, 4, 8)),
        row("a bitmap of 256 bytes for a bit", |image| first(image, 17, 1, 8)).cap("BITMAP_GRANULARITY_BITS"),
        row("a bitmap of 4 GiB for a bit", |image| first(image, 17, 1, 32)).cap("BITMAP_GRANULARITY_BITS"),
        row("a bitmap without a name", |image| first(image, 18, 2, 0)),
        row("a bitmap with a name of 1024 bytes", |image| first(image, 18, 2, 1024)).cap("MAX_BITMAP_NAME"),
        row("a bitmap with extra data", |image| first(image, 20, 4, 1)),
        row("a bitmap whose name leaves the directory", |image| first(image, 18, 2, 100)),
        row("two bitmaps with one name", |image| {
            let second = bitmap_directory(image) + 32 + 24;
            image.0[second as usize] = b'a';
        }),
        row("a bitmap directory longer than its bitmaps", |image| {
            let extension = image.number(100, 4) + 8;
            image.set_len(extension, 1, 4);
        }),
    ]
}

fn tables() -> Vec<Row> {
    let row = |name, change| Row::changed(name, Sound::Bitmaps, change);
    vec![
        row("a bitmap table between clusters", |image| {
            let table = table_of(image);
            first(image, 0, 8, table + 512);
        }),
        row("a bitmap table in the header", |image| first(image, 0, 8, 0)),
        row("a bitmap table past the end of the file", |image| first(image, 0, 8, 1 << 40)),
        row("a bitmap table without entries", |image| first(image, 8, 4, 0)),
        row("a bitmap of more than 512 MiB", |image| first(image, 8, 4, (512 << 20) / CLUSTER + 1))
            .cap("MAX_BITMAP_BYTES")
            .limit(BITS),
        row("bitmap tables of more than 64 MiB", |image| first(image, 8, 4, u64::from(u32::MAX)))
            .cap("MAX_BITMAP_TABLES_BYTES")
            .limit(BITS),
        Row::sparse("more than 1 GiB of stored bits", many_bits).cap("MAX_LOADED_BITMAP_BYTES").limit(BITS),
        row("a bitmap table entry with reserved bits", |image| {
            let table = table_of(image);
            image.set(table, 2);
        }),
        row("a bitmap table entry that is stored and set", |image| {
            let table = table_of(image);
            image.change(table, |entry| entry | 1);
        }),
        row("bits of a bitmap past the end of the file", |image| {
            let table = table_of(image);
            image.set(table, 1 << 40);
        }),
        row("bits of a bitmap in the L1 table", |image| {
            let (table, l1) = (table_of(image), image.get(40));
            image.set(table, l1);
        })
        .limit("two tables in one cluster"),
        row("a bitmap that is too short for the disk", |image| {
            // A bit for 512 bytes of 1 TiB.
            first(image, 17, 1, 9);
            let l1 = image.append(8 * (1 << 19));
            image.set_len(36, 1 << 19, 4);
            image.set(40, l1);
            image.set(24, 1 << 40);
        }),
    ]
}
