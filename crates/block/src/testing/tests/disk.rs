//! `MemoryDisk` against a model.

use std::sync::Arc;

use proptest::prelude::*;

use crate::testing::{DiskOp, MemoryDisk};
use crate::{BlockDevice, DiscardEffect, Geometry, WriteFlags, ZeroCost, ZeroFlags};
use crate::{ByteRange, ErrorKind};
use crate::{Extent, ExtentKind, Visit};

#[derive(Clone, Debug)]
enum Op {
    Write(ByteRange, u8),
    Zero(ByteRange, bool),
    Discard(ByteRange),
}

fn range(len: u64) -> impl Strategy<Value = ByteRange> {
    let point = || prop_oneof![0..=len, (0..=len / 512).prop_map(|n| n * 512), Just(len), Just(0)];
    (point(), point()).prop_map(|(a, b)| ByteRange::new(a.min(b), a.max(b)))
}

fn op(len: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        (range(len), 1u8..=255).prop_map(|(r, b)| Op::Write(r, b)),
        (range(len), any::<bool>()).prop_map(|(r, f)| Op::Zero(r, f)),
        range(len).prop_map(Op::Discard),
    ]
}

fn case() -> impl Strategy<Value = (u64, Vec<Op>, Vec<Op>, ByteRange)> {
    prop_oneof![0u64..3000, 8000u64..20_000, Just(16_384)].prop_flat_map(|len| {
        let ops = || proptest::collection::vec(op(len), 0..15);
        (Just(len), ops(), ops(), range(len))
    })
}

/// Plays `ops` and keeps `model` at what the disk must read as.
fn play(disk: &MemoryDisk, ops: &[Op], model: &mut Vec<u8>) {
    for op in ops {
        match *op {
            Op::Write(r, byte) => {
                disk.write_at(&vec![byte; r.len() as usize], r.start(), WriteFlags::NONE).unwrap();
                model[r.start() as usize..r.end() as usize].fill(byte);
            }
            Op::Zero(r, no_fallback) => {
                let flags = if no_fallback { ZeroFlags::NO_FALLBACK } else { ZeroFlags::NONE };
                match disk.write_zeroes(r, flags) {
                    Ok(()) => model[r.start() as usize..r.end() as usize].fill(0),
                    Err(e) => assert!(no_fallback && e.kind() == ErrorKind::Unsupported),
                }
            }
            Op::Discard(r) => {
                disk.discard(r).unwrap();
                let now = disk.contents().unwrap();
                for i in r.start() as usize..r.end() as usize {
                    assert!(now[i] == model[i] || now[i] == 0, "discard shows something else at {i}");
                    model[i] = now[i];
                }
            }
        }
        assert!(disk.contents().unwrap() == *model, "after {op:?}");
    }
}

fn check_extents(disk: &MemoryDisk, model: &[u8], range: ByteRange) {
    let mut seen: Vec<Extent> = Vec::new();
    disk.extents(range, &mut |extent| {
        seen.push(extent);
        Visit::Continue(())
    })
    .unwrap();
    let mut at = range.start();
    for (i, extent) in seen.iter().enumerate() {
        assert!(extent.range.start() == at && !extent.range.is_empty());
        assert!(i == 0 || !seen[i - 1].continues_into(extent), "not maximal: {seen:?}");
        let bytes = &model[at as usize..extent.range.end() as usize];
        assert!(!extent.reads_as_zero() || bytes.iter().all(|b| *b == 0), "{extent:?} holds data");
        at = extent.range.end();
    }
    assert_eq!(at, range.end());
}

proptest! {
    #[test]
    fn reads_as_the_model_says_in_every_geometry(
        (len, below, above, probe) in case(),
        cluster in prop_oneof![Just(None), (9u32..14).prop_map(|shift| Some(1u64 << shift))],
        dear in any::<bool>(),
        backing_len in 0u64..20_000,
    ) {
        let geometry = Geometry {
            cluster_size: cluster,
            zero_cost: if dear { ZeroCost::Data } else { ZeroCost::Metadata },
            discard: DiscardEffect::Frees,
            ..Geometry::plain()
        };
        let base = MemoryDisk::new(len).with_geometry(geometry);
        let mut model = vec![0; len as usize];
        play(&base, &below, &mut model);
        check_extents(&base, &model, probe);

        // As a backing disk, cut or continued by zeros.
        let mut bytes = model.clone();
        bytes.resize(backing_len as usize, 0x77);
        model.iter_mut().skip(backing_len as usize).for_each(|b| *b = 0);
        for (slot, byte) in model.iter_mut().zip(&bytes) {
            *slot = *byte;
        }
        let backing: Arc<dyn BlockDevice> =
            if backing_len == len { Arc::new(base) } else { Arc::new(MemoryDisk::with_contents(&bytes)) };
        let overlay = MemoryDisk::new(len).with_geometry(geometry).with_backing(backing);
        play(&overlay, &above, &mut model);
        check_extents(&overlay, &model, probe);
    }
}

