//! Refcounts that reach past the end of the file: what a crash leaves, and what a file that was cut short
//! looks like. The first is written, whatever its size; the second never becomes longer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use crate::common::{qemu_check_finds_no_corruption, word};
use crate::hostile::counted::Counted;
use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, CutShort, Error, Header, OpenOptions, Qcow2, Result};

const CLUSTER: u64 = 65_536;
/// Entries of one L2 table, and of the refcount block.
const ENTRIES: u64 = CLUSTER / 8;
const COPIED: u64 = 1 << 63;
/// L2 tables of a large image: more entries than opening looks at.
const TABLES: u64 = (1 << 24) / ENTRIES + 50;
/// Where they lie, in clusters.
const FIRST: u64 = 16;
/// Where the file ends.
const END: u64 = (FIRST + TABLES) * CLUSTER;
/// The guest cluster of an entry in the last table.
const LAST: u64 = ((TABLES - 1) * ENTRIES + 5) * CLUSTER;

fn set_word(storage: &MemoryStorage, at: u64, value: u64) {
    storage.write_at(&value.to_be_bytes(), at).unwrap();
}

fn table_at(index: u64) -> u64 {
    (FIRST + index) * CLUSTER
}

/// An image with many empty tables, in holes of its file. The cluster past the end of the file is counted.
fn large() -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new();
    CreateOptions::new(2 << 40).create(&storage, None).unwrap();
    let (l1, block) = (word(&storage, 40), word(&storage, word(&storage, 48)));
    let tables: Vec<u8> = (0..TABLES).flat_map(|i| (table_at(i) | COPIED).to_be_bytes()).collect();
    storage.write_at(&tables, l1).unwrap();
    let counts: Vec<u8> = (0..=TABLES).flat_map(|_| 1_u16.to_be_bytes()).collect();
    storage.write_at(&counts, block + FIRST * 2).unwrap();
    storage.set_len(END).unwrap();
    Arc::new(storage)
}

fn open(storage: &Arc<MemoryStorage>) -> Result<Qcow2> {
    OpenOptions::new().writable(true).open(storage.clone())
}

/// A crash left a leak past the end of the file, and the image had more L2 entries than opening looks at: it
/// opened for reading only from then on.
#[test]
fn a_leak_past_the_end_of_a_large_image() {
    let storage = large();
    let disk = open(&storage).unwrap();
    disk.write_at(&[7; 4096], 1 << 20, WriteFlags::FUA).unwrap();
    disk.write_at(&[8; 4096], LAST, WriteFlags::FUA).unwrap();
    drop(disk);
    let disk = open(&storage).unwrap();
    for (at, byte) in [(1 << 20, 7), (LAST, 8)] {
        let mut found = [0; 4096];
        disk.read_at(&mut found, at).unwrap();
        assert_eq!(found, [byte; 4096]);
    }
}

/// The look at the rest of the tables can be stopped, and is made again.
#[test]
fn the_look_at_a_large_image_can_be_stopped() {
    let storage = large();
    // Tables in holes are not read.
    let table = TABLES - 100;
    set_word(&storage, table_at(table), 1);
    let (disk, counted) = Counted::open(&storage);
    counted.cancel_at(&disk, None, ByteRange::at(table_at(table), CLUSTER));
    let stopped = disk.write_at(&[7; 4096], 1 << 20, WriteFlags::NONE).unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::Cancelled);
    assert!(counted.reads() < 10);
    assert_eq!(storage.len().unwrap(), END);
    disk.write_at(&[7; 4096], 1 << 20, WriteFlags::FUA).unwrap();
    assert!(counted.reads() < 100);
}

/// The same look of the file, but an entry that opening does not come to maps what is missing: nothing makes
/// the file longer, so that the loss stays to be seen.
#[test]
fn a_large_image_that_was_cut_short_does_not_grow() {
    let storage = large();
    set_word(&storage, table_at(TABLES - 1) + 5 * 8, END | COPIED);
    let disk = open(&storage).unwrap();
    for _ in 0..2 {
        for at in [1 << 20, LAST] {
            let error = disk.write_at(&[7; 4096], at, WriteFlags::NONE).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::CutShort, "{at}: {error}");
            assert!(error.to_string().contains(&format!("{LAST}")), "{error}");
        }
        // A part of a cluster takes data.
        let range = ByteRange::at((1 << 20) + 512, 512);
        disk.write_zeroes(ByteRange::at(LAST + 512, 512), ZeroFlags::NONE).unwrap_err();
        disk.write_zeroes(range, ZeroFlags::NONE).unwrap();
        assert_eq!(disk.resize(1 << 50, false).unwrap_err().kind(), ErrorKind::CutShort);
        assert_eq!(disk.preallocate(range).unwrap_err().kind(), ErrorKind::CutShort);
        disk.flush().unwrap();
        assert_eq!(storage.len().unwrap(), END);
    }
    assert_eq!(disk.read_at(&mut [0], LAST).unwrap_err().kind(), ErrorKind::CutShort);
}

