//! New L2 tables past the end of the file: only what is touched of them is written.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{CrashPoint, MemoryStorage, RecordingStorage};
use blockmirror_block::{BlockDevice, ByteRange, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

use crate::common::qemu_check_finds_nothing;

const CLUSTER: u64 = 65536;
const TABLE: u64 = 8192 * CLUSTER;

fn create(tables: u64) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(tables * TABLE).create(&*storage, None).unwrap();
    storage
}

fn stored(storage: &dyn Storage) -> u64 {
    let mut stored = 0;
    let all = ByteRange::new(0, storage.len().unwrap());
    storage
        .extents(all, &mut |run| {
            stored += if run.hole { 0 } else { run.range.len() };
            Visit::Continue(())
        })
        .unwrap();
    stored
}

fn read(disk: &Qcow2, at: u64) -> u8 {
    let mut byte = [0];
    disk.read_at(&mut byte, at).unwrap();
    byte[0]
}

/// All of each table was written: 64 KiB for each cluster of data.
#[test]
fn a_new_table_takes_two_slices() {
    let storage = create(64);
    let before = stored(&*storage);
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    for table in 0..64 {
        disk.write_at(&[7; CLUSTER as usize], table * TABLE, WriteFlags::NONE).unwrap();
    }
    // Slices that were never written read as zeros, also from the storage.
    for table in 0..64 {
        assert_eq!(read(&disk, table * TABLE + TABLE / 2), 0);
    }
    disk.flush().unwrap();
    drop(disk);
    let new = stored(&*storage) - before;
    assert!(new <= 64 * (CLUSTER + 2 * 4096) + 64 * 1024, "{new} bytes are stored");
    let disk = OpenOptions::new().open(storage.clone()).unwrap();
    for table in 0..64 {
        assert_eq!(read(&disk, table * TABLE), 7);
        assert_eq!(read(&disk, table * TABLE + TABLE - 1), 0);
    }
    qemu_check_finds_nothing(&storage.to_vec(), "new tables");
}

/// The file ends behind the table, also if nothing else was written: its slices can be read.
#[test]
fn a_table_that_is_the_last_of_the_file_is_whole() {
    let storage = create(2);
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    // Takes a table and no cluster of data.
    disk.write_zeroes(ByteRange::at(TABLE, CLUSTER), ZeroFlags::EXPLICIT).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert!(storage.len().unwrap().is_multiple_of(CLUSTER));
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    assert_eq!(read(&disk, TABLE + TABLE / 2), 0);
    disk.write_at(&[7; 512], TABLE + TABLE / 2, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    qemu_check_finds_nothing(&storage.to_vec(), "a table at the end");
}

/// A place that was used before holds what it held: all of the table is written there.
#[test]
fn a_table_in_a_used_place_is_written_whole() {
    // A discard that reached the storage would have zeroed the place.
    let storage = MemoryStorage::new();
    let mut info = storage.info();
    info.discards = false;
    let storage = Arc::new(storage.with_info(info));
    CreateOptions::new(2 * TABLE).create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[0xee; 4 * CLUSTER as usize], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    disk.discard(ByteRange::new(0, 4 * CLUSTER)).unwrap();
    disk.flush().unwrap();
    disk.write_at(&[7; CLUSTER as usize], TABLE, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let disk = OpenOptions::new().open(storage.clone()).unwrap();
    assert_eq!(read(&disk, TABLE), 7);
    for slice in 1..16 {
        assert_eq!(read(&disk, TABLE + slice * TABLE / 16), 0);
    }
    qemu_check_finds_nothing(&storage.to_vec(), "a table in a used place");
}

/// Whatever of the unflushed writes is lost or torn, each disk that was flushed is there.
#[test]
fn a_crash_loses_no_table() {
    let storage = Arc::new(RecordingStorage::with_contents(&create(4).to_vec()));
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    let mut flushed = vec![storage.position()];
    for table in 0..4 {
        disk.write_at(&[7; CLUSTER as usize], table * TABLE + TABLE / 2, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        flushed.push(storage.position());
    }
    for point in storage.crash_points() {
        check_crash(&point, &flushed);
    }
}

fn check_crash(point: &CrashPoint, flushed: &[usize]) {
    let storage = Arc::new(point.storage());
    let disk = OpenOptions::new().open(storage).unwrap();
    for table in 0..4 {
        let byte = read(&disk, table * TABLE + TABLE / 2);
        let durable = flushed[table as usize + 1] <= point.position();
        assert!(byte == 7 || (byte == 0 && !durable), "{point}: table {table} reads as {byte}");
        assert_eq!(read(&disk, table * TABLE), 0, "{point}");
    }
}