fn extents(disk: &MemoryDisk) -> Vec<(ByteRange, ExtentKind, u32)> {
    let mut out = Vec::new();
    disk.extents(ByteRange::new(0, disk.len()), &mut |e| {
        out.push((e.range, e.kind, e.depth));
        Visit::Continue(())
    })
    .unwrap();
    out
}

#[test]
fn allocation_is_by_cluster_and_shows_the_depth() {
    let base = MemoryDisk::new(20_000).with_cluster_size(4096);
    base.write_at(&[1], 4096, WriteFlags::NONE).unwrap();
    let top = MemoryDisk::new(30_000).with_cluster_size(8192).with_backing(Arc::new(base));
    top.write_at(&[2], 28_000, WriteFlags::NONE).unwrap();
    top.write_zeroes(ByteRange::new(16_000, 25_000), ZeroFlags::NONE).unwrap();
    let r = ByteRange::new;
    assert_eq!(
        extents(&top),
        [
            (r(0, 4096), ExtentKind::Unallocated, 1),
            (r(4096, 8192), ExtentKind::Data, 1),
            // The head of the zeros was cut: its cluster came up from below, data and all.
            (r(8192, 16_384), ExtentKind::Data, 0),
            (r(16_384, 24_576), ExtentKind::Zero, 0),
            (r(24_576, 30_000), ExtentKind::Data, 0),
        ]
    );
    assert_eq!(top.allocated_bytes(), 8192 + 5424);
    // A discard over a backing disk must not uncover it.
    top.discard(ByteRange::new(0, 30_000)).unwrap();
    assert_eq!(extents(&top)[2], (r(8192, 30_000), ExtentKind::Zero, 0));
}

#[test]
fn bounds_and_permissions_are_checked_before_anything_is_done() {
    let disk = MemoryDisk::new(1000).named("d").logged();
    for error in [
        disk.read_at(&mut [0; 2], 999),
        disk.read_at(&mut [0; 2], u64::MAX),
        disk.write_at(&[0; 2], 999, WriteFlags::NONE),
        disk.write_zeroes(ByteRange::new(0, 1001), ZeroFlags::NONE),
        disk.discard(ByteRange::new(1000, 1001)),
        disk.extents(ByteRange::new(0, 1001), &mut |_| Visit::Continue(())),
    ] {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::OutOfBounds);
    }
    assert_eq!(disk.take_log(), []);
    disk.read_at(&mut [], 1000).unwrap();
    disk.write_at(&[5; 3], 10, WriteFlags::FUA).unwrap();
    disk.flush().unwrap();
    assert_eq!(
        disk.take_log(),
        [
            DiskOp::Read(ByteRange::new(1000, 1000)),
            DiskOp::Write(ByteRange::new(10, 13), WriteFlags::FUA),
            DiskOp::Flush
        ]
    );
    let disk = disk.read_only();
    assert_eq!(disk.write_at(&[], 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn eight_tebibytes_with_a_few_runs_are_small() {
    let disk = MemoryDisk::new(8 << 40).with_cluster_size(65_536);
    disk.write_zeroes(ByteRange::new(0, 8 << 40), ZeroFlags::NO_FALLBACK).unwrap();
    disk.write_at(&[9; 100], 5 << 40, WriteFlags::NONE).unwrap();
    assert_eq!(disk.allocated_bytes(), 65_536);
    assert_eq!(extents(&disk).len(), 3);
}

#[test]
fn a_visitor_can_stop_and_may_use_the_disk() {
    let base = MemoryDisk::with_contents(&[1; 4096]);
    let disk = MemoryDisk::new(8192).with_cluster_size(512).with_backing(Arc::new(base));
    disk.write_at(&[2; 512], 1024, WriteFlags::NONE).unwrap();
    let mut calls = 0;
    disk.extents(ByteRange::new(0, 8192), &mut |e| {
        calls += 1;
        disk.read_at(&mut [0], e.range.start()).unwrap();
        Visit::Break(())
    })
    .unwrap();
    assert_eq!(calls, 1);
}
