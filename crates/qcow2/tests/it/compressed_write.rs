//! Writing compressed clusters: what QEMU reads of them, refcounts where streams share clusters, and what
//! takes their place.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;

use blockmirror_block::testing::{MemoryStorage, Rng};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{
    CheckObserver, CheckReport, Compression, CreateOptions, Finding, OpenOptions, Qcow2, Version, check,
};
use blockmirror_testing::qemu::have;

use crate::common::{backing_disk, qemu_check_finds_nothing};

/// An odd number of sectors: the last cluster is partial.
const LEN: u64 = (1 << 20) + 1536;

/// Bytes that compress, with a stretch that does not in each eighth.
pub(crate) fn content(len: u64, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed, 1);
    (0..len)
        .map(|at| if at >> 14 & 7 == 5 { rng.next() as u8 } else { (at / 37 % 200) as u8 ^ seed as u8 })
        .collect()
}

pub(crate) fn create(change: impl Fn(&mut CreateOptions)) -> Arc<MemoryStorage> {
    let mut options = CreateOptions::new(LEN);
    change(&mut options);
    let storage = Arc::new(MemoryStorage::new());
    options.create(&*storage, None).unwrap();
    storage
}

pub(crate) fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    OpenOptions::new().writable(true).open(storage).unwrap()
}

