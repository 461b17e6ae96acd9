//! `MemoryStorage` and `RecordingStorage` against a vector of bytes.

use proptest::prelude::*;

use crate::Visit;
use crate::ZeroFlags;
use crate::storage::{Storage, StorageInfo};
use crate::testing::{MemoryStorage, RecordingStorage};
use crate::{ByteRange, ErrorKind};

#[derive(Clone, Debug)]
enum Op {
    Write(u64, usize, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Allocate(u64, u64),
    SetLen(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let at = || prop_oneof![0u64..20_000, (0u64..6).prop_map(|n| n * 4096)];
    let len = || prop_oneof![0u64..700, Just(4096), 0u64..15_000];
    prop_oneof![
        4 => (at(), len(), 1u8..=255).prop_map(|(a, n, b)| Op::Write(a, n as usize, b)),
        3 => (at(), len()).prop_map(|(a, n)| Op::Zero(a, n)),
        2 => (at(), len()).prop_map(|(a, n)| Op::Discard(a, n)),
        1 => (at(), len()).prop_map(|(a, n)| Op::Allocate(a, n)),
        1 => at().prop_map(Op::SetLen),
    ]
}

fn apply(storage: &dyn Storage, model: &mut Vec<u8>, op: &Op) {
    let mut put = |at: u64, bytes: &[u8], grow: bool| {
        let end = at as usize + bytes.len();
        if grow && !bytes.is_empty() && model.len() < end {
            model.resize(end, 0);
        }
        for (slot, byte) in model.iter_mut().skip(at as usize).zip(bytes) {
            *slot = *byte;
        }
    };
    match *op {
        Op::Write(at, n, byte) => {
            storage.write_at(&vec![byte; n], at).unwrap();
            put(at, &vec![byte; n], true);
        }
        Op::Zero(at, n) => {
            storage.write_zeroes(ByteRange::at(at, n), ZeroFlags::NONE).unwrap();
            put(at, &vec![0; n as usize], true);
        }
        Op::Discard(at, n) => {
            storage.discard(ByteRange::at(at, n)).unwrap();
            put(at, &vec![0; n as usize], false);
        }
        Op::Allocate(at, n) => {
            storage.allocate(ByteRange::at(at, n)).unwrap();
            if n > 0 && model.len() < (at + n) as usize {
                model.resize((at + n) as usize, 0);
            }
        }
        Op::SetLen(len) => {
            storage.set_len(len).unwrap();
            model.resize(len as usize, 0);
        }
    }
}

fn check(storage: &dyn Storage, model: &[u8], probe: (u64, u64)) {
    assert_eq!(storage.len().unwrap(), model.len() as u64);
    // Past the end there are zeros.
    let mut buf = vec![0xaa; model.len() + 5000];
    storage.read_at(&mut buf, 0).unwrap();
    assert!(buf[..model.len()] == *model && buf[model.len()..].iter().all(|b| *b == 0));
    let range = ByteRange::at(probe.0, probe.1);
    let inside = range.intersect(ByteRange::new(0, model.len() as u64));
    let mut at = inside.start();
    let mut last = None;
    storage
        .extents(range, &mut |extent| {
            assert_eq!(extent.range.start(), at);
            assert!(!extent.range.is_empty() && last != Some(extent.hole));
            let bytes = &model[at as usize..extent.range.end() as usize];
            assert!(!extent.hole || bytes.iter().all(|b| *b == 0));
            at = extent.range.end();
            last = Some(extent.hole);
            Visit::Continue(())
        })
        .unwrap();
    assert_eq!(at, inside.end());
}

proptest! {
    #[test]
    fn behave_like_a_vector_of_bytes(ops in proptest::collection::vec(op(), 1..25), probe in (0u64..20_000, 0u64..20_000)) {
        let recording = RecordingStorage::default();
        let dear = MemoryStorage::new().with_info(StorageInfo { discards: true, ..StorageInfo::plain() });
        for storage in [&MemoryStorage::new() as &dyn Storage, &recording, &dear] {
            let mut model = Vec::new();
            for op in &ops {
                apply(storage, &mut model, op);
            }
            check(storage, &model, probe);
        }
        prop_assert_eq!(recording.snapshot().to_vec(), recording.to_vec());
    }
}

#[test]
fn a_fixed_storage_takes_nothing_past_its_end() {
    let storage = MemoryStorage::fixed(1000);
    assert_eq!(storage.write_at(&[1; 10], 991).unwrap_err().kind(), ErrorKind::NoSpace);
    let past = ByteRange::new(999, 1001);
    assert_eq!(storage.write_zeroes(past, ZeroFlags::NONE).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(storage.allocate(past).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(storage.set_len(500).unwrap_err().kind(), ErrorKind::Unsupported);
    storage.write_at(&[1; 10], 990).unwrap();
    storage.set_len(1000).unwrap();
    assert_eq!(storage.to_vec()[990..], [1; 10]);
}

#[test]
fn a_read_only_storage_refuses_every_change() {
    let storage = MemoryStorage::with_contents(b"abc").named("ro.img").read_only();
    let range = ByteRange::new(0, 1);
    let errors = [
        storage.write_at(b"x", 0),
        storage.write_zeroes(range, ZeroFlags::NONE),
        storage.discard(range),
        storage.allocate(range),
        storage.set_len(0),
    ];
    for error in errors {
        let error = error.unwrap_err();
        assert_eq!((error.kind(), error.name()), (ErrorKind::ReadOnly, Some("ro.img")));
    }
    assert_eq!(storage.to_vec(), b"abc");
}

#[test]
fn requests_past_the_64_bit_space_fail() {
    let storages: [&dyn Storage; 2] = [&MemoryStorage::new(), &RecordingStorage::default()];
    for storage in storages {
        assert_eq!(storage.write_at(&[0; 2], u64::MAX).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(storage.read_at(&mut [0; 2], u64::MAX).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert!(storage.is_empty().unwrap());
        // A terabyte of nothing costs nothing.
        storage.write_at(&[7], 1 << 40).unwrap();
        assert_eq!(storage.len().unwrap(), (1 << 40) + 1);
    }
}

#[test]
fn zeros_that_would_have_to_be_written_are_refused_on_request() {
    let storage = MemoryStorage::new().with_info(StorageInfo::plain());
    let range = ByteRange::new(0, 100);
    assert_eq!(
        storage.write_zeroes(range, ZeroFlags::NO_FALLBACK).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    assert_eq!(storage.len().unwrap(), 0);
    storage.write_zeroes(range, ZeroFlags::NONE).unwrap();
    assert_eq!(storage.allocated_bytes().unwrap(), Some(4096));
}
