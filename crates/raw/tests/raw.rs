//! A file as a disk: odd lengths, bounds, holes, and the refusal to become another format.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::PathBuf;
use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{
    BlockDevice, ByteRange, DiscardEffect, ErrorKind, ExtentKind, HostRun, Storage, StorageInfo, Visit,
    WriteFlags, ZeroCost, ZeroFlags,
};
use blockmirror_file::{FileOptions, FileStorage};
use blockmirror_raw::{Part, Raw, RawOptions};
use proptest::prelude::*;

fn new_file(contents: &[u8]) -> (Arc<FileStorage>, PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let file = FileOptions::new().create_new(true).open(&path).unwrap();
    file.write_at(contents, 0).unwrap();
    (Arc::new(file), path, dir)
}

fn disk(contents: &[u8], options: RawOptions) -> (Raw, PathBuf, tempfile::TempDir) {
    let (file, path, dir) = new_file(contents);
    (Raw::open(file, options).unwrap(), path, dir)
}

fn runs(raw: &Raw, range: ByteRange) -> Vec<(u64, u64, ExtentKind)> {
    let mut out = Vec::new();
    raw.extents(range, &mut |e| {
        assert_eq!((e.depth, e.compressed), (0, false));
        assert_eq!(e.host.as_ref().unwrap().offset, e.range.start());
        out.push((e.range.start(), e.range.end(), e.kind));
        Visit::Continue(())
    })
    .unwrap();
    out
}

#[test]
fn a_thousand_bytes_are_a_disk_of_1024() {
    let (raw, path, _dir) = disk(&[7; 1000], RawOptions::new());
    assert_eq!(raw.len(), 1024);
    let mut buf = [0xee; 100];
    raw.read_at(&mut buf, 924).unwrap();
    assert_eq!((&buf[..76], &buf[76..]), (&[7; 76][..], &[0; 24][..]));
    assert_eq!(runs(&raw, ByteRange::new(0, 1024)).last().unwrap().1, 1024, "the whole disk is mapped");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1000, "reading grows nothing");
    raw.write_at(&[9], 1023, WriteFlags::FUA).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    let mut buf = [0xee; 25];
    raw.read_at(&mut buf, 999).unwrap();
    assert_eq!((buf[0], &buf[1..24], buf[24]), (7, &[0; 23][..], 9));
}

#[test]
fn lengths_round_up_to_sectors() {
    for (bytes, len) in [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (65535, 65536)] {
        let (raw, _path, _dir) = disk(&vec![1; bytes], RawOptions::new());
        assert_eq!(raw.len(), len);
        assert_eq!(raw.is_empty(), len == 0);
        assert_eq!(runs(&raw, ByteRange::new(0, len)).last().map_or(0, |run| run.1), len);
    }
}

#[test]
fn requests_past_the_end_touch_nothing() {
    let (raw, path, _dir) = disk(&[7; 1000], RawOptions::new());
    let run = HostRun { storage: Arc::clone(raw.storage()), offset: 0 };
    for error in [
        raw.read_at(&mut [0; 2], 1023).unwrap_err(),
        raw.read_at(&mut [0; 2], u64::MAX).unwrap_err(),
        raw.write_at(&[0; 2], 1023, WriteFlags::NONE).unwrap_err(),
        raw.write_zeroes(ByteRange::new(1000, 1025), ZeroFlags::NONE).unwrap_err(),
        raw.discard(ByteRange::new(0, u64::MAX)).unwrap_err(),
        raw.clone_range(1024, &run, 1).unwrap_err(),
        raw.extents(ByteRange::new(0, 1025), &mut |_| panic!("nothing to visit")).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::OutOfBounds);
        assert_eq!(error.name(), path.to_str());
    }
    raw.read_at(&mut [], 1024).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [7; 1000]);
}

#[test]
fn holes_are_zeros_and_located() {
    let (file, _path, _dir) = new_file(b"");
    file.write_at(&[1; 65536], 131_072).unwrap();
    file.set_len(300_000).unwrap();
    let raw = Raw::open(file, RawOptions::new()).unwrap();
    use ExtentKind::{Data, Zero};
    assert_eq!(
        runs(&raw, ByteRange::new(0, raw.len())),
        [(0, 131_072, Zero), (131_072, 196_608, Data), (196_608, 300_032, Zero)],
        "the hole and the bytes past the end of the file are one run"
    );
    assert_eq!(runs(&raw, ByteRange::new(300_001, 300_003)), [(300_001, 300_003, Zero)]);
    let mut visited = 0;
    raw.extents(ByteRange::new(0, raw.len()), &mut |_| {
        visited += 1;
        Visit::Break(())
    })
    .unwrap();
    assert_eq!(visited, 1, "the visitor is obeyed");
}