pub(crate) fn read(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0; disk.len() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

struct Quiet;

impl CheckObserver for Quiet {
    fn found(&mut self, _: &Finding, _: u64) {}

    fn progress(&mut self, _: u64, _: u64) -> Visit {
        Visit::Continue(())
    }
}

pub(crate) fn checked(storage: &dyn Storage) -> CheckReport {
    check(storage, &mut Quiet).unwrap()
}

/// Neither QEMU nor this crate finds anything wrong.
fn assert_clean(storage: &MemoryStorage, what: &str) -> CheckReport {
    let report = checked(storage);
    assert!(report.is_clean(), "{what}: {report:?}");
    qemu_check_finds_nothing(&storage.to_vec(), what);
    report
}

/// A change of the options of new images.
type Change = fn(&mut CreateOptions);

const IMAGES: [(&str, Change); 14] = [
    ("cluster_size=512", |o| o.cluster_size = 512),
    ("cluster_size=4k", |o| o.cluster_size = 4096),
    ("cluster_size=64k", |_| {}),
    ("cluster_size=2M", |o| o.cluster_size = 2 << 20),
    ("compat=0.10", |o| o.version = Version::V2),
    ("compat=0.10,cluster_size=1k", |o| (o.version, o.cluster_size) = (Version::V2, 1024)),
    ("compression_type=zstd", |o| o.compression = Compression::Zstd),
    ("compression_type=zstd,cluster_size=4k", |o| {
        (o.compression, o.cluster_size) = (Compression::Zstd, 4096);
    }),
    ("compression_type=zstd,cluster_size=2M", |o| {
        (o.compression, o.cluster_size) = (Compression::Zstd, 2 << 20);
    }),
    ("extended_l2=on,cluster_size=16k", |o| (o.extended_l2, o.cluster_size) = (true, 16 << 10)),
    ("refcount_bits=1", |o| (o.refcount_bits, o.cluster_size) = (1, 16 << 10)),
    ("refcount_bits=2", |o| (o.refcount_bits, o.cluster_size) = (2, 16 << 10)),
    ("refcount_bits=4", |o| (o.refcount_bits, o.cluster_size) = (4, 4096)),
    ("refcount_bits=64", |o| (o.refcount_bits, o.cluster_size) = (64, 512)),
];

#[test]
fn qemu_reads_what_is_written_compressed() {
    for (options, change) in IMAGES {
        for batch in [1 << 20, 64 << 10] {
            let what = format!("{options}, {batch} bytes at once");
            let storage = create(change);
            let truth = content(LEN, 3);
            let disk = open(storage.clone());
            let cluster = disk.geometry().cluster_size.unwrap();
            for part in ByteRange::new(0, LEN).pieces(cluster.max(batch)) {
                let bytes = &truth[part.start() as usize..part.end() as usize];
                disk.write_compressed(bytes, part.start()).unwrap();
            }
            assert!(read(&disk) == truth, "{what}");
            disk.flush().unwrap();
            let report = assert_clean(&storage, &what);
            assert!(report.compressed_clusters >= report.allocated_clusters / 2, "{what}: {report:?}");
            drop(disk);
            assert!(read(&open(storage.clone())) == truth, "{what}: after it was opened anew");
            if have("qemu_reads_what_is_written_compressed", &["qemu-img"]) {
                let dir = tempfile::tempdir().unwrap();
                std::fs::write(dir.path().join("raw"), &truth).unwrap();
                std::fs::write(dir.path().join("c.qcow2"), storage.to_vec()).unwrap();
                let compare = ["compare", "-f", "raw", "-F", "qcow2", "raw", "c.qcow2"];
                crate::qemu::img(dir.path(), &compare).unwrap();
            }
        }
    }
}

/// Streams are packed: data of which a fraction is left takes that fraction of the space.
#[test]
fn streams_share_host_clusters() {
    let storage = create(|o| o.cluster_size = 16 << 10);
    let empty = storage.len().unwrap();
    let disk = open(storage.clone());
    for at in (0..1 << 20).step_by(16 << 10) {
        disk.write_compressed(&vec![(at >> 14) as u8; 16 << 10], at).unwrap();
    }
    disk.flush().unwrap();
    // 64 streams of less than a sector each, an L2 table.
    assert!(storage.len().unwrap() <= empty + (4 << 14), "{}", storage.len().unwrap() - empty);
    let report = assert_clean(&storage, "shared");
    assert_eq!((report.compressed_clusters, report.allocated_clusters), (64, 64));
}

#[test]
fn what_lies_there_is_replaced_and_its_space_given_back() {
    for (options, change) in IMAGES {
        let storage = create(change);
        let disk = open(storage.clone());
        let cluster = disk.geometry().cluster_size.unwrap();
        let whole = ByteRange::new(0, LEN).align_inward(cluster);
        let mut truth = content(LEN, 1);
        disk.write_at(&truth, 0, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        for seed in 2..5 {
            let new = content(whole.len(), seed);
            disk.write_compressed(&new, 0).unwrap();
            truth[..new.len()].copy_from_slice(&new);
            assert!(read(&disk) == truth, "{options}: {seed}");
            disk.flush().unwrap();
        }
        // Parts of compressed clusters, a zeroed stretch, a discarded one.
        disk.write_at(&[9; 700], 300, WriteFlags::NONE).unwrap();
        truth[300..1000].fill(9);
        disk.write_zeroes(ByteRange::new(100_000, 300_000), ZeroFlags::MAY_UNMAP).unwrap();
        truth[100_000..300_000].fill(0);
        assert!(read(&disk) == truth, "{options}");
        disk.discard(whole).unwrap();
        disk.flush().unwrap();
        let after = read(&disk);
        assert!(after.iter().zip(&truth).all(|(now, then)| now == then || *now == 0), "{options}");
        assert_clean(&storage, options);
    }
}

/// A cluster whose streams have all gone is given to others. What was placed in it last left room behind it:
/// the next stream would have gone there.
#[test]
fn nothing_is_placed_in_a_cluster_that_was_given_back() {
    let storage = create(|o| o.cluster_size = 16 << 10);
    let disk = open(storage.clone());
    let cluster = 16 << 10;
    disk.write_compressed(&vec![1; cluster], 0).unwrap();
    disk.flush().unwrap();
    disk.discard(ByteRange::at(0, cluster as u64)).unwrap();
    disk.flush().unwrap();
    let noise = Rng::new(5, 5).bytes(cluster);
    disk.write_at(&noise, cluster as u64, WriteFlags::NONE).unwrap();
    disk.write_compressed(&vec![2; cluster], 2 * cluster as u64).unwrap();
    disk.flush().unwrap();
    let all = read(&disk);
    assert!(all[cluster..2 * cluster] == noise && all[2 * cluster..3 * cluster].iter().all(|b| *b == 2));
    assert_clean(&storage, "given back");
}

/// The same descriptor came to stand for other bytes, and a part of a cluster was read as it had been.
#[test]
fn a_place_that_is_used_again_is_not_read_from_what_was_kept() {
    let storage = create(|o| o.cluster_size = 16 << 10);
    let disk = open(storage);
    let cluster = 16 << 10;
    for round in 1..4u8 {
        disk.write_compressed(&vec![round; cluster], 0).unwrap();
        disk.flush().unwrap();
        let mut part = [0; 512];
        disk.read_at(&mut part, 1024).unwrap();
        assert_eq!(part, [round; 512]);
        disk.discard(ByteRange::at(0, cluster as u64)).unwrap();
        disk.flush().unwrap();
    }
}

#[test]
fn a_backing_file_shows_where_nothing_is_written() {
    let storage = create(|o| {
        (o.backing_file, o.backing_format) = (Some(b"base".to_vec()), Some("raw".to_owned()));
    });
    let backing = backing_disk(LEN);
    let mut truth = read(&*backing);
    let disk = OpenOptions::new().writable(true).backing(backing).open(storage.clone()).unwrap();
    disk.write_compressed(&[1; 128 << 10], 64 << 10).unwrap();
    truth[64 << 10..192 << 10].fill(1);
    disk.write_at(&[2; 100], 70_000, WriteFlags::NONE).unwrap();
    truth[70_000..70_100].fill(2);
    disk.flush().unwrap();
    assert!(read(&disk) == truth);
    assert!(checked(&*storage).is_clean());
}

#[test]
fn bitmaps_record_it() {
    let storage = crate::bitmaps::image(4096);
    let disk = open(storage.clone());
    disk.write_compressed(&content(64 << 10, 1), 128 << 10).unwrap();
    disk.store_bitmaps().unwrap();
    drop(disk);
    let written = 128 << 10..192 << 10;
    assert_eq!(crate::bitmaps::runs(&storage, "on"), std::slice::from_ref(&written));
    assert_clean(&storage, "bitmaps");
}

#[test]
fn parts_of_clusters_are_refused() {
    let storage = create(|_| {});
    let disk = open(storage.clone());
    let kind = |len: usize, at| disk.write_compressed(&vec![1; len], at).unwrap_err().kind();
    for (len, at) in [(512, 0), (65536, 512), (65536 + 512, 0), (65536, LEN - 65536)] {
        assert_eq!(kind(len, at), ErrorKind::InvalidInput, "{len} at {at}");
    }
    assert_eq!(kind(65536, LEN), ErrorKind::OutOfBounds);
    disk.write_compressed(&[1; 1536], 1 << 20).unwrap();
    disk.write_compressed(&[], 512).unwrap();
    disk.flush().unwrap();
    let reader = OpenOptions::new().open(storage).unwrap();
    assert_eq!(reader.write_compressed(&[1; 65536], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn an_image_with_a_data_file_has_nothing_compressed() {
    let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
    let mut options = CreateOptions::new(LEN);
    options.data_file = Some(b"data".to_vec());
    options.create(&*storage, Some(&*data)).unwrap();
    let disk = OpenOptions::new().writable(true).data_file(data).open(storage).unwrap();
    assert_eq!(disk.write_compressed(&[1; 65536], 0).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn threads_compress_beside_plain_writes() {
    for refcount_bits in [2, 16] {
        let storage = create(|o| (o.cluster_size, o.refcount_bits) = (4096, refcount_bits));
        let disk = open(storage.clone());
        let truth = content(LEN, 9);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (disk, truth) = (&disk, &truth);
                scope.spawn(move || {
                    let mine = ByteRange::new(0, LEN).pieces(16 << 10).skip(thread).step_by(4);
                    for (round, part) in mine.enumerate() {
                        let bytes = &truth[part.start() as usize..part.end() as usize];
                        match round % 3 {
                            0 => disk.write_at(bytes, part.start(), WriteFlags::NONE).unwrap(),
                            _ => disk.write_compressed(bytes, part.start()).unwrap(),
                        }
                        if round % 5 == 4 {
                            disk.discard(part).unwrap();
                            disk.write_compressed(bytes, part.start()).unwrap();
                            disk.flush().unwrap();
                        }
                    }
                });
            }
        });
        assert!(read(&disk) == truth);
        disk.flush().unwrap();
        assert_clean(&storage, "threads");
    }
}
