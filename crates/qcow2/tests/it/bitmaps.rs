//! Persistent bitmaps: what writes do to them, the verbs, and what is refused.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a list of runs may have one")]

use std::ops::Range;
use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::testing::{FaultStorage, Faults, MemoryDisk, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::format::bitmaps::BitmapEntry;
use blockmirror_qcow2::{
    BitmapOptions, BitmapProblem, CreateOptions, Error, Header, OpenOptions, Qcow2, Version, check,
};

use crate::common::{qemu_check_finds_nothing, word};

pub(crate) const LEN: u64 = 1 << 20;

/// An image with the enabled bitmap `on`, and the disabled one `off`, both with a bit for 4 KiB.
pub(crate) fn image(cluster: u64) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(LEN);
    options.cluster_size = cluster;
    options.create(&*storage, None).unwrap();
    let disk = open(storage.clone());
    let fine = BitmapOptions::new().granularity(4096);
    disk.add_bitmap("on", &fine).unwrap();
    disk.add_bitmap("off", &fine.disabled(true)).unwrap();
    storage
}

pub(crate) fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    OpenOptions::new().writable(true).open(storage).unwrap()
}

fn reader(storage: Arc<dyn Storage>) -> Qcow2 {
    OpenOptions::new().open(storage).unwrap()
}

/// The dirty runs of a bitmap, as a program that opens the image for reading sees them.
pub(crate) fn runs(storage: &Arc<MemoryStorage>, name: &str) -> Vec<Range<u64>> {
    reader(storage.clone()).read_bitmap(name).unwrap().runs().collect()
}

/// Name, whether it is in use, whether it is enabled.
fn list(disk: &Qcow2) -> Vec<(String, bool, bool)> {
    let entries: Vec<BitmapEntry> = disk.bitmaps().unwrap();
    entries.into_iter().map(|entry| (entry.name.to_string(), entry.in_use, entry.auto)).collect()
}

fn problem<T: std::fmt::Debug>(result: Result<T, Error>) -> BitmapProblem {
    match result.unwrap_err() {
        Error::Bitmap { problem, .. } => problem,
        other => panic!("{other}"),
    }
}

pub(crate) fn assert_clean(storage: &Arc<MemoryStorage>, what: &str) {
    let report = check(&**storage, &mut ()).unwrap();
    assert!(report.is_clean(), "{what}: {report:?}");
    qemu_check_finds_nothing(&storage.to_vec(), what);
}

#[test]
fn writes_of_each_kind_are_recorded_and_stored() {
    for cluster in [512, 4096, 65536] {
        let storage = image(cluster);
        let disk = open(storage.clone());
        disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(100_000, 10_000), ZeroFlags::MAY_UNMAP).unwrap();
        let guard = disk.resolve_write(ByteRange::at(300_000, 10)).unwrap();
        guard.fill_edges().unwrap();
        guard.write(&[2; 10]).unwrap();
        guard.commit().unwrap();
        disk.discard(ByteRange::at(0, 65536)).unwrap();
        disk.preallocate(ByteRange::at(500_000, 100)).unwrap();
        disk.store_bitmaps().unwrap();
        let expected = [0..65536, 98_304..110_592, 299_008..303_104];
        assert_eq!(runs(&storage, "on"), expected, "clusters of {cluster}");
        assert_eq!(runs(&storage, "off"), []);
        // It goes on recording, and stores again when it is dropped.
        disk.write_at(&[1; 10], LEN - 10, WriteFlags::NONE).unwrap();
        drop(disk);
        let expected = [0..65536, 98_304..110_592, 299_008..303_104, LEN - 4096..LEN];
        assert_eq!(runs(&storage, "on"), expected, "clusters of {cluster}");
        assert_clean(&storage, "stored bitmaps");
    }
}

#[test]
fn an_image_that_is_not_written_stays_as_it_is() {
    let storage = image(4096);
    let before = storage.to_vec();
    let disk = open(storage.clone());
    disk.read_at(&mut [0; 512], 0).unwrap();
    disk.flush().unwrap();
    disk.store_bitmaps().unwrap();
    drop(disk);
    assert_eq!(storage.to_vec(), before);
}

