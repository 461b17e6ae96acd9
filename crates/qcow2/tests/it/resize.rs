//! Growing and shrinking: what is refused, tables that are hard to place, and QEMU's opinion.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use crate::common::{backing_disk, qemu_check_finds_no_corruption};
use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, StorageInfo, WriteFlags, ZeroFlags};
use blockmirror_file::FileOptions;
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};
use blockmirror_testing::qemu::have;

fn image(size: u64, change: impl FnOnce(&mut CreateOptions)) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(size);
    change(&mut options);
    options.create(&*storage, None).unwrap();
    storage
}

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    OpenOptions::new().writable(true).open(storage).unwrap()
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let storage = image(1 << 20, |o| o.cluster_size = 512);
    let before = storage.to_vec();
    let disk = open(storage.clone());
    for (len, shrink, kind) in [
        ((1 << 20) - 512, false, ErrorKind::InvalidInput),
        ((1 << 20) + 1, true, ErrorKind::InvalidInput),
        (u64::MAX - 511, true, ErrorKind::LimitExceeded),
        (256 << 30, true, ErrorKind::LimitExceeded),
    ] {
        assert_eq!(disk.resize(len, shrink).unwrap_err().kind(), kind, "{len}");
    }
    assert_eq!(disk.len(), 1 << 20);
    assert_eq!(storage.to_vec(), before);
    let reader = OpenOptions::new().open(storage).unwrap();
    assert_eq!(reader.resize(2 << 20, false).unwrap_err().kind(), ErrorKind::ReadOnly);
    // What the backing file would show is unknown.
    let overlay = image(1 << 20, |o| o.backing_file = Some(b"base".to_vec()));
    assert_eq!(open(overlay).resize(2 << 20, false).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// 32768 L1 entries are 512 clusters side by side, while one refcount block counts 64.
#[test]
fn an_l1_table_longer_than_what_a_refcount_block_counts() {
    let storage = image(1 << 20, |o| {
        o.cluster_size = 512;
        o.refcount_bits = 64;
    });
    let disk = open(storage.clone());
    disk.write_at(&[7; 100_000], 0, WriteFlags::NONE).unwrap();
    disk.resize(1 << 30, false).unwrap();
    disk.write_at(&[8; 5000], (1 << 30) - 5000, WriteFlags::NONE).unwrap();
    disk.resize(2 << 30, false).unwrap();
    disk.write_at(&[9; 5000], (2 << 30) - 5000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    qemu_check_finds_no_corruption(&storage.to_vec(), "grown twice");
    let disk = open(storage);
    for (at, byte) in [(0, 7), (99_999, 7), (100_000, 0), ((1 << 30) - 1, 8), ((2 << 30) - 1, 9)] {
        let mut found = [0xee];
        disk.read_at(&mut found, at).unwrap();
        assert_eq!(found, [byte], "at {at}");
    }
}

#[test]
fn no_room_for_the_table_leaves_the_disk_as_it_was() {
    let storage = image(1 << 20, |o| o.cluster_size = 512);
    let mut info = StorageInfo::plain();
    info.fixed_len = true;
    let mut bytes = storage.to_vec();
    bytes.resize(64 << 10, 0);
    let device = Arc::new(MemoryStorage::new());
    device.write_at(&bytes, 0).unwrap();
    let device = Arc::new(Arc::try_unwrap(device).unwrap().with_info(info));
    let disk = open(device.clone());
    assert_eq!(disk.resize(1 << 30, false).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(disk.len(), 1 << 20);
    disk.resize(4 << 20, false).unwrap();
    disk.write_at(&[1; 512], (4 << 20) - 512, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    qemu_check_finds_no_corruption(&device.to_vec(), "on a device");
}

/// Whichever operation fails, the disk has its old length and contents, or the new ones, and goes on or says
/// why not.
#[test]
fn every_operation_fails_in_turn() {
    let storage = image(100_352, |o| o.cluster_size = 512);
    let below = backing_disk(300_000);
    let reopen = |storage: Arc<dyn Storage>| {
        OpenOptions::new().writable(true).backing(Arc::clone(&below)).open(storage).unwrap()
    };
    reopen(storage.clone()).write_at(&[1; 3000], 97_000, WriteFlags::FUA).unwrap();
    let before = storage.to_vec();
    for (kind, error) in [
        (OpKind::Write, ErrorKind::Io),
        (OpKind::Write, ErrorKind::NoSpace),
        (OpKind::Flush, ErrorKind::Io),
        (OpKind::Flush, ErrorKind::NoSpace),
    ] {
        for n in 0.. {
            let fresh = Arc::new(MemoryStorage::new());
            fresh.write_at(&before, 0).unwrap();
            let faults = Faults::new();
            let disk = reopen(Arc::new(FaultStorage::new(Arc::clone(&fresh) as _, faults.clone())));
            faults.inject(Fault::on(kind).after(n).with(error));
            let result = disk.resize(2_200_064, false);
            if faults.failed() == 0 {
                assert!(n > 3, "{kind:?}: {n} operations only");
                result.unwrap();
                break;
            }
            assert_eq!(result.unwrap_err().kind(), error);
            assert_eq!(disk.len(), 100_352);
            drop(disk);
            let what = format!("{kind:?} {error:?} {n}");
            qemu_check_finds_no_corruption(&fresh.to_vec(), &what);
            let disk = reopen(fresh);
            let grown = disk.len() == 2_200_064;
            assert!(grown || disk.len() == 100_352, "{what}: {}", disk.len());
            disk.resize(2_200_064, false).unwrap();
            let mut all = vec![0; 2_200_064];
            disk.read_at(&mut all, 0).unwrap();
            assert!(all[97_000..100_000] == [1; 3000] && all[100_000..100_352] == before_tail(), "{what}");
            assert!(all[100_352..].iter().all(|b| *b == 0), "{what}: grown bytes are not zero");
        }
    }
}

/// The header may point at the new L1 table although its flush has failed. The clusters of that table were
/// given back where the flush failed for want of space, and the next write went over the table. The guest
/// goes on here after whatever has failed, and then the power fails: what is on disk then is whole.
#[test]
fn a_guest_that_goes_on_after_a_failed_resize_corrupts_nothing() {
    let storage = image(100_352, |o| o.cluster_size = 512);
    open(storage.clone()).write_at(&[1; 3000], 17_000, WriteFlags::FUA).unwrap();
    let before = storage.to_vec();
    let mut poisoned = 0;
    for len in [2_200_064, 20_480] {
        for (kind, error, done) in [
            (OpKind::Write, ErrorKind::Io, Done::Everything),
            (OpKind::Write, ErrorKind::NoSpace, Done::Nothing),
            (OpKind::Write, ErrorKind::NoSpace, Done::Everything),
            (OpKind::Flush, ErrorKind::NoSpace, Done::Nothing),
            (OpKind::Flush, ErrorKind::Io, Done::Nothing),
        ] {
            for n in 0.. {
                let fresh = Arc::new(MemoryStorage::with_contents(&before));
                let faults = Faults::new();
                let disk = open(Arc::new(FaultStorage::new(Arc::clone(&fresh) as _, faults.clone())));
                faults.inject(Fault::on(kind).after(n).with(error).having_done(done));
                let result = disk.resize(len, true);
                let what = format!("to {len}: {kind:?} {n} {error:?} {done:?}: {result:?}");
                let failed = faults.failed() > 0;
                assert_eq!(result.is_err(), failed, "{what}");
                faults.heal();
                let goes_on = || {
                    disk.write_at(&[5; 16_000], 0, WriteFlags::NONE)?;
                    disk.flush()
                };
                let went_on = goes_on();
                if let Err(error) = &went_on {
                    assert_eq!(error.kind(), ErrorKind::Poisoned, "{what}: {error}");
                    poisoned += 1;
                }
                assert!(went_on.is_err() || kind == OpKind::Write || !failed, "{what}: a flush has failed");
                drop(disk);
                qemu_check_finds_no_corruption(&fresh.to_vec(), &what);
                let disk = open(fresh);
                assert!([100_352, len].contains(&disk.len()), "{what}: {}", disk.len());
                let mut found = vec![0; 20_480];
                disk.read_at(&mut found, 0).unwrap();
                let new = if went_on.is_ok() { &[5][..] } else { &[0, 5] };
                assert!(found[..16_000].iter().all(|b| new.contains(b)), "{what}");
                assert!(found[17_000..20_000] == [1; 3000], "{what}");
                if !failed {
                    break;
                }
            }
        }
    }
    assert!(poisoned > 10, "{poisoned}");
}

fn before_tail() -> [u8; 352] {
    std::array::from_fn(|i| ((100_000 + i) / 512) as u8 | 0x80)
}

/// The same steps here and there read the same, and QEMU finds nothing wrong with ours. Shrinking is to whole
/// clusters: where the last one is cut, QEMU shows its old bytes again when the disk grows, and we do not.
#[test]
fn as_qemu_img_resize() {
    if !have("resize", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (n, options) in
        ["compat=0.10", "cluster_size=512", "extended_l2=on,cluster_size=16k", ""].iter().enumerate()
    {
        for backed in [false, true] {
            if backed && options.contains("0.10") {
                // QEMU does not grow such an overlay over a longer backing file.
                continue;
            }
            let (ours, theirs, base) = (format!("ours{n}{backed}"), format!("theirs{n}{backed}"), "base.raw");
            std::fs::write(path(base), vec![0xbb; 2 << 20]).unwrap();
            let mut create = vec!["create", "-q", "-f", "qcow2", "-o", options];
            if options.is_empty() {
                create.truncate(4);
            }
            if backed {
                create.extend(["-b", base, "-F", "raw"]);
            }
            create.extend([ours.as_str(), "300k"]);
            crate::qemu::img(dir.path(), &create).unwrap();
            crate::qemu::io(dir.path(), &ours, &["write -P 1 0 100k", "write -P 2 290k 10k"]).unwrap();
            std::fs::copy(path(&ours), path(&theirs)).unwrap();
            for len in [3_000_320u64, 131_072, 700_416, 65_536, 1_048_576] {
                let file = FileOptions::new().writable(true).open(path(&ours)).unwrap();
                let mut open = OpenOptions::new().writable(true);
                if backed {
                    open = open.backing(Arc::new(blockmirror_block::testing::MemoryDisk::with_contents(
                        &vec![0xbb; 2 << 20],
                    )));
                }
                open.open(Arc::new(file)).unwrap().resize(len, true).unwrap();
                crate::qemu::img(
                    dir.path(),
                    &["resize", "-q", "--shrink", "-f", "qcow2", &theirs, &len.to_string()],
                )
                .unwrap();
                let what = format!("{options} backed {backed} at {len}");
                crate::qemu::assert_clean(dir.path(), &ours, &what);
                crate::qemu::img(dir.path(), &["compare", "-f", "qcow2", "-F", "qcow2", &ours, &theirs])
                    .unwrap_or_else(|why| panic!("{what}: {why}"));
                assert_eq!(crate::qemu::info(dir.path(), &ours)["virtual-size"], len, "{what}");
                crate::qemu::io(dir.path(), &ours, &[]).unwrap();
            }
        }
    }
}

#[test]
fn data_files_follow() {
    for raw in [false, true] {
        let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
        let mut options = CreateOptions::new(100_352);
        options.data_file = Some(b"data".to_vec());
        options.data_file_raw = raw;
        options.create(&*storage, Some(&*data)).unwrap();
        let disk = OpenOptions::new()
            .writable(true)
            .data_file(Arc::clone(&data) as _)
            .open(Arc::clone(&storage) as _)
            .unwrap();
        disk.write_at(&[5; 100_352], 0, WriteFlags::NONE).unwrap();
        disk.resize(50_176, true).unwrap();
        disk.resize(200_704, false).unwrap();
        disk.write_zeroes(ByteRange::at(0, 512), ZeroFlags::MAY_UNMAP).unwrap();
        disk.write_at(&[6; 512], 200_192, WriteFlags::FUA).unwrap();
        let mut want = vec![0; 200_704];
        want[512..50_176].fill(5);
        want[200_192..].fill(6);
        let mut all = vec![1; 200_704];
        disk.read_at(&mut all, 0).unwrap();
        assert!(all == want, "raw {raw}");
        if raw {
            assert!(data.to_vec() == want, "the data file is the disk");
        }
    }
}

/// A guest writes to what the disk has gained, and the process ends without a flush. Where nothing was mapped
/// the bytes were in the raw file, and zeros in the image.
#[test]
fn what_a_raw_data_file_gains_is_mapped_as_a_whole() {
    for (cluster, extended) in [(512, false), (4096, false), (16384, true)] {
        for (old, new) in [(100_352, 50_176), (100_352, 100_352), (1 << 20, 512)] {
            let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
            let mut options = CreateOptions::new(old);
            (options.cluster_size, options.extended_l2) = (cluster, extended);
            (options.data_file, options.data_file_raw) = (Some(b"data".to_vec()), true);
            options.create(&*storage, Some(&*data)).unwrap();
            let files = OpenOptions::new().data_file(Arc::clone(&data) as _);
            let disk = files.clone().writable(true).open(Arc::clone(&storage) as _).unwrap();
            disk.write_at(&vec![5; old as usize], 0, WriteFlags::FUA).unwrap();
            disk.resize(new, true).unwrap();
            disk.resize(old + 70_144, false).unwrap();
            disk.write_at(&[6; 700], new + 300, WriteFlags::NONE).unwrap();
            disk.write_at(&[7; 300], old + 70_000 - 300, WriteFlags::NONE).unwrap();
            drop(disk);
            let disk = files.open(Arc::clone(&storage) as _).unwrap();
            let mut all = vec![1; disk.len() as usize];
            disk.read_at(&mut all, 0).unwrap();
            assert!(all == data.to_vec(), "clusters of {cluster}: {old} to {new} and up again");
            assert_eq!(all.iter().filter(|byte| **byte == 5).count() as u64, new.min(old));
        }
    }
}
