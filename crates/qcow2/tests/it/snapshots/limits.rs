//! What is refused: what QEMU refuses, limits of the format, and damage.

use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ErrorKind, Storage, WriteFlags};
use blockmirror_qcow2::{CreateOptions, Error, NewSnapshot, OpenOptions, Qcow2, SnapshotRef, Version, check};

use super::{id, image, read_all};
use crate::common::qemu_check_finds_nothing;

fn open(bytes: &[u8]) -> (Arc<MemoryStorage>, Qcow2) {
    let storage = Arc::new(MemoryStorage::with_contents(bytes));
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    (storage, disk)
}

fn take(disk: &Qcow2) -> Result<(), ErrorKind> {
    disk.create_snapshot(&NewSnapshot::new("x")).map(drop).map_err(|error| error.kind())
}

/// A refcount of `n` bits counts the disk and 2^n - 2 snapshots. QEMU leaks a cluster where it refuses.
#[test]
fn refcounts_end() {
    for (bits, most) in [(1, 0), (2, 2), (4, 14)] {
        let (storage, disk) = open(&image(64 << 10, |options| options.refcount_bits = bits));
        disk.write_at(&[1; 9000], 0, WriteFlags::FUA).unwrap();
        for _ in 0..most {
            take(&disk).unwrap();
        }
        assert_eq!(take(&disk), Err(ErrorKind::LimitExceeded), "{bits} bits");
        assert!(!disk.is_poisoned());
        disk.write_at(&[2; 9000], 3000, WriteFlags::FUA).unwrap();
        assert_eq!(disk.snapshots().unwrap().len(), most);
        assert!(check(&*storage, &mut ()).unwrap().is_clean(), "{bits} bits");
        qemu_check_finds_nothing(&storage.to_vec(), "refcounts end");
    }
    // Of a disk that holds nothing there is nothing to count.
    let (_, disk) = open(&image(64 << 10, |options| options.refcount_bits = 1));
    take(&disk).unwrap();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (storage, disk) = open(&image(64 << 10, |options| options.version = Version::V2));
    let nothing = SnapshotRef::IdOrName("none".into());
    for result in [disk.apply_snapshot(&nothing), disk.delete_snapshot(&nothing)] {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::NoSnapshot { wanted } if *wanted == nothing));
        assert_eq!(error.to_string(), "there is no snapshot with the id or name \"none\"");
    }
    take(&disk).unwrap();
    let again = disk.create_snapshot(&NewSnapshot::new("y").id("1")).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Unsupported);
    let long = disk.create_snapshot(&NewSnapshot::new("n".repeat(256))).unwrap_err();
    assert_eq!(long.kind(), ErrorKind::LimitExceeded);
    // As QEMU.
    assert_eq!(disk.resize(1 << 20, false).unwrap_err().kind(), ErrorKind::Unsupported);
    drop(disk);
    let dynamic: Arc<dyn Storage> = storage.clone();
    let writable = OpenOptions::new().writable(true).snapshot(id("1")).open(Arc::clone(&dynamic));
    assert_eq!(writable.unwrap_err().kind(), ErrorKind::ReadOnly);
    let missing = OpenOptions::new().snapshot(id("7")).open(Arc::clone(&dynamic));
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    let reader = OpenOptions::new().open(dynamic).unwrap();
    assert_eq!(take(&reader), Err(ErrorKind::ReadOnly));

    let (image, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
    let mut options = CreateOptions::new(1 << 20);
    options.data_file = Some(b"data".to_vec());
    options.create(&*image, Some(&*data)).unwrap();
    let disk = OpenOptions::new().writable(true).data_file(data).open(image).unwrap();
    assert_eq!(take(&disk), Err(ErrorKind::Unsupported));
}

/// A crash of another writer leaves raised refcounts under entries that still have COPIED: what they map is
/// copied all the same.
#[test]
fn refcounts_win_over_flags() {
    let (storage, disk) = open(&image(64 << 10, |_| ()));
    disk.write_at(&[1; 64 << 10], 0, WriteFlags::NONE).unwrap();
    take(&disk).unwrap();
    let l1 = disk.header().l1_offset;
    drop(disk);
    let mut flagged = storage.to_vec();
    let word = |bytes: &[u8], at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    for at in (l1..l1 + 8 * 2).step_by(8) {
        let table = word(&flagged, at);
        assert_eq!(table >> 63, 0, "a shared table has COPIED");
        for entry in (table..table + 512).step_by(8) {
            let old = word(&flagged, entry);
            flagged[entry as usize..][..8].copy_from_slice(&(old | 1 << 63).to_be_bytes());
        }
        flagged[at as usize..][..8].copy_from_slice(&(table | 1 << 63).to_be_bytes());
    }
    let (storage, disk) = open(&flagged);
    disk.write_at(&[2; 10_000], 5000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    let dynamic: Arc<dyn Storage> = storage;
    let old = OpenOptions::new().snapshot(id("1")).open(dynamic).unwrap();
    assert!(read_all(&old).iter().all(|byte| *byte == 1), "the snapshot has changed");
}
