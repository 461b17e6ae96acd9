//! Random operations on an image against a plain byte vector, through every format variant, with `qemu-img
//! check` as the judge of what is left on disk.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::{Arc, LazyLock};

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ByteRange, ExtentKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2, Version};
use blockmirror_raw::{Raw, RawOptions};
use blockmirror_testing::qemu::{have, run};
use proptest::prelude::*;

const SIZE: u64 = 3 * 64 * 1024 + 1536;

#[derive(Clone, Debug)]
enum Op {
    Write(ByteRange, u8),
    Zero(ByteRange, bool),
    Discard(ByteRange),
    /// Changes nothing that is read.
    CopyUp(ByteRange),
    Resize(u64),
    Flush,
    Reopen,
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    version: Version,
    cluster_bits: u32,
    extended: bool,
    refcount_order: u32,
    backing: Option<u64>,
    data_file: Option<bool>,
}

/// Cluster bits, and whether the L2 entries are extended, of an image with a data file.
fn layouts() -> impl Strategy<Value = (u32, bool)> {
    prop_oneof![Just((12, false)), Just((16, false)), Just((14, true))]
}

fn variants() -> impl Strategy<Value = Variant> {
    let plain = (prop_oneof![Just(9u32), Just(12), Just(16)], any::<bool>(), 0u32..=6, backing());
    prop_oneof![
        4 => plain.prop_map(|(cluster_bits, v3, order, backing)| Variant {
            version: if v3 { Version::V3 } else { Version::V2 },
            cluster_bits,
            extended: false,
            refcount_order: if v3 { order } else { 4 },
            backing,
            data_file: None,
        }),
        2 => (prop_oneof![Just(14u32), Just(16)], backing()).prop_map(|(cluster_bits, backing)| Variant {
            version: Version::V3,
            cluster_bits,
            extended: true,
            refcount_order: 4,
            backing,
            data_file: None,
        }),
        2 => (layouts(), any::<bool>(), backing())
            .prop_map(|((cluster_bits, extended), raw, backing)| Variant {
                version: Version::V3,
                cluster_bits,
                extended,
                refcount_order: 4,
                backing: backing.filter(|_| !raw),
                data_file: Some(raw),
            }),
    ]
}

/// No backing device, or one of some length: shorter, as long, longer.
fn backing() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), Just(Some(SIZE)), Just(Some(70_144)), Just(Some(SIZE + 65536))]
}

fn range() -> impl Strategy<Value = ByteRange> {
    let start =
        prop_oneof![0..SIZE, (0..SIZE / 512).prop_map(|s| s * 512), (0..SIZE / 4096).prop_map(|s| s * 4096)];
    let len = prop_oneof![1u64..2048, Just(512), Just(4096), Just(65536), 1u64..SIZE, Just(SIZE)];
    (start, len).prop_map(|(start, len)| ByteRange::new(start, (start + len).min(SIZE)))
}

/// Lengths of the disk: none, in the first cluster, on borders and between, past what an L1 table of one
/// small cluster reaches.
fn len() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => Just(0u64),
        2 => Just(512),
        6 => (1..=(SIZE / 512 + 200)).prop_map(|s| s * 512),
        2 => Just(SIZE + 65536),
        1 => Just((2 << 20) + 33_280),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        5 => (range(), 1u8..).prop_map(|(r, b)| Op::Write(r, b)),
        2 => (range(), any::<bool>()).prop_map(|(r, u)| Op::Zero(r, u)),
        2 => range().prop_map(Op::Discard),
        1 => range().prop_map(Op::CopyUp),
        1 => len().prop_map(Op::Resize),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..40)
}

/// Bytes that tell where they belong.
fn pattern(range: ByteRange, seed: u8) -> Vec<u8> {
    (range.start()..range.end()).map(|at| (at / 512) as u8 ^ (at as u8) ^ seed | 1).collect()
}

struct Bench {
    storage: Arc<MemoryStorage>,
    data: Option<Arc<MemoryStorage>>,
    backing: Option<Arc<dyn BlockDevice>>,
}

impl Bench {
    fn new(v: Variant) -> (Self, Vec<u8>) {
        let storage = Arc::new(MemoryStorage::new());
        let data = v.data_file.map(|_| Arc::new(MemoryStorage::new()));
        let mut options = CreateOptions::new(SIZE);
        options.version = v.version;
        options.cluster_size = 1 << v.cluster_bits;
        options.extended_l2 = v.extended;
        options.refcount_bits = 1 << v.refcount_order;
        options.data_file = v.data_file.map(|_| b"data.raw".to_vec());
        options.data_file_raw = v.data_file == Some(true);
        options.create(&*storage, data.as_ref().map(|d| &**d as &dyn Storage)).unwrap();
        let mut model = vec![0; SIZE as usize];
        let backing = v.backing.map(|len| {
            let below = pattern(ByteRange::new(0, len), 0x5a);
            let seen = below.len().min(model.len());
            model[..seen].copy_from_slice(&below[..seen]);
            let file = MemoryStorage::new();
            file.write_at(&below, 0).unwrap();
            let disk: Arc<dyn BlockDevice> =
                Arc::new(Raw::open(Arc::new(file), RawOptions::default()).unwrap());
            disk
        });
        (Self { storage, data, backing }, model)
    }

