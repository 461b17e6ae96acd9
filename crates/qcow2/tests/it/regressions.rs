//! Defects that were found by reading, each with the story of what went wrong.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use crate::common::{backing_disk, qemu_check_finds_no_corruption, word};
use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Storage, StorageInfo, WriteFlags, ZeroFlags,
};
use blockmirror_qcow2::offset::GuestCluster;
use blockmirror_qcow2::{
    CreateOptions, CutShort, Damage, Header, OpenOptions, Preallocation, Qcow2, Version,
};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Host offset of the L2 entry of guest cluster 0.
fn first_l2_entry(storage: &MemoryStorage) -> u64 {
    word(storage, word(storage, 40) & OFFSET) & OFFSET
}

fn open(storage: &Arc<MemoryStorage>) -> Qcow2 {
    OpenOptions::new().writable(true).open(storage.clone()).unwrap()
}

fn read(disk: &dyn BlockDevice, at: u64, len: usize) -> Vec<u8> {
    let mut found = vec![0; len];
    disk.read_at(&mut found, at).unwrap();
    found
}

/// A damaged image had two guest clusters on one host cluster with a refcount of one. The first was
/// discarded, and the discard of the second queued a reference to be dropped that was not counted any more;
/// until then the cluster was handed out as free, here for an L2 table, and the late drop freed and punched
/// out what its new owner had written.
#[test]
fn a_reference_that_is_not_counted_is_not_dropped() {
    let storage = image(1 << 20, 512, |options| options.refcount_bits = 8);
    let disk = open(&storage);
    disk.write_at(&[1; 1024], 0, WriteFlags::FUA).unwrap();
    drop(disk);
    let entry = first_l2_entry(&storage);
    storage.write_at(&word(&storage, entry).to_be_bytes(), entry + 8).unwrap();

    let disk = open(&storage);
    disk.discard(ByteRange::at(0, 512)).unwrap();
    disk.flush().unwrap();
    disk.discard(ByteRange::at(512, 512)).unwrap();
    disk.write_at(&[2; 40_000], 65_536, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert!(read(&open(&storage), 65_536, 40_000).iter().all(|b| *b == 2), "other guest data is gone");
    qemu_check_finds_no_corruption(&storage.to_vec(), "after the discard");
}

/// A new refcount block was written as zeros and then given its own count, which meant to read it back: when
/// that read failed the block stayed in use with a refcount of zero.
#[test]
fn every_operation_fails_while_the_refcounts_grow() {
    let template = MemoryStorage::new();
    let mut options = CreateOptions::new(4 << 20);
    (options.cluster_size, options.refcount_bits) = (512, 64);
    options.create(&template, None).unwrap();
    let template = Arc::new(MemoryStorage::with_contents(&template.to_vec()));
    let disk = open(&template);
    // One table of 512 bytes counts 2 MiB.
    disk.write_at(&vec![1; 1900 << 10], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let template = template.to_vec();

    for (ops, kind, done) in [
        (OpKind::Any, ErrorKind::Io, Done::Nothing),
        (OpKind::Any, ErrorKind::Io, Done::Everything),
        (OpKind::Write, ErrorKind::NoSpace, Done::Nothing),
        (OpKind::Write, ErrorKind::NoSpace, Done::Everything),
        (OpKind::Flush, ErrorKind::NoSpace, Done::Nothing),
    ] {
        for n in 0.. {
            let inner = Arc::new(MemoryStorage::with_contents(&template));
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
            let disk = OpenOptions::new().writable(true).cache_bytes(0).open(storage).unwrap();
            faults.inject(Fault::on(ops).after(n).with(kind).having_done(done));
            let attempt = || -> Result<(), Error> {
                disk.write_at(&[2; 150 << 10], 1900 << 10, WriteFlags::NONE)?;
                disk.flush()
            };
            let what = format!("{kind:?} {done:?} n={n}");
            let first = attempt();
            let reached = faults.failed() > 0;
            faults.heal();
            assert_eq!(first.is_err(), reached, "{what}: {first:?}");
            let second = attempt();
            let written = second.is_ok();
            // A write of the header, and a flush, leave the disk in doubt whatever they fail with.
            let poisoned = second.as_ref().is_err_and(|error| error.kind() == ErrorKind::Poisoned);
            assert!(written || poisoned, "{what}: {second:?}");
            assert!(!reached || ops != OpKind::Flush || poisoned, "{what}: a flush has failed");
            drop(disk);
            refcount_blocks_count_themselves(&inner, &what);
            if n % 16 == 0 {
                qemu_check_finds_no_corruption(&inner.to_vec(), &what);
            }
            let disk = open(&inner);
            assert!(read(&disk, 0, 1900 << 10).iter().all(|b| *b == 1), "{what}");
            if written {
                assert!(read(&disk, 1900 << 10, 150 << 10).iter().all(|b| *b == 2), "{what}");
            }
            if !reached {
                break;
            }
        }
    }
}

/// For clusters of 512 bytes and refcounts of 64 bits.
fn refcount_blocks_count_themselves(storage: &MemoryStorage, what: &str) {
    let (table, entries) = (word(storage, 48), (word(storage, 56) >> 32) * 64);
    for block in (0..entries).map(|i| word(storage, table + i * 8)).filter(|block| *block != 0) {
        let cluster = block / 512;
        let counts_it = word(storage, table + cluster / 64 * 8);
        assert_eq!(word(storage, counts_it + cluster % 64 * 8), 1, "{what}: refcount block at {block}");
    }
}

/// An overlay that is opened without its backing file: zeros and discards left its clusters unallocated, as
/// there was nothing below them, and the backing file showed once the overlay was opened with it again.
#[test]
fn zeros_hold_when_the_backing_file_comes_back() {
    for version in [Version::V2, Version::V3] {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(1 << 20);
        options.version = version;
        (options.backing_file, options.backing_format) = (Some(b"b".to_vec()), Some("raw".into()));
        options.create(&*storage, None).unwrap();
        let disk = open(&storage);
        disk.write_zeroes(ByteRange::at(0, 65_536), ZeroFlags::MAY_UNMAP).unwrap();
        disk.write_zeroes(ByteRange::at(100_000, 65_536), ZeroFlags::NONE).unwrap();
        disk.write_at(&[1; 65_536], 327_680, WriteFlags::NONE).unwrap();
        disk.discard(ByteRange::at(327_680, 65_536)).unwrap();
        let discarded = read(&disk, 327_680, 65_536);
        disk.flush().unwrap();
        drop(disk);
        let disk = OpenOptions::new().backing(backing_disk(1 << 20)).open(storage).unwrap();
        assert!(read(&disk, 0, 65_536).iter().all(|b| *b == 0), "{version:?}");
        assert!(read(&disk, 100_000, 65_536).iter().all(|b| *b == 0), "{version:?}");
        assert!(read(&disk, 327_680, 65_536) == discarded, "{version:?}");
        assert!(read(&disk, 524_288, 512).iter().all(|b| *b != 0), "{version:?}: untouched");
    }
}

/// A look at a range held the metadata lock for all of it where its clusters lay one behind the other:
/// minutes for a disk of terabytes, which could not be written.
#[test]
fn a_look_at_a_large_range_is_taken_in_parts() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(256 << 20);
    (options.cluster_size, options.preallocation) = (512, Preallocation::Metadata);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().open(storage).unwrap();
    let mut at = 0;
    let mut parts = 0;
    while at < disk.len() {
        let guard = disk.resolve_read(ByteRange::new(at, disk.len())).unwrap();
        assert_eq!(guard.runs()[0].range.start(), at);
        at = guard.runs().last().unwrap().range.end();
        parts += 1;
    }
    assert!(parts >= 8, "{parts} parts");
}

/// Whether zeros can be said in metadata was asked of each cluster in turn, millions of times for a large
/// disk with subclusters, although only the first and the last can be in doubt.
#[test]
fn zeroing_a_large_disk_looks_at_its_ends() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(8 << 40);
    options.extended_l2 = true;
    options.create(&*storage, None).unwrap();
    let disk = open(&storage);
    disk.write_at(&[1; 4096], 0, WriteFlags::NONE).unwrap();
    let flags = ZeroFlags::NO_FALLBACK;
    let part = ByteRange::new(100, disk.len());
    assert_eq!(disk.write_zeroes(part, flags).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(read(&disk, 0, 4096), [1; 4096], "nothing was written");
    disk.write_zeroes(ByteRange::new(2048, disk.len()), flags).unwrap();
    assert_eq!(read(&disk, 2047, 2), [1, 0]);
}

/// A damaged image had two guest clusters on one host cluster with a refcount of one. Both were discarded,
/// the second while the first was on its way to disk; the cluster was free after the first and became an L2
/// table, which the second then freed and punched out.
#[test]
fn a_second_drop_does_not_free_a_table() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(1 << 20);
    options.cluster_size = 512;
    options.create(&*storage, None).unwrap();
    let disk = open(&storage);
    disk.write_at(&[1; 1024], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let entry = first_l2_entry(&storage);
    storage.write_at(&word(&storage, entry).to_be_bytes(), entry + 8).unwrap();

    let faults = Faults::new();
    let slow = Arc::new(FaultStorage::new(storage.clone(), faults.clone()));
    let disk = OpenOptions::new().writable(true).open(slow).unwrap();
    disk.discard(ByteRange::at(0, 512)).unwrap();
    let gate = faults.hold(OpKind::Flush, None);
    std::thread::scope(|s| {
        let flush = s.spawn(|| disk.flush());
        gate.wait_held(1);
        disk.discard(ByteRange::at(512, 512)).unwrap();
        gate.open();
        flush.join().unwrap().unwrap();
    });
    disk.write_at(&[2; 40_000], 65_536, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert!(read(&open(&storage), 65_536, 40_000).iter().all(|b| *b == 2), "other guest data is gone");
    qemu_check_finds_no_corruption(&storage.to_vec(), "after both discards");
}

/// Zeroing and discarding a raw data file, which changes no metadata, went on after the image was poisoned.
#[test]
fn a_poisoned_image_with_a_raw_data_file_refuses_zeros() {
    let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
    let mut options = CreateOptions::new(1 << 20);
    (options.data_file, options.data_file_raw) = (Some(b"d".to_vec()), true);
    options.create(&*storage, Some(&*data)).unwrap();
    let faults = Faults::new();
    let storage = Arc::new(FaultStorage::new(storage, faults.clone()));
    let disk = OpenOptions::new().writable(true).data_file(data).open(storage).unwrap();
    faults.inject(Fault::on(OpKind::Flush));
    disk.flush().unwrap_err();
    let range = ByteRange::at(0, 65_536);
    assert_eq!(disk.write_zeroes(range, ZeroFlags::NONE).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(disk.discard(range).unwrap_err().kind(), ErrorKind::Poisoned);
}

fn image(size: u64, cluster: u64, change: impl Fn(&mut CreateOptions)) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(size);
    options.cluster_size = cluster;
    change(&mut options);
    options.create(&*storage, None).unwrap();
    storage
}

/// Host offset of the L2 entry of guest cluster `index`.
fn l2_entry(storage: &MemoryStorage, cluster: u64, index: u64) -> u64 {
    let per_table = cluster / 8;
    (word(storage, word(storage, 40) + index / per_table * 8) & OFFSET) + index % per_table * 8
}

/// Makes the refcount of the cluster at host offset `host` zero, where refcounts have 16 bits.
fn forget_refcount(storage: &MemoryStorage, cluster: u64, host: u64) {
    let (index, per_block) = (host / cluster, cluster / 2);
    let block = word(storage, word(storage, 48) + index / per_block * 8);
    storage.write_at(&[0, 0], block + index % per_block * 2).unwrap();
}

fn marked_corrupt(storage: &MemoryStorage) -> bool {
    word(storage, 72) & 2 != 0
}

/// A damaged image mapped a cluster whose refcount is zero. The allocator handed it out: a write to one place
/// changed another, with success. Now whatever is first to change the image meets the damage, in the table at
/// hand or in one far away.
#[test]
fn a_mapped_cluster_without_a_refcount_is_not_handed_out() {
    const FAR: u64 = 4 << 20;
    type Op = fn(&Qcow2, u64) -> Result<(), Error>;
    let ops: [(&str, Op); 5] = [
        ("write", |disk, cluster| disk.write_at(&vec![9; cluster as usize], cluster, WriteFlags::NONE)),
        ("overwrite", |disk, _| disk.write_at(&[9; 512], 0, WriteFlags::NONE)),
        ("zero", |disk, _| disk.write_zeroes(ByteRange::at(0, disk.len()), ZeroFlags::MAY_UNMAP)),
        ("discard", |disk, _| disk.discard(ByteRange::at(0, disk.len()))),
        ("shrink", |disk, cluster| disk.resize(cluster, true)),
    ];
    for cluster in [4096, 65_536] {
        for at in [0, FAR] {
            for fixed in [false, true] {
                for (name, op) in ops {
                    let storage = image(8 << 20, cluster, |_| {});
                    let disk = open(&storage);
                    disk.write_at(&vec![1; cluster as usize], 0, WriteFlags::NONE).unwrap();
                    disk.write_at(&vec![2; cluster as usize], FAR, WriteFlags::NONE).unwrap();
                    disk.flush().unwrap();
                    drop(disk);
                    let host = word(&storage, l2_entry(&storage, cluster, at / cluster)) & OFFSET;
                    forget_refcount(&storage, cluster, host);
                    let storage = if fixed {
                        let mut bytes = storage.to_vec();
                        bytes.resize(bytes.len() + (1 << 20), 0);
                        let mut info = StorageInfo::plain();
                        info.fixed_len = true;
                        Arc::new(MemoryStorage::with_contents(&bytes).with_info(info))
                    } else {
                        storage
                    };
                    let what = format!("{name}, clusters of {cluster}, damage at {at}, fixed {fixed}");
                    let disk = open(&storage);
                    let result = op(&disk, cluster);
                    let far_overwrite = name == "overwrite" && cluster == 4096 && at == FAR;
                    assert_eq!(result.is_ok(), far_overwrite, "{what}: {result:?}");
                    let found = || [read(&disk, 0, 1)[0], read(&disk, FAR, 1)[0]];
                    if far_overwrite {
                        assert_eq!(found(), [9, 2], "{what}: nothing is allocated");
                        continue;
                    }
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
                    assert!(marked_corrupt(&storage), "{what}");
                    // Shrinking once wrote the new length before it met the damage.
                    assert_eq!((word(&storage, 24), disk.len()), (8 << 20, 8 << 20), "{what}");
                    assert!(disk.write_at(&[3], 0, WriteFlags::NONE).is_err(), "{what}");
                    if name == "write" || name == "shrink" {
                        assert_eq!(found(), [1, 2], "{what}");
                    }
                    assert!(OpenOptions::new().writable(true).open(storage).is_err(), "{what}");
                }
            }
        }
    }
}

/// The same damage under a table of a version 2 image, under a compressed cluster, and of an L2 table itself.
#[test]
fn other_mapped_clusters_without_a_refcount() {
    let storage = image(8 << 20, 4096, |options| options.version = Version::V2);
    let disk = open(&storage);
    disk.write_at(&[2; 4096], 4 << 20, WriteFlags::FUA).unwrap();
    drop(disk);
    let sound = storage.to_vec();
    let entry = l2_entry(&storage, 4096, 1024);
    let host = word(&storage, entry) & OFFSET;
    for damage in ["version 2", "not copied", "compressed", "table"] {
        let storage = Arc::new(MemoryStorage::with_contents(&sound));
        match damage {
            "not copied" => storage.write_at(&host.to_be_bytes(), entry).unwrap(),
            "compressed" => storage.write_at(&(host | 1 << 62).to_be_bytes(), entry).unwrap(),
            _ => {}
        }
        forget_refcount(&storage, 4096, if damage == "table" { entry & !4095 } else { host });
        let disk = open(&storage);
        let at = if damage == "table" { (4 << 20) + 4096 } else { 0 };
        let error = disk.write_at(&[9; 4096], at, WriteFlags::NONE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{damage}");
        assert!(error.to_string().contains("refcount is 0"), "{damage}: {error}");
        let found = Damage::of(&error);
        let is_table = matches!(found, Some(Damage::TableUncounted(_)));
        assert_eq!(is_table, damage == "table", "{damage}: {found:?}");
        assert!(
            is_table || matches!(found, Some(Damage::MappedUncounted(GuestCluster(1024)))),
            "{damage}: {found:?}"
        );
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned, "{damage}");
    }
}

/// The refcount table is too short for the file: what lies past it is mapped without a refcount, where the
/// longer table would go.
#[test]
fn a_refcount_table_does_not_grow_over_mapped_clusters() {
    // With clusters of 512 bytes and refcounts of 64 bits one table counts 2 MiB.
    let storage = image(4 << 20, 512, |options| options.refcount_bits = 64);
    let disk = open(&storage);
    disk.write_at(&vec![1; 1900 << 10], 0, WriteFlags::FUA).unwrap();
    drop(disk);
    let far = 2 << 20;
    storage.write_at(&[7; 512], far).unwrap();
    let last = l2_entry(&storage, 512, (1900 << 10) / 512 - 1);
    storage.write_at(&(far | 1 << 63).to_be_bytes(), last).unwrap();
    let disk = open(&storage);
    assert_eq!(read(&disk, (1900 << 10) - 512, 1), [7]);
    // The tables of this place are new, so the damaged one is not met on the way.
    let error = disk.write_at(&vec![2; 300 << 10], 3 << 20, WriteFlags::NONE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(marked_corrupt(&storage));
    assert_eq!(read(&disk, (1900 << 10) - 512, 1), [7]);
}

/// In a sound image the free clusters of an earlier life are used again once all tables were seen, and those
/// that were freed since it was opened at once. Where a table cannot be read the image grows instead.
#[test]
fn free_clusters_of_a_sound_image_are_used_again() {
    const FREED: u64 = 1 << 20;
    let storage = image(64 << 20, 4096, |_| {});
    let disk = open(&storage);
    disk.write_at(&vec![1; 8 << 20], 0, WriteFlags::NONE).unwrap();
    disk.write_at(&[2; 4096], 32 << 20, WriteFlags::FUA).unwrap();
    disk.discard(ByteRange::at(0, FREED)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let sound = storage.to_vec();
    let len = sound.len() as u64;

    let disk = open(&storage);
    disk.write_at(&vec![3; FREED as usize], 16 << 20, WriteFlags::FUA).unwrap();
    assert!(storage.len().unwrap() < len + 65_536, "the image has grown: {}", storage.len().unwrap());
    disk.discard(ByteRange::at(16 << 20, FREED)).unwrap();
    disk.flush().unwrap();
    disk.write_at(&vec![3; FREED as usize], 24 << 20, WriteFlags::FUA).unwrap();
    assert!(storage.len().unwrap() < len + 65_536, "the image has grown: {}", storage.len().unwrap());
    drop(disk);
    qemu_check_finds_no_corruption(&storage.to_vec(), "used again");

    let storage = Arc::new(MemoryStorage::with_contents(&sound));
    let far_table = l2_entry(&storage, 4096, (32 << 20) / 4096) & !4095;
    let faults = Faults::new();
    let broken = Arc::new(FaultStorage::new(storage.clone(), faults.clone()));
    let disk = OpenOptions::new().writable(true).open(broken).unwrap();
    faults.inject(Fault::on(OpKind::Read).within(ByteRange::at(far_table, 4096)).forever());
    disk.write_at(&vec![3; FREED as usize], 16 << 20, WriteFlags::FUA).unwrap();
    assert!(faults.failed() > 0, "the table was asked for");
    assert!(storage.len().unwrap() >= len + FREED, "{}", storage.len().unwrap());
    assert!(read(&disk, 16 << 20, FREED as usize).iter().all(|b| *b == 3));
}

/// A file that was cut off, by a download or a full disk, read as zeros past its end, so that a copy of it
/// ended well. A cluster that begins past the end cannot be read; one that has lost its tail only is zeros
/// there, as writers leave it, and what is zero by statement needs no file.
#[test]
fn data_past_the_end_of_a_file_that_was_cut_short() {
    const CLUSTER: u64 = 16_384;
    for (extended, external) in [(false, false), (true, false), (false, true)] {
        let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
        let mut options = CreateOptions::new(1 << 20);
        (options.cluster_size, options.extended_l2) = (CLUSTER, extended);
        options.data_file = external.then(|| b"data".to_vec());
        options.create(&*storage, external.then_some(&*data as &dyn Storage)).unwrap();
        let reopen = |writable| {
            let options = OpenOptions::new().writable(writable);
            let options = if external { options.data_file(data.clone()) } else { options };
            options.open(storage.clone()).unwrap()
        };
        let disk = reopen(true);
        disk.write_at(&[1; 4 * CLUSTER as usize], 0, WriteFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(4 * CLUSTER, CLUSTER), ZeroFlags::NONE).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let file = if external { &data } else { &storage };
        let whole = file.len().unwrap();
        assert_eq!(CutShort::find(storage.clone(), &Header::read(&*storage).unwrap()).unwrap(), None);
        let unit = if extended { CLUSTER / 32 } else { CLUSTER };
        // Only the tail of the last unit is gone, then all of it, then a cluster and a half.
        for (lost, missing) in [
            (unit - 1, 0),
            (unit, unit),
            (CLUSTER + CLUSTER / 2, CLUSTER + if extended { CLUSTER / 2 } else { 0 }),
        ] {
            let lost_from = if external { 4 * CLUSTER } else { whole };
            file.set_len(lost_from - lost).unwrap();
            let what = format!("extended {extended}, external {external}, {lost} lost");
            let disk = reopen(false);
            let there = 4 * CLUSTER - missing;
            let mut found = vec![0; there as usize];
            disk.read_at(&mut found, 0).unwrap_or_else(|e| panic!("{what}: {e}"));
            let ones = found.iter().take_while(|b| **b == 1).count() as u64;
            assert_eq!(ones, 4 * CLUSTER - lost, "{what}");
            if missing > 0 {
                for range in [
                    ByteRange::at(there, 1),
                    ByteRange::new(0, 4 * CLUSTER),
                    ByteRange::new(4 * CLUSTER - 512, 4 * CLUSTER),
                ] {
                    let error = disk.read_at(&mut vec![0; range.len() as usize], range.start()).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::CutShort, "{what}: {range:?}: {error}");
                    let end = format!("ends at {}", lost_from - lost);
                    assert!(error.to_string().contains(&end), "{what}: {error}");
                }
                let copy = open(&image(1 << 20, CLUSTER, |_| {}));
                copy.replace_backing(Some(Arc::new(reopen(false))));
                assert_eq!(
                    copy.copy_up(ByteRange::new(0, 1 << 20), u32::MAX).unwrap_err().kind(),
                    ErrorKind::CutShort
                );
            }
            assert_eq!(read(&disk, 4 * CLUSTER, CLUSTER as usize), vec![0; CLUSTER as usize], "{what}");
            let found = CutShort::find(storage.clone(), &Header::read(&*storage).unwrap()).unwrap();
            let found = found.map(|cut| (cut.file_len, cut.first, cut.missing));
            let expected = (!external && missing > 0).then_some((lost_from - lost, there, missing));
            assert_eq!(found, expected, "{what}");
        }
    }
}

/// A table past the end is an error for everyone, and everything below it is missing.
#[test]
fn a_table_past_the_end_of_a_file_that_was_cut_short() {
    let storage = image(8 << 20, 4096, |_| {});
    let disk = open(&storage);
    disk.write_at(&[1; 4096], 0, WriteFlags::FUA).unwrap();
    disk.write_at(&[2; 4096], 4 << 20, WriteFlags::FUA).unwrap();
    drop(disk);
    storage.set_len(l2_entry(&storage, 4096, 1024) & !4095).unwrap();
    let disk = OpenOptions::new().open(storage.clone()).unwrap();
    assert_eq!(read(&disk, 0, 4096), [1; 4096]);
    assert_eq!(disk.read_at(&mut [0], 4 << 20).unwrap_err().kind(), ErrorKind::Corrupt);
    let cut = CutShort::find(storage.clone(), &Header::read(&*storage).unwrap()).unwrap().unwrap();
    assert_eq!((cut.first, cut.missing), (4 << 20, 2 << 20));
    storage.set_len(100).unwrap();
    assert!(Header::read(&*storage).is_err() || OpenOptions::new().open(storage).is_err());
}

/// A guest could not write part of a cluster whose rest a layer below has lost, and QEMU lets it: the rest
/// becomes zeros, as the guest reads it. A job's write still fails, and leaves the cluster as it was.
#[test]
fn only_a_guest_writes_beside_what_was_cut_off() {
    const K: u64 = 1024;
    for (version, extended) in [(Version::V2, false), (Version::V3, false), (Version::V3, true)] {
        let base = image(1 << 20, 64 * K, |_| {});
        let disk = open(&base);
        disk.write_at(&[1; 1 << 20], 0, WriteFlags::FUA).unwrap();
        drop(disk);
        // Of the overlay's second cluster the base has one half.
        base.set_len(base.len().unwrap() - 13 * 64 * K).unwrap();
        let below: Arc<dyn BlockDevice> = Arc::new(OpenOptions::new().open(base).unwrap());
        // At the end of a half that is there, and at the start of one that is not.
        for at in [192 * K - 512, 192 * K + 512] {
            let what = format!("{version:?}, extended {extended}: {at}");
            let top = image(1 << 20, 128 * K, |options| {
                (options.version, options.extended_l2) = (version, extended);
            });
            let disk = open(&top);
            disk.replace_backing(Some(Arc::clone(&below)));
            // With subclusters of 4 KiB the first write is beside nothing that is lost.
            let refused = (!extended || at > 192 * K).then_some(ErrorKind::CutShort);
            for _ in 0..2 {
                let result = disk.write_at(&[9; 256], at, WriteFlags::NONE);
                assert_eq!(result.err().map(|e| e.kind()), refused, "{what}");
                let result = disk.write_zeroes(ByteRange::at(at, 128), ZeroFlags::MAY_UNMAP);
                assert_eq!(result.err().map(|e| e.kind()), refused, "{what}");
            }
            if refused.is_some() {
                assert_eq!(read(&disk, 128 * K, 64 * K as usize), vec![1; 64 * K as usize], "{what}");
                assert_eq!(
                    disk.read_at(&mut [0], 192 * K).unwrap_err().kind(),
                    ErrorKind::CutShort,
                    "{what}"
                );
            }
            disk.write_at(&[9; 256], at, WriteFlags::LOST_AS_ZEROS).unwrap();
            disk.write_zeroes(ByteRange::at(at, 128), ZeroFlags::LOST_AS_ZEROS).unwrap();
            let other = ZeroFlags::LOST_AS_ZEROS | ZeroFlags::MAY_UNMAP;
            disk.write_zeroes(ByteRange::at(at + 128 * K, 128), other).unwrap();
            // The rest of the subcluster, or of the cluster.
            let unit = if extended { 4 * K } else { 128 * K };
            let start = at / unit * unit;
            let mut expected: Vec<u8> = (start..start + unit).map(|at| u8::from(at < 192 * K)).collect();
            let at = (at - start) as usize;
            expected[at..at + 128].fill(0);
            expected[at + 128..at + 256].fill(9);
            assert!(read(&disk, start, unit as usize) == expected, "{what}");
        }
    }
}

/// The first new cluster of an image that was cut short lay behind what was missing, and made the file
/// longer: from then on zeros were read there, by copies too. Clusters that are counted past the end, but
/// hold nothing of the guest's, are leaks: such an image is written.
#[test]
fn an_image_that_was_cut_short_is_not_written() {
    let image = image(1 << 20, 4096, |_| {});
    let disk = open(&image);
    disk.write_at(&[1; 65_536], 0, WriteFlags::FUA).unwrap();
    drop(disk);
    let whole = image.to_vec();
    let tail = whole.len() as u64;
    for lost in [1, 4095, 4096, 40_960] {
        let storage = Arc::new(MemoryStorage::with_contents(&whole));
        storage.set_len(tail - lost).unwrap();
        let before = storage.to_vec();
        let opened = OpenOptions::new().writable(true).open(storage.clone());
        assert_eq!(opened.err().map(|e| e.kind()), (lost >= 4096).then_some(ErrorKind::CutShort), "{lost}");
        assert!(storage.to_vec() == before, "{lost}");
    }
    // A leak past the end.
    let disk = open(&image);
    disk.discard(ByteRange::at(65_536 - 4096, 4096)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let (host, block) = (tail - 4096, word(&image, word(&image, 48)));
    image.write_at(&[0, 1], block + host / 4096 * 2).unwrap();
    image.set_len(host).unwrap();
    open(&image).write_at(&[2; 4096], 1 << 19, WriteFlags::FUA).unwrap();
    qemu_check_finds_no_corruption(&image.to_vec(), "a leak past the end");
}
