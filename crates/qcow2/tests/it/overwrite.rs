//! Random operations on images that are full of what this crate never writes: clusters that QEMU compressed,
//! entries without COPIED, a block device with old bytes behind the image.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, StorageInfo, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{Header, OpenOptions, Qcow2};
use blockmirror_testing::qemu::have;
use proptest::prelude::*;

const SIZE: u64 = 5 * 64 * 1024 + 1536;

/// `qemu-img convert` arguments.
const IMAGES: [&[&str]; 7] = [
    &["-c", "-o", "cluster_size=4k"],
    &["-c", "-o", "cluster_size=64k,compression_type=zstd"],
    &["-c", "-o", "cluster_size=16k,extended_l2=on"],
    &["-c", "-o", "cluster_size=512,refcount_bits=2"],
    &["-c", "-o", "compat=0.10,cluster_size=4k"],
    &["-o", "cluster_size=512,refcount_bits=1"],
    &["-o", "cluster_size=16k,extended_l2=on"],
];

#[derive(Clone, Debug)]
enum Op {
    Write(ByteRange, u8),
    Zero(ByteRange, ZeroFlags),
    Discard(ByteRange),
    Flush,
    Reopen,
}

fn range() -> impl Strategy<Value = ByteRange> {
    let start =
        prop_oneof![0..SIZE, (0..SIZE / 512).prop_map(|s| s * 512), (0..SIZE / 4096).prop_map(|s| s * 4096)];
    let len = prop_oneof![1u64..2048, Just(512), Just(4096), Just(65536), 1u64..SIZE, Just(SIZE)];
    (start, len).prop_map(|(start, len)| ByteRange::new(start, (start + len).min(SIZE)))
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let flags = prop_oneof![
        Just(ZeroFlags::NONE),
        Just(ZeroFlags::MAY_UNMAP),
        Just(ZeroFlags::NO_FALLBACK),
        Just(ZeroFlags::NO_FALLBACK | ZeroFlags::MAY_UNMAP),
    ];
    let op = prop_oneof![
        4 => (range(), 1u8..).prop_map(|(r, b)| Op::Write(r, b)),
        3 => (range(), flags).prop_map(|(r, f)| Op::Zero(r, f)),
        2 => range().prop_map(Op::Discard),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..24)
}

/// Bytes that compress, with stretches of zeros.
fn content() -> Vec<u8> {
    (0..SIZE).map(|at| if at >> 13 & 3 == 2 { 0 } else { (at / 97 % 251) as u8 | 1 }).collect()
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Clears COPIED in the whole active mapping, as is legal at any refcount.
fn clear_copied(image: &mut [u8]) {
    let header = Header::parse(image).unwrap();
    let clear = |image: &mut [u8], at: u64| {
        let entry = word(image, at) & !(1 << 63);
        image[at as usize..at as usize + 8].copy_from_slice(&entry.to_be_bytes());
        entry
    };
    for index in 0..u64::from(header.l1_entries) {
        let table = clear(image, header.l1_offset + index * 8);
        if table != 0 {
            let size = header.cluster_size() / header.l2_entries();
            (0..header.l2_entries()).for_each(|i| {
                clear(image, table + i * size);
            });
        }
    }
}

fn storage(image: &[u8], fixed: bool) -> Arc<MemoryStorage> {
    if !fixed {
        return Arc::new(MemoryStorage::with_contents(image));
    }
    // A block device keeps what it held before the image was put there.
    let mut bytes = image.to_vec();
    bytes.resize(4 << 20, 0xff);
    let mut info = StorageInfo::plain();
    (info.fixed_len, info.zero_init) = (true, false);
    Arc::new(MemoryStorage::with_contents(&bytes).with_info(info))
}

fn open(storage: &Arc<MemoryStorage>) -> Qcow2 {
    OpenOptions::new().writable(true).cache_bytes(0).open(storage.clone()).unwrap()
}

fn apply(storage: &MemoryStorage, disk: &Qcow2, model: &mut [u8], op: &Op) {
    let span = |r: ByteRange| r.start() as usize..r.end() as usize;
    match *op {
        Op::Write(r, seed) => {
            let bytes: Vec<u8> = (r.start()..r.end()).map(|at| (at / 512) as u8 ^ at as u8 ^ seed).collect();
            disk.write_at(&bytes, r.start(), WriteFlags::NONE).unwrap();
            model[span(r)].copy_from_slice(&bytes);
        }
        Op::Zero(r, flags) => {
            let before = storage.to_vec();
            match disk.write_zeroes(r, flags) {
                Ok(()) => model[span(r)].fill(0),
                Err(error) => {
                    assert!(flags.contains(ZeroFlags::NO_FALLBACK), "{error}");
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    assert!(storage.to_vec() == before, "something was written");
                }
            }
        }
        Op::Discard(r) => {
            disk.discard(r).unwrap();
            let mut now = vec![0; r.len() as usize];
            disk.read_at(&mut now, r.start()).unwrap();
            for (new, old) in now.iter().zip(&mut model[span(r)]) {
                assert!(*new == *old || *new == 0, "discard changed {old} to {new}");
                *old = *new;
            }
        }
        Op::Flush => disk.flush().unwrap(),
        Op::Reopen => {}
    }
}

fn check(disk: &Qcow2, model: &[u8], what: &dyn std::fmt::Debug) {
    let mut all = vec![0xee; model.len()];
    disk.read_at(&mut all, 0).unwrap();
    if let Some(at) = (0..all.len()).find(|&i| all[i] != model[i]) {
        panic!("{what:?}: byte {at} is {:#x}, not {:#x}", all[at], model[at]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("PROPTEST_CASES").is_some() {
        ProptestConfig::default().cases
    } else {
        32
    }))]

    #[test]
    fn images_of_others_behave_like_a_byte_vector(
        image in 0..IMAGES.len(),
        uncopied in any::<bool>(),
        fixed in any::<bool>(),
        ops in ops(),
    ) {
        if !have("images_of_others_behave_like_a_byte_vector", &["qemu-img"]) {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let mut model = content();
        std::fs::write(dir.path().join("raw"), &model).unwrap();
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(IMAGES[image]);
        args.extend(["raw", "image.qcow2"]);
        crate::qemu::img(dir.path(), &args).unwrap();
        let mut bytes = std::fs::read(dir.path().join("image.qcow2")).unwrap();
        if uncopied {
            clear_copied(&mut bytes);
        }
        let storage = storage(&bytes, fixed);
        let mut disk = open(&storage);
        for op in &ops {
            apply(&storage, &disk, &mut model, op);
            if matches!(op, Op::Reopen) {
                disk.flush().unwrap();
                drop(disk);
                disk = open(&storage);
            }
            check(&disk, &model, op);
        }
        disk.flush().unwrap();
        if uncopied {
            // What is left without COPIED is no error here, but one to the judge.
            disk.write_at(&model, 0, WriteFlags::NONE).unwrap();
            disk.flush().unwrap();
        }
        drop(disk);
        check(&open(&storage), &model, &"reopened");
        std::fs::write(dir.path().join("image.qcow2"), storage.to_vec()).unwrap();
        crate::qemu::assert_clean(dir.path(), "image.qcow2", "at the end");
    }
}
