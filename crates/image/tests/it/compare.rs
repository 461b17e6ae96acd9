//! `compare` against comparing the bytes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags, ZeroFlags};
use blockmirror_image::{CompareOptions, Difference, compare};
use proptest::prelude::*;

fn ours(a: &MemoryDisk, b: &MemoryDisk, strict: bool) -> Option<Difference> {
    compare(a, b, CompareOptions::default().strict(strict), &mut |_| Visit::Continue(())).unwrap()
}

/// The sector of the first byte that differs, the shorter disk taken as followed by zeros.
fn naive(a: &MemoryDisk, b: &MemoryDisk) -> Option<Difference> {
    let (mut a, mut b) = (a.contents().unwrap(), b.contents().unwrap());
    let len = a.len().max(b.len());
    a.resize(len, 0);
    b.resize(len, 0);
    let first = a.iter().zip(&b).position(|(x, y)| x != y)?;
    Some(Difference::Content { offset: (first / 512 * 512) as u64 })
}

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64 },
}

fn apply(disk: &MemoryDisk, ops: &[Op]) {
    for op in ops {
        match *op {
            Op::Write { at, len, byte } => {
                let part = ByteRange::at(at, len).intersect(ByteRange::new(0, disk.len()));
                disk.write_at(
                    &vec![byte; part.len() as usize],
                    part.start().min(disk.len()),
                    WriteFlags::NONE,
                )
                .unwrap();
            }
            Op::Zero { at, len } => {
                let part = ByteRange::at(at, len).intersect(ByteRange::new(0, disk.len()));
                if !part.is_empty() {
                    disk.write_zeroes(part, ZeroFlags::MAY_UNMAP).unwrap();
                }
            }
        }
    }
}

/// More than one buffer of the comparison.
const MAX: u64 = 5 << 18;

fn op() -> impl Strategy<Value = Op> {
    let place = (0..MAX, prop_oneof![1u64..600, Just(4096), 1u64..300_000]);
    prop_oneof![
        (place.clone(), 0u8..3).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        place.prop_map(|(at, len)| Op::Zero { at, len }),
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(512), Just(MAX), (1..=MAX / 512).prop_map(|sectors| sectors * 512)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_finds_what_comparing_the_bytes_finds(
        lengths in (length(), length()),
        common in prop::collection::vec(op(), 0..6),
        only_a in prop::collection::vec(op(), 0..2),
        only_b in prop::collection::vec(op(), 0..2),
    ) {
        let (a, b) = (MemoryDisk::new(lengths.0), MemoryDisk::new(lengths.1));
        for (disk, only) in [(&a, &only_a), (&b, &only_b)] {
            apply(disk, &common);
            apply(disk, only);
        }
        prop_assert_eq!(ours(&a, &b, false), naive(&a, &b));
        prop_assert_eq!(ours(&b, &a, false), naive(&a, &b));
    }
}

#[test]
fn strict_tells_lengths_and_allocation_apart() {
    let (short, long) = (MemoryDisk::new(1 << 20), MemoryDisk::new(2 << 20));
    assert_eq!(ours(&short, &long, false), None);
    assert_eq!(ours(&short, &long, true), Some(Difference::Length));
    let written = MemoryDisk::new(1 << 20);
    written.write_at(&[0; 4096], 65536, WriteFlags::NONE).unwrap();
    assert_eq!(ours(&short, &written, false), None);
    assert!(matches!(ours(&short, &written, true), Some(Difference::Status { offset: 65536 })));
}

#[test]
fn it_stops_when_told() {
    let (a, b) = (MemoryDisk::new(4 << 20), MemoryDisk::new(4 << 20));
    a.write_at(&[1; 512], (4 << 20) - 512, WriteFlags::NONE).unwrap();
    b.write_at(&[2; 4096], 0, WriteFlags::NONE).unwrap();
    a.write_at(&[2; 4096], 0, WriteFlags::NONE).unwrap();
    let found = compare(&a, &b, CompareOptions::default(), &mut |_| Visit::Break(())).unwrap();
    assert_eq!(found, None, "the difference lies behind where it was stopped");
}

/// The rest of the longer disk was one step, which no signal could end.
#[test]
fn the_rest_of_the_longer_disk_is_compared_in_pieces() {
    let short = MemoryDisk::new(512);
    let long = MemoryDisk::new(4 << 20);
    // Data, and zero: it is read.
    long.write_at(&vec![0; 4 << 20], 0, WriteFlags::NONE).unwrap();
    for (a, b) in [(&short, &long), (&long, &short)] {
        let mut steps = Vec::new();
        let found = compare(a, b, CompareOptions::default(), &mut |done| {
            steps.push(done);
            Visit::Continue(())
        });
        assert_eq!(found.unwrap(), None);
        assert!(steps.windows(2).all(|pair| pair[1] - pair[0] <= 1 << 20), "{steps:?}");
        assert_eq!(steps.last(), Some(&(4 << 20)));
        let mut calls = 0;
        let stopped = compare(a, b, CompareOptions::default(), &mut |_| {
            calls += 1;
            if calls == 3 { Visit::Break(()) } else { Visit::Continue(()) }
        });
        assert_eq!((stopped.unwrap(), calls), (None, 3));
    }
}
