//! Compressed clusters as QEMU writes them, read in pieces of every size; and what damage does.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::sync::Arc;

use crate::common::word;
use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, StorageInfo, Visit, WriteFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};
use blockmirror_testing::qemu::have;

/// Bytes that compress, with a plain stretch that does not and one of zeros.
fn content(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    (0..len)
        .map(|at| match at >> 16 & 7 {
            3 => 0,
            5 => {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            }
            _ => (at / 37 % 200) as u8,
        })
        .collect()
}

fn open(dir: &Path, name: &str) -> Qcow2 {
    let bytes = std::fs::read(dir.join(name)).unwrap();
    OpenOptions::new().open(Arc::new(MemoryStorage::with_contents(&bytes))).unwrap()
}

fn make(dir: &Path, options: &str) -> Vec<u8> {
    // An odd number of sectors: the last cluster is partial.
    let truth = content((1 << 20) + 1536);
    std::fs::write(dir.join("raw"), &truth).unwrap();
    let _ = std::fs::remove_file(dir.join("c.qcow2"));
    crate::qemu::img(dir, &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "c.qcow2"])
        .unwrap();
    truth
}

#[test]
fn pieces_of_every_size_read_back() {
    if !have("pieces_of_every_size_read_back", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=2M",
        "compat=0.10",
        "compression_type=zstd,cluster_size=4k",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=2M",
        "compression_type=zstd,extended_l2=on",
        "extended_l2=on,cluster_size=16k",
    ] {
        let truth = make(dir, options);
        let disk = open(dir, "c.qcow2");
        assert_eq!(disk.len(), truth.len() as u64);
        for step in [512, 1000, 65536, 100_000, truth.len()] {
            for start in (0..truth.len()).step_by(step) {
                let part = &truth[start..truth.len().min(start + step)];
                let mut got = vec![0; part.len()];
                disk.read_at(&mut got, start as u64).unwrap();
                assert!(got == part, "{options}: {} bytes at {start}", part.len());
            }
        }
        let mut compressed = 0;
        disk.extents(ByteRange::new(0, disk.len()), &mut |extent| {
            assert!(!extent.compressed || extent.host.is_none());
            compressed += if extent.compressed { extent.range.len() } else { 0 };
            Visit::Continue(())
        })
        .unwrap();
        assert!(compressed > 0, "{options}: nothing is compressed");
    }
}

#[test]
fn many_threads_read_one_compressed_image() {
    if !have("many_threads_read_one_compressed_image", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let truth = make(dir.path(), "compression_type=zstd,cluster_size=64k");
    let disk = open(dir.path(), "c.qcow2");
    std::thread::scope(|s| {
        for thread in 0..4 {
            let (disk, truth) = (&disk, &truth);
            s.spawn(move || {
                for round in 0..300 {
                    let at = (round * 7919 + thread * 104_729) % (truth.len() - 5000);
                    let mut got = vec![0; 5000];
                    disk.read_at(&mut got, at as u64).unwrap();
                    assert!(got == truth[at..at + 5000], "at {at}");
                }
            });
        }
    });
}

#[test]
fn a_damaged_stream_is_an_error_that_says_where() {
    if !have("a_damaged_stream_is_an_error_that_says_where", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in ["compression_type=zstd", "compression_type=zlib"] {
        make(dir.path(), options);
        let mut bytes = std::fs::read(dir.path().join("c.qcow2")).unwrap();
        // The first L2 table follows the L1 table; its first entry is that of a compressed cluster.
        let l1 = u64::from_be_bytes(bytes[0x30000..0x30008].try_into().unwrap());
        let l2 = usize::try_from(l1 & 0x00ff_ffff_ffff_fe00).unwrap();
        let word = u64::from_be_bytes(bytes[l2..l2 + 8].try_into().unwrap());
        assert_ne!(word & 1 << 62, 0);
        let offset = usize::try_from(word & ((1 << 54) - 1)).unwrap();
        bytes[offset..offset + 16].fill(0xff);
        let disk = OpenOptions::new().open(Arc::new(MemoryStorage::with_contents(&bytes))).unwrap();
        for len in [512, 65536] {
            let error = disk.read_at(&mut vec![0; len], 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert_eq!(error.offset(), Some(offset as u64));
            assert!(error.name().is_some(), "{error}");
        }
        disk.read_at(&mut [0; 512], 65536).unwrap();
    }
}

/// Several compressed clusters share a host cluster. Where all of them were dropped between two flushes its
/// count went from their number to zero, and its space was not given back, since the count was not one.
#[test]
fn a_host_cluster_whose_streams_all_go_at_once_is_discarded() {
    const CLUSTER: u64 = 4096;
    let mut info = StorageInfo::plain();
    (info.discards, info.cheap_zero) = (true, true);
    for (shared, dropped) in [(4, 4), (5, 4), (4, 3), (1, 1)] {
        let storage = Arc::new(MemoryStorage::new().with_info(info));
        let mut options = CreateOptions::new(1 << 20);
        options.cluster_size = CLUSTER;
        options.create(&*storage, None).unwrap();
        let open = || OpenOptions::new().writable(true).open(storage.clone()).unwrap();
        open().write_at(&[1; 2 * CLUSTER as usize], 0, WriteFlags::FUA).unwrap();
        let offset = 0x00ff_ffff_ffff_fe00;
        let l2 = word(&storage, word(&storage, 40) & offset) & offset;
        let (host, block) = (word(&storage, l2) & offset, word(&storage, word(&storage, 48)));
        // The streams lie in the first host cluster; the second has a plain one.
        storage.write_at(&word(&storage, l2 + 8).to_be_bytes(), l2 + 64).unwrap();
        for i in 0..dropped {
            storage.write_at(&((host + i * 512) | 1 << 62).to_be_bytes(), l2 + i * 8).unwrap();
        }
        storage.write_at(&(shared as u16).to_be_bytes(), block + host / CLUSTER * 2).unwrap();
        let disk = open();
        // In two parts, not in order, with another cluster between.
        for cluster in (0..dropped).rev().chain([8]) {
            disk.discard(ByteRange::at(cluster * CLUSTER, CLUSTER)).unwrap();
        }
        disk.flush().unwrap();
        let is_gone = |at| word(&storage, at) == 0;
        let what = format!("{dropped} of {shared}");
        assert_eq!(is_gone(host), shared == dropped, "{what}");
        assert!(is_gone(host + CLUSTER), "{what}");
    }
}