/// A table that is missing is found at opening, whatever the number of tables.
#[test]
fn a_large_image_that_lacks_a_table_is_not_written() {
    let storage = large();
    set_word(&storage, word(&storage, 40) + TABLES * 8, END | COPIED);
    let refused = open(&storage).unwrap_err();
    assert!(matches!(&refused, Error::Storage(e) if e.kind() == ErrorKind::CutShort), "{refused}");
    assert_eq!(storage.len().unwrap(), END);
}

/// A storage whose reads fail looked like a file that was cut short: `info` said so of a sound image. And a
/// table that could not be read was passed over: what lies past the end by it was not missing.
#[test]
fn a_storage_that_fails_was_not_cut_short() {
    let storage = MemoryStorage::new();
    CreateOptions::new(1 << 30).create(&storage, None).unwrap();
    let storage = Arc::new(storage);
    open(&storage).unwrap().write_at(&[7; 200_000], 0, WriteFlags::FUA).unwrap();
    let whole = storage.len().unwrap();
    for len in [whole, whole - CLUSTER] {
        storage.set_len(len).unwrap();
        let header = Header::read(&*storage).unwrap();
        let missing = CutShort::find(storage.clone(), &header).unwrap().map(|cut| cut.missing);
        assert_eq!(missing, (len < whole).then_some(CLUSTER));
        let mut failed = 0;
        loop {
            let faults = Faults::new();
            faults.inject(Fault::on(OpKind::Read).after(failed).with(ErrorKind::Io));
            let faulty = Arc::new(FaultStorage::new(storage.clone(), faults.clone()));
            let found = CutShort::find(faulty, &header);
            if faults.failed() == 0 {
                break;
            }
            assert!(
                matches!(&found, Err(Error::Storage(e)) if e.kind() == ErrorKind::Io),
                "{failed}: {found:?}"
            );
            failed += 1;
        }
        // Refcounts alone where all is there; else header, L1 table and L2 table too.
        assert!(failed >= if len < whole { 5 } else { 2 }, "{failed}");
    }
}

/// The last cluster that the first refcount block counts.
fn last_counted(image: &MemoryStorage) -> u64 {
    let mut block = vec![0; 16_384];
    image.read_at(&mut block, word(image, word(image, 48))).unwrap();
    block.as_chunks::<2>().0.iter().rposition(|count| *count != [0, 0]).unwrap() as u64
}

/// A flush while a write has its clusters, but not its data yet: the counts reached the disk before the file
/// was as long. A process that ended there left what looks like a file that was cut short.
#[test]
fn a_file_is_as_long_as_what_is_counted() {
    for extended in [false, true] {
        let recording = RecordingStorage::with_contents(&[]);
        let mut options = CreateOptions::new(1 << 20);
        (options.cluster_size, options.extended_l2) = (16_384, extended);
        options.create(&recording, None).unwrap();
        let fresh = last_counted(&recording.snapshot());
        let recording = Arc::new(recording);
        let disk = OpenOptions::new().writable(true).open(recording.clone()).unwrap();
        let begun = recording.position();
        let write = disk.resolve_write(ByteRange::at(65_536, 49_152)).unwrap();
        disk.flush().unwrap();
        drop(write);
        disk.flush().unwrap();
        let mut held = 0;
        let killed = |point: &str| point.ends_with("dropped []");
        for point in recording.crash_points() {
            // When only the process ends, all that was written is there.
            if point.position() < begun || !killed(&point.to_string()) {
                continue;
            }
            let image = point.storage();
            let last = last_counted(&image);
            if last == fresh {
                continue;
            }
            held = held.max(last);
            let needed = last * 16_384 + if extended { 16_384 - 512 } else { 0 };
            assert!(image.len().unwrap() > needed, "extended {extended}: {point}");
        }
        assert!(held >= 7, "the clusters of the write were counted: {held}");
        qemu_check_finds_no_corruption(&recording.to_vec(), "a write was given up");
    }
}