#[test]
fn geometry_says_what_the_file_can_do() {
    let (file, path, _dir) = new_file(&[1; 512]);
    let info = file.info();
    let raw = Raw::open(file, RawOptions::new()).unwrap();
    let geometry = raw.geometry();
    assert_eq!((geometry.cluster_size, geometry.subcluster_size), (None, None));
    assert!(geometry.writable);
    assert_eq!(geometry.zero_cost == ZeroCost::Metadata, info.cheap_zero);
    assert_eq!(geometry.discard == DiscardEffect::Frees, info.discards);
    drop(raw);
    let raw = Raw::open(Arc::new(FileOptions::new().open(&path).unwrap()), RawOptions::new()).unwrap();
    assert!(!raw.geometry().writable);
    assert_eq!(raw.write_at(b"x", 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_probed_image_refuses_to_become_another_format() {
    let (raw, path, _dir) = disk(&[0; 4096], RawOptions::new().probed(true));
    let refused = raw.write_at(b"QFI\xfb\0\0\0\x03", 0, WriteFlags::NONE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    assert_eq!(
        refused.to_string(),
        format!(
            "write: {} at 0: the format was guessed to be raw, and this would make the image look like \
             qcow2; give the format explicitly to allow it",
            path.display()
        )
    );
    // Nor in two halves, nor from another file.
    raw.write_at(b"QF", 0, WriteFlags::NONE).unwrap();
    assert!(raw.write_at(b"I\xfb", 2, WriteFlags::NONE).is_err());
    let (evil, _path, _dir) = new_file(b"QFI\xfb");
    let run = HostRun { storage: evil, offset: 0 };
    assert_eq!(raw.clone_range(0, &run, 4).unwrap_err().kind(), ErrorKind::Unsupported);
    // Zeros complete a magic as well as any other byte.
    raw.write_at(b"QEDx", 0, WriteFlags::NONE).unwrap();
    assert!(raw.write_zeroes(ByteRange::new(3, 4), ZeroFlags::NONE).is_err());
    assert!(raw.discard(ByteRange::new(3, 4)).is_err());
    // Everything else is allowed, the same bytes elsewhere included.
    raw.write_at(&[0x55; 512], 0, WriteFlags::NONE).unwrap();
    raw.write_at(b"QFI\xfb", 512, WriteFlags::NONE).unwrap();
    raw.write_zeroes(ByteRange::new(0, 512), ZeroFlags::NONE).unwrap();
    assert_eq!(&std::fs::read(&path).unwrap()[..4], [0; 4]);
}

#[test]
fn an_image_that_was_said_to_be_raw_takes_any_bytes() {
    let (raw, path, _dir) = disk(&[0; 1024], RawOptions::new());
    raw.write_at(b"QFI\xfb", 0, WriteFlags::NONE).unwrap();
    assert_eq!(&std::fs::read(&path).unwrap()[..4], b"QFI\xfb");
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0..70_000u64;
    let len = 0..40_000u64;
    prop_oneof![
        (at.clone(), len.clone(), 1..255u8).prop_map(|(a, l, b)| Op::Write(a, l, b)),
        (at.clone(), len.clone(), any::<bool>()).prop_map(|(a, l, u)| Op::Zero(a, l, u)),
        (at, len).prop_map(|(a, l)| Op::Discard(a, l)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_is_a_vector_of_fixed_length(
        len in 0..70_000usize,
        probed: bool,
        ops in prop::collection::vec(op(), 1..20),
    ) {
        let (raw, _path, _dir) = disk(&vec![3; len], RawOptions::new().probed(probed));
        let mut model = vec![3; len];
        model.resize(raw.len() as usize, 0);
        for op in ops {
            let (at, len) = match op {
                Op::Write(at, len, _) | Op::Zero(at, len, _) | Op::Discard(at, len) => (at, len),
            };
            let inside = at + len <= raw.len();
            let range = ByteRange::at(at, len);
            let result = match op {
                Op::Write(_, _, with) => raw.write_at(&vec![with; len as usize], at, WriteFlags::NONE),
                Op::Zero(_, _, unmap) => {
                    raw.write_zeroes(range, if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE })
                }
                Op::Discard(..) => raw.discard(range),
            };
            prop_assert_eq!(result.is_ok(), inside);
            if !inside {
                continue;
            }
            let part = &mut model[at as usize..(at + len) as usize];
            match op {
                Op::Write(_, _, with) => part.fill(with),
                Op::Zero(..) => part.fill(0),
                Op::Discard(..) => {
                    let mut now = vec![0; len as usize];
                    raw.read_at(&mut now, at).unwrap();
                    for (new, old) in now.iter().zip(part) {
                        prop_assert!(*new == 0 || new == old);
                        *old = *new;
                    }
                }
            }
        }
        let mut all = vec![0xee; model.len()];
        raw.read_at(&mut all, 0).unwrap();
        prop_assert!(all == model);
        let mut at = 0;
        raw.extents(ByteRange::new(0, raw.len()), &mut |e| {
            assert_eq!(e.range.start(), at);
            at = e.range.end();
            if e.reads_as_zero() {
                assert!(model[e.range.start() as usize..at as usize].iter().all(|b| *b == 0));
            }
            Visit::Continue(())
        })
        .unwrap();
        prop_assert_eq!(at, raw.len());
    }
}

#[test]
fn a_disk_grows_with_zeros_and_shrinks_with_permission() {
    let storage = Arc::new(MemoryStorage::new());
    storage.write_at(&[1; 1000], 0).unwrap();
    let disk = Raw::open(storage.clone(), RawOptions::new()).unwrap();
    disk.resize(4096, false).unwrap();
    assert_eq!((disk.len(), storage.len().unwrap()), (4096, 4096));
    let mut all = vec![7; 4096];
    disk.read_at(&mut all, 0).unwrap();
    assert!(all[..1000] == [1; 1000] && all[1000..] == [0; 3096]);
    assert_eq!(disk.resize(512, false).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(disk.resize(1000, true).unwrap_err().kind(), ErrorKind::InvalidInput);
    disk.resize(512, true).unwrap();
    assert_eq!((disk.len(), storage.to_vec().len()), (512, 512));
    assert!(disk.write_at(&[1], 512, WriteFlags::NONE).is_err());
}

#[test]
fn a_device_keeps_its_length() {
    let mut info = StorageInfo::plain();
    info.fixed_len = true;
    let plain = MemoryStorage::new();
    plain.write_at(&[0; 1024], 0).unwrap();
    let disk = Raw::open(Arc::new(plain.with_info(info)), RawOptions::new()).unwrap();
    assert_eq!(disk.resize(2048, false).unwrap_err().kind(), ErrorKind::Unsupported);
    disk.resize(1024, false).unwrap();
    assert_eq!(disk.len(), 1024);
}

/// What a file has lost since it was opened read as zeros, so that a copy of it ended well.
#[test]
fn a_file_that_becomes_shorter_cannot_be_read_past_its_end() {
    let (file, _path, _dir) = new_file(&[7; 300_000]);
    let raw = Raw::open(file.clone(), RawOptions::new()).unwrap();
    file.set_len(100_100).unwrap();
    let mut buf = [0xee; 1000];
    raw.read_at(&mut buf, 99_352).unwrap();
    assert_eq!((buf[747], buf[748], buf[999]), (7, 0, 0), "the last sector of the file is padded");
    for (at, len) in [(99_353, 1000), (100_352, 1), (0, 300_000), (299_999, 1)] {
        let error = raw.read_at(&mut vec![0; len], at).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CutShort, "{len} bytes at {at}");
        assert!(error.to_string().contains("the file ends at 100100"), "{error}");
    }
    let found = runs(&raw, ByteRange::new(0, raw.len()));
    assert_eq!(found.last().unwrap(), &(100_352, 300_032, ExtentKind::Data), "{found:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// What is outside of the part stays, whatever is done to the disk.
    #[test]
    fn a_part_is_a_disk_and_the_rest_stays(
        before in 0..9_000usize,
        len in 0..70_000usize,
        size in prop::option::of(0..140_u64),
        ops in prop::collection::vec(op(), 1..20),
    ) {
        let (file, path, _dir) = new_file(&vec![3; before + len]);
        let there = ((before + len) as u64).next_multiple_of(512) - before as u64;
        let size = size.map(|sectors| (sectors * 512).min(there & !511));
        let part = Part::new(before as u64, size);
        let raw = Raw::open(part.of(file).unwrap(), RawOptions::new()).unwrap();
        prop_assert_eq!(raw.len(), size.unwrap_or(there.next_multiple_of(512)));
        let mut model = vec![3; len];
        model.resize(raw.len() as usize, 0);
        let after = std::fs::read(&path).unwrap().split_off((before + model.len()).min(before + len));
        for op in ops {
            let (at, len) = match op {
                Op::Write(at, len, _) | Op::Zero(at, len, _) | Op::Discard(at, len) => (at, len),
            };
            let range = ByteRange::at(at, len);
            let result = match op {
                Op::Write(_, _, with) => raw.write_at(&vec![with; len as usize], at, WriteFlags::NONE),
                Op::Zero(_, _, unmap) => {
                    raw.write_zeroes(range, if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE })
                }
                Op::Discard(..) => raw.discard(range),
            };
            prop_assert_eq!(result.is_ok(), at + len <= raw.len());
            if result.is_ok() {
                let changed = &mut model[at as usize..(at + len) as usize];
                match op {
                    Op::Write(_, _, with) => changed.fill(with),
                    Op::Zero(..) => changed.fill(0),
                    Op::Discard(..) => raw.read_at(changed, at).unwrap(),
                }
            }
        }
        let mut all = vec![0xee; model.len()];
        raw.read_at(&mut all, 0).unwrap();
        prop_assert!(all == model);
        let bytes = std::fs::read(&path).unwrap();
        prop_assert!(bytes[..before] == vec![3; before]);
        if !after.is_empty() {
            prop_assert!(bytes[before + model.len()..] == after);
        }
        let mut at = 0;
        raw.extents(ByteRange::new(0, raw.len()), &mut |e| {
            assert_eq!(e.range.start(), at);
            at = e.range.end();
            let place = e.host.clone().unwrap().in_file();
            assert_eq!(place.offset, before as u64 + e.range.start());
            Visit::Continue(())
        })
        .unwrap();
        prop_assert_eq!(at, raw.len());
    }
}

#[test]
fn a_part_lies_inside_and_keeps_its_length() {
    let (file, path, _dir) = new_file(&[7; 10_000]);
    let part = |offset, size| Part::new(offset, size).of(Arc::clone(&file) as _);
    for (offset, size, len) in [
        (0, Some(0), 0),
        (1, None, 10_239),
        (9_999, None, 241),
        (10_240, None, 0),
        (10_240, Some(0), 0),
        (9_728, Some(512), 512),
        (512, Some(9_728), 9_728),
    ] {
        assert_eq!(part(offset, size).unwrap().len().unwrap(), len, "{offset}, {size:?}");
    }
    for (offset, size) in [
        (10_241, None),
        (u64::MAX, None),
        (u64::MAX, Some(512)),
        (0, Some(10_752)),
        (0, Some(u64::MAX)),
        (0, Some(u64::MAX - 511)),
        (513, Some(u64::MAX - 511)),
        (0, Some(1000)),
    ] {
        assert_eq!(part(offset, size).unwrap_err().kind(), ErrorKind::InvalidInput, "{offset}, {size:?}");
    }
    let fixed = Raw::open(part(1000, Some(1024)).unwrap(), RawOptions::new()).unwrap();
    assert_eq!(fixed.resize(2048, false).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(fixed.resize(512, true).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 10_000);
    let open = Raw::open(part(1000, None).unwrap(), RawOptions::new()).unwrap();
    open.resize(20_480, false).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 21_480);
    open.resize(512, true).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1_512);
    // The file has become shorter than the part.
    file.set_len(100).unwrap();
    let mut buf = [1; 512];
    assert_eq!(fixed.read_at(&mut buf, 0).unwrap_err().kind(), ErrorKind::CutShort);
    assert_eq!(part(0, None).unwrap().info().request_alignment, file.info().request_alignment);
}