#[test]
fn a_process_that_ends_without_storing_leaves_them_in_use() {
    let storage = image(4096);
    let disk = open(storage.clone());
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    let crashed = Arc::new(MemoryStorage::with_contents(&storage.to_vec()));
    let disk = open(crashed.clone());
    // What does not record has missed nothing.
    assert_eq!(list(&disk), [("on".to_owned(), true, true), ("off".to_owned(), false, false)]);
    for refused in [
        disk.clear_bitmap("on"),
        disk.enable_bitmap("on"),
        disk.disable_bitmap("on"),
        disk.merge_bitmap("on", &disk.read_bitmap("off").unwrap()),
        disk.read_bitmap("on").map(drop),
    ] {
        assert_eq!(problem(refused), BitmapProblem::Inconsistent);
    }
    let refused = disk.resize(2 * LEN, false).unwrap_err();
    assert!(refused.to_string().contains("inconsistent"), "{refused}");
    assert_eq!(problem(disk.add_bitmap("on", &BitmapOptions::new())), BitmapProblem::Exists);
    // Writes go on, and it stays as it is until it is removed.
    disk.write_at(&[1; 10], 0, WriteFlags::NONE).unwrap();
    disk.store_bitmaps().unwrap();
    assert!(list(&disk)[0].1);
    disk.remove_bitmap("on").unwrap();
    assert_eq!(list(&reader(crashed.clone())), [("off".to_owned(), false, false)]);
    drop(disk);
    assert_clean(&crashed, "after removal");
}

#[test]
fn verbs_change_one_bitmap() {
    let storage = image(4096);
    let disk = open(storage.clone());
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    disk.disable_bitmap("on").unwrap();
    disk.enable_bitmap("off").unwrap();
    disk.write_at(&[1; 10], 50_000, WriteFlags::NONE).unwrap();
    disk.store_bitmaps().unwrap();
    assert_eq!((runs(&storage, "on"), runs(&storage, "off")), (vec![4096..8192], vec![49_152..53_248]));
    assert_eq!(list(&disk), [("on".to_owned(), false, false), ("off".to_owned(), false, true)]);
    // Another granularity is no hindrance.
    disk.add_bitmap("coarse", &BitmapOptions::new().granularity(65536).disabled(true)).unwrap();
    disk.merge_bitmap("coarse", &disk.read_bitmap("on").unwrap()).unwrap();
    assert_eq!(runs(&storage, "coarse"), [0..65536]);
    disk.merge_bitmap("off", &disk.read_bitmap("coarse").unwrap()).unwrap();
    assert_eq!(runs(&storage, "off"), [0..65536]);
    disk.clear_bitmap("off").unwrap();
    assert_eq!(runs(&storage, "off"), []);
    let other = DirtyBitmap::new(2 * LEN, 4096).unwrap();
    assert_eq!(
        problem(disk.merge_bitmap("off", &other)),
        BitmapProblem::OtherLength { own: LEN, other: 2 * LEN }
    );
    for name in ["on", "off", "coarse"] {
        disk.remove_bitmap(name).unwrap();
        assert_eq!(problem(disk.clear_bitmap(name)), BitmapProblem::NotFound);
    }
    let header = disk.header();
    assert_eq!((header.bitmaps, header.autoclear), (None, 0));
    drop(disk);
    assert_eq!(word(&storage, 88), 0);
    assert_clean(&storage, "all removed");
}

#[test]
fn bitmaps_that_cannot_be_are_refused() {
    let disk = open(image(65536));
    let add = |name: &str, granularity| {
        problem(disk.add_bitmap(name, &BitmapOptions::new().granularity(granularity)))
    };
    assert_eq!(add("on", 512), BitmapProblem::Exists);
    assert_eq!(add("", 512), BitmapProblem::NameLength(0));
    assert_eq!(add(&"n".repeat(1024), 512), BitmapProblem::NameLength(1024));
    for granularity in [0, 256, 5000, 4 << 30] {
        assert_eq!(add("new", granularity), BitmapProblem::Granularity(granularity));
    }
    disk.add_bitmap(&"n".repeat(1023), &BitmapOptions::new().granularity(2 << 30)).unwrap();
    let defaults = |size| {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(LEN);
        options.cluster_size = size;
        options.create(&*storage, None).unwrap();
        let disk = open(storage);
        disk.add_bitmap("b", &BitmapOptions::new()).unwrap();
        disk.bitmaps().unwrap()[0].granularity
    };
    assert_eq!([512, 16384, 2 << 20].map(defaults), [4096, 16384, 65536]);
    for (len, version, expected) in [
        (0, Version::V3, BitmapProblem::EmptyDisk),
        (LEN, Version::V2, BitmapProblem::Version2),
        (4 << 40, Version::V3, BitmapProblem::TooFine(1 << 30)),
    ] {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(len);
        options.version = version;
        options.create(&*storage, None).unwrap();
        let fine = BitmapOptions::new().granularity(512);
        assert_eq!(problem(open(storage).add_bitmap("b", &fine)), expected);
    }
}

