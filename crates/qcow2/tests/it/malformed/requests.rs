//! Sound images that cannot have what they are asked for.

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, Storage};
use blockmirror_qcow2::{BitmapOptions, Error, NewSnapshot, Qcow2, SnapshotRef};

use super::bitmaps::extension;
use super::row::{Row, Sound, bitmap_directory, snapshot};
use crate::check::SIZE;
use crate::raw_image::{OFFSET, RawImage};

const UNCOUNTABLE: &str =
    "snapshots in an image with an external data file, or one more than its refcounts can count";

fn grow(disk: &Qcow2) -> Result<(), Error> {
    Ok(disk.resize(2 * SIZE, false)?)
}

fn add_bitmap(disk: &Qcow2) -> Result<(), Error> {
    disk.add_bitmap("new", &BitmapOptions::new())
}

/// As many bitmaps as a directory can have, each with a table of one entry.
fn most_bitmaps() -> MemoryStorage {
    const COUNT: u64 = 65535;
    const ENTRY: u64 = 32;
    let mut image = Sound::Small.make();
    let size = image.cluster();
    let directory = image.append(COUNT * ENTRY);
    let tables = image.append(COUNT * size);
    for index in 0..COUNT {
        let at = directory + index * ENTRY;
        image.set(at, tables + index * size);
        image.set_len(at + 8, 1, 4);
        image.set_len(at + 12, 2, 4);
        image.set_len(at + 16, 0x0110_0002, 4);
        image.set_len(at + 24, index, 2);
    }
    extension(&mut image, COUNT, COUNT * ENTRY, directory);
    MemoryStorage::with_contents(&image.0)
}

/// A snapshot of a disk that had half the length.
fn shorter_snapshot(image: &mut RawImage) {
    image.add_snapshot();
    let at = image.get(64) + 48;
    image.set(at, SIZE / 2);
}

pub(super) fn rows() -> Vec<Row> {
    [snapshots(), bitmaps(), lengths()].into_iter().flatten().collect()
}

fn snapshots() -> Vec<Row> {
    vec![
        Row::changed("a snapshot with a data file", Sound::DataFile, |_| ())
            .limit(UNCOUNTABLE)
            .asked(snapshot),
        Row::changed("a snapshot with refcounts of one bit", Sound::OneBit, |_| ())
            .limit(UNCOUNTABLE)
            .asked(snapshot),
        Row::changed("a snapshot with a name of 256 bytes", Sound::Plain, |_| ())
            .cap("MAX_NAME")
            .asked(|disk| disk.create_snapshot(&NewSnapshot::new("n".repeat(256))).map(drop)),
        Row::changed("a snapshot of another length, in version 2", Sound::Version2, shorter_snapshot)
            .limit("a snapshot of another length, applied")
            .asked(|disk| disk.apply_snapshot(&SnapshotRef::Id("1".into())).map(drop)),
        Row::changed("a snapshot of an L2 table whose refcount is 0", Sound::Plain, |image| {
            let table = image.get(image.l1_at(0)) & OFFSET;
            let block = image.get(image.refcount_table());
            image.set_len(block + table / image.cluster() * 2, 0, 2);
        })
        .asked(snapshot),
    ]
}

fn bitmaps() -> Vec<Row> {
    vec![
        Row::changed("a bitmap in version 2", Sound::Version2, |_| ()).asked(add_bitmap),
        Row::changed("a bitmap of a disk without bytes", Sound::Plain, |image| image.set(24, 0))
            .asked(add_bitmap),
        Row::sparse("one more bitmap than a directory can have", most_bitmaps)
            .cap("MAX_BITMAPS")
            .asked(add_bitmap),
        Row::sparse("a bitmap of more than 512 MiB of bits", || {
            let storage = MemoryStorage::new();
            let options = blockmirror_qcow2::CreateOptions::new(4 << 40);
            options.create(&storage, None).unwrap();
            storage
        })
        .cap("MAX_BITMAP_BYTES")
        .asked(|disk| disk.add_bitmap("new", &BitmapOptions::new().granularity(512))),
        Row::changed("an inconsistent bitmap that is read", Sound::Bitmaps, in_use)
            .asked(|disk| disk.read_bitmap("a").map(drop)),
        Row::changed("an inconsistent bitmap whose disk becomes longer", Sound::Bitmaps, in_use)
            .limit("resize with persistent bitmaps")
            .asked(grow),
    ]
}

/// The first bitmap was not stored.
fn in_use(image: &mut RawImage) {
    let flags = bitmap_directory(image) + 12;
    image.set_len(flags, 1, 4);
}

fn lengths() -> Vec<Row> {
    vec![
        Row::changed("a longer disk with snapshots in version 2", Sound::Version2, RawImage::add_snapshot)
            .limit("resize of a version 2 image with snapshots")
            .asked(grow),
        Row::changed("a longer disk without its backing file", Sound::Backed, |_| ())
            .limit("resize with a backing file that is not open")
            .asked(grow),
        Row::changed("a longer disk than an L1 table covers", Sound::Small, |_| ())
            .cap("MAX_L1_BYTES")
            .asked(|disk| Ok(disk.resize(1 << 50, false)?)),
        Row::sparse("a device without room", || {
            let image = Sound::Plain.make();
            let storage = MemoryStorage::fixed(image.len());
            storage.write_at(&image.0, 0).unwrap();
            storage
        })
        .asked(|disk| Ok(disk.write_at(&[1; 65536], 100_000, Default::default())?)),
    ]
}