    fn open(&self) -> Qcow2 {
        let mut options = OpenOptions::new().writable(true).cache_bytes(0);
        if let Some(backing) = &self.backing {
            options = options.backing(Arc::clone(backing));
        }
        if let Some(data) = &self.data {
            options = options.data_file(Arc::clone(data) as Arc<dyn Storage>);
        }
        options.open(Arc::clone(&self.storage) as Arc<dyn Storage>).unwrap()
    }
}

/// The operation as far as the disk goes.
fn clipped(op: &Op, len: u64) -> Op {
    let clip = |r: ByteRange| ByteRange::new(r.start().min(len), r.end().min(len));
    match *op {
        Op::Write(r, seed) => Op::Write(clip(r), seed),
        Op::Zero(r, unmap) => Op::Zero(clip(r), unmap),
        Op::Discard(r) => Op::Discard(clip(r)),
        Op::CopyUp(r) => Op::CopyUp(clip(r)),
        ref other => other.clone(),
    }
}

fn apply(disk: &Qcow2, model: &mut Vec<u8>, op: &Op) {
    let span = |r: ByteRange| r.start() as usize..r.end() as usize;
    match clipped(op, model.len() as u64) {
        Op::Write(r, seed) => {
            let bytes = pattern(r, seed);
            disk.write_at(&bytes, r.start(), WriteFlags::NONE).unwrap();
            model[span(r)].copy_from_slice(&bytes);
        }
        Op::Zero(r, unmap) => {
            let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE };
            disk.write_zeroes(r, flags).unwrap();
            model[span(r)].fill(0);
        }
        Op::Discard(r) => {
            disk.discard(r).unwrap();
            let mut now = vec![0; r.len() as usize];
            disk.read_at(&mut now, r.start()).unwrap();
            for (i, (&new, old)) in now.iter().zip(&mut model[span(r)]).enumerate() {
                assert!(
                    new == *old || new == 0,
                    "discard changed byte {} from {old} to {new}",
                    r.start() + i as u64
                );
                *old = new;
            }
        }
        Op::CopyUp(r) => {
            disk.copy_up(r, 1).unwrap();
            disk.extents(r, &mut |e| {
                assert!(e.depth == 0 || e.kind == ExtentKind::Unallocated, "{e:?} is still below");
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        }
        Op::Resize(len) => {
            disk.resize(len, true).unwrap();
            model.resize(len as usize, 0);
        }
        Op::Flush => disk.flush().unwrap(),
        Op::Reopen => {}
    }
}

fn check(disk: &Qcow2, model: &[u8]) {
    assert_eq!(disk.len(), model.len() as u64);
    let mut all = vec![0xee; model.len()];
    disk.read_at(&mut all, 0).unwrap();
    if let Some(at) = (0..all.len()).find(|&i| all[i] != model[i]) {
        panic!("byte {at} is {:#x}, not {:#x}", all[at], model[at]);
    }
    let mut end = 0;
    disk.extents(ByteRange::new(0, disk.len()), &mut |e| {
        assert_eq!(e.range.start(), end, "a gap before {e:?}");
        end = e.range.end();
        if e.reads_as_zero() {
            assert!(
                model[e.range.start() as usize..end as usize].iter().all(|b| *b == 0),
                "{e:?} is not zero"
            );
        }
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(end, disk.len());
}

/// Whether `qemu-img` can be run. Looked up once, so that a skip is reported once and not for each case.
static QEMU: LazyLock<bool> = LazyLock::new(|| have("an_image_behaves_like_a_byte_vector", &["qemu-img"]));

/// `qemu-img check` finds neither corruption nor leaks.
fn qemu_check(bench: &Bench) {
    if !*QEMU {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let save = |storage: &MemoryStorage, name: &str| {
        let mut bytes = vec![0; storage.len().unwrap() as usize];
        storage.read_at(&mut bytes, 0).unwrap();
        std::fs::write(dir.path().join(name), bytes).unwrap();
    };
    save(&bench.storage, "image.qcow2");
    if let Some(data) = &bench.data {
        save(data, "data.raw");
    }
    run("qemu-img", dir.path(), ["check", "-q", "-f", "qcow2", "image.qcow2"]).unwrap();
}

/// Each case asks `qemu-img`, so the default number is low; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(48),
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn an_image_behaves_like_a_byte_vector(variant in variants(), ops in ops()) {
        let (bench, mut model) = Bench::new(variant);
        let mut disk = bench.open();
        for op in &ops {
            apply(&disk, &mut model, op);
            if matches!(op, Op::Reopen) {
                disk.flush().unwrap();
                drop(disk);
                disk = bench.open();
            }
            check(&disk, &model);
        }
        disk.flush().unwrap();
        drop(disk);
        check(&bench.open(), &model);
        qemu_check(&bench);
    }
}

#[test]
fn an_image_of_this_test_passes_the_check() {
    let (bench, mut model) = Bench::new(Variant {
        version: Version::V3,
        cluster_bits: 16,
        extended: false,
        refcount_order: 4,
        backing: None,
        data_file: None,
    });
    apply(&bench.open(), &mut model, &Op::Flush);
    qemu_check(&bench);
    assert_eq!(bench.open().len(), SIZE);
}