#[test]
fn the_length_of_the_disk_takes_them_along() {
    for cluster in [512, 65536] {
        let storage = image(cluster);
        let disk = open(storage.clone());
        disk.enable_bitmap("off").unwrap();
        disk.write_at(&[1; 10], LEN - 10, WriteFlags::NONE).unwrap();
        disk.disable_bitmap("off").unwrap();
        disk.clear_bitmap("on").unwrap();
        disk.resize(2 * LEN, false).unwrap();
        // What is new counts as written.
        assert_eq!(runs(&storage, "on"), [LEN..2 * LEN]);
        assert_eq!(runs(&storage, "off"), [LEN - 4096..LEN]);
        disk.write_at(&[1; 10], 2 * LEN - 10, WriteFlags::NONE).unwrap();
        disk.resize(3 << 19, true).unwrap();
        assert_eq!(runs(&storage, "on"), [LEN..3 << 19]);
        disk.clear_bitmap("on").unwrap();
        disk.write_at(&[1; 10], LEN, WriteFlags::NONE).unwrap();
        disk.resize(LEN + 512, true).unwrap();
        assert_eq!(runs(&storage, "on"), [LEN..LEN + 512]);
        assert_eq!(runs(&storage, "off"), [LEN - 4096..LEN]);
        drop(disk);
        assert_clean(&storage, "resized");
    }
}

/// Bits in several clusters, some of them uniform.
#[test]
fn long_bitmaps_are_cut_into_clusters() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(40 << 20);
    options.cluster_size = 512;
    options.create(&*storage, None).unwrap();
    let disk = open(storage.clone());
    disk.add_bitmap("b", &BitmapOptions::new().granularity(512)).unwrap();
    // A cluster of bits stands for 2 MiB of the disk.
    disk.write_zeroes(ByteRange::at(2 << 20, 9 << 20), ZeroFlags::MAY_UNMAP).unwrap();
    disk.write_at(&[1; 512], 30 << 20, WriteFlags::NONE).unwrap();
    disk.write_at(&[1; 512], (40 << 20) - 512, WriteFlags::NONE).unwrap();
    let expected: Vec<Range<u64>> =
        vec![2 << 20..11 << 20, 30 << 20..(30 << 20) + 512, (40 << 20) - 512..40 << 20];
    assert_eq!(disk.read_bitmap("b").unwrap().runs().collect::<Vec<_>>(), expected);
    drop(disk);
    assert_eq!(runs(&storage, "b"), expected);
    let table = word(&storage, disk_table(&storage));
    let entries: Vec<u64> = (0..20).map(|i| word(&storage, table + 8 * i)).collect();
    assert_eq!(entries[..5], [0, 1, 1, 1, 1]);
    assert_eq!(entries.iter().filter(|entry| **entry > 1).count(), 3);
    assert_clean(&storage, "a long bitmap");
}

fn disk_table(storage: &Arc<MemoryStorage>) -> u64 {
    Header::read(&**storage).unwrap().bitmaps.unwrap().directory_offset
}

#[test]
fn a_commit_and_a_copy_up_record_what_changes() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(LEN);
    options.backing_file = Some(b"base".to_vec());
    options.create(&*storage, None).unwrap();
    let below = Arc::new(MemoryDisk::with_contents(&vec![7; LEN as usize]));
    let disk = OpenOptions::new().writable(true).backing(below).open(storage.clone()).unwrap();
    disk.add_bitmap("on", &BitmapOptions::new()).unwrap();
    // The guest sees the same as before.
    disk.copy_up(ByteRange::new(0, LEN), u32::MAX).unwrap();
    assert_eq!(disk.read_bitmap("on").unwrap().dirty_bytes(), 0);
    disk.set_backing_file(Some(b"another"), Some("raw")).unwrap();
    disk.write_at(&[1], 65536, WriteFlags::NONE).unwrap();
    disk.set_backing_file(None, None).unwrap();
    drop(disk);
    assert_eq!(runs(&storage, "on"), [65536..131_072]);
    assert_clean(&storage, "an overlay with a bitmap");
}

/// A program that does not know bitmaps has written: it has cleared the autoclear bit.
#[test]
fn stale_bitmaps_are_kept_and_not_used() {
    let storage = image(65536);
    storage.write_at(&[0], 95).unwrap();
    let disk = open(storage.clone());
    assert_eq!(list(&disk), []);
    disk.write_at(&[1; 10], 0, WriteFlags::NONE).unwrap();
    drop(disk);
    let disk = open(storage.clone());
    assert!(
        disk.header().bitmaps.is_some_and(|bitmaps| bitmaps.count == 2) && !disk.header().bitmaps_valid()
    );
    // A new directory has none of them.
    disk.add_bitmap("new", &BitmapOptions::new()).unwrap();
    assert_eq!(list(&reader(storage)), [("new".to_owned(), false, true)]);
}

#[test]
fn an_image_that_is_opened_anew_goes_on_recording() {
    let storage = image(4096);
    let disk = open(storage.clone());
    disk.write_at(&[1; 10], 5000, WriteFlags::NONE).unwrap();
    let again = disk.reopen().unwrap();
    drop(disk);
    again.write_at(&[1; 10], 50_000, WriteFlags::NONE).unwrap();
    drop(again);
    assert_eq!(runs(&storage, "on"), [4096..8192, 49_152..53_248]);
    assert_clean(&storage, "opened anew");
}

/// Writers and stores in any order: no store loses a bit, and none leaves a mark behind.
#[test]
fn stores_beside_writers_lose_nothing() {
    let storage = image(512);
    let disk = open(storage.clone());
    let quarter = LEN / 4;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let disk = &disk;
            scope.spawn(move || {
                for at in (thread * quarter..(thread + 1) * quarter).step_by(8192) {
                    disk.write_at(&[7; 512], at, WriteFlags::NONE).unwrap();
                }
            });
        }
        (0..20).for_each(|_| disk.store_bitmaps().unwrap());
    });
    drop(disk);
    let expected: Vec<_> = (0..LEN).step_by(8192).map(|at| at..at + 4096).collect();
    assert_eq!(runs(&storage, "on"), expected);
    assert_clean(&storage, "stored beside writers");
}

/// The first request after an open flushes the directory that was found. It held no range meanwhile, so that
/// the list of bitmaps could change under it, and the mark be written to a directory that was freed.
#[test]
fn the_list_does_not_change_while_a_found_directory_is_flushed() {
    type Request = fn(&Qcow2) -> blockmirror_block::Result<()>;
    let requests: [(&str, Request); 3] = [
        ("discard", |disk| disk.discard(ByteRange::at(0, 4096))),
        ("write zeroes", |disk| disk.write_zeroes(ByteRange::at(100, 200), ZeroFlags::NONE)),
        ("write", |disk| disk.write_at(&[1; 10], 100, WriteFlags::NONE)),
    ];
    for (what, request) in requests {
        let storage = image(4096);
        open(storage.clone()).remove_bitmap("on").unwrap();
        let faults = Faults::new();
        let disk = open(Arc::new(FaultStorage::new(storage.clone(), faults.clone())));
        std::thread::scope(|s| {
            // Inside, so that a failure opens it before the thread is waited for.
            let gate = faults.hold(OpKind::Flush, None);
            let call = s.spawn(|| request(&disk));
            gate.wait_held(1);
            let source = CancelSource::new();
            let _calls = source.enter();
            source.cancel();
            // A change that has nothing to wait for looks for the bitmap; another one leaves its wait.
            match disk.enable_bitmap("missing").unwrap_err() {
                Error::Storage(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{what}"),
                other => panic!("{what}: the list could change: {other}"),
            }
            gate.open();
            call.join().unwrap().unwrap();
        });
        disk.enable_bitmap("off").unwrap();
        disk.write_at(&[1; 10], 8192, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        let killed = reader(Arc::new(MemoryStorage::with_contents(&storage.to_vec())));
        assert_eq!(list(&killed), [("off".to_owned(), true, true)], "{what}");
        drop(disk);
        assert_eq!(runs(&storage, "off"), [8192..12288], "{what}");
        assert_clean(&storage, what);
    }
}
