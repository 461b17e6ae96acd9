//! Random operations on a file against a plain vector of bytes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;

use blockmirror_block::{ByteRange, Storage, Visit, ZeroFlags};
use blockmirror_file::{FileOptions, LockMode};
use proptest::prelude::*;

const MAX: u64 = 200_000;

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, len: u64, with: u8 },
    Zero { at: u64, len: u64, flags: ZeroFlags },
    Discard { at: u64, len: u64 },
    Allocate { at: u64, len: u64 },
    SetLen(u64),
    Read { at: u64, len: u64 },
}

fn span() -> impl Strategy<Value = (u64, u64)> {
    // Odd and page-aligned requests alike.
    let edge = prop_oneof![0..MAX, (0..MAX / 4096).prop_map(|page| page * 4096)];
    (edge, prop_oneof![0..70_000u64, (0..16u64).prop_map(|pages| pages * 4096)])
}

fn op() -> impl Strategy<Value = Op> {
    let flags = prop_oneof![
        Just(ZeroFlags::NONE),
        Just(ZeroFlags::MAY_UNMAP),
        Just(ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK),
    ];
    prop_oneof![
        4 => (span(), 1..=255u8).prop_map(|((at, len), with)| Op::Write { at, len, with }),
        3 => (span(), flags).prop_map(|((at, len), flags)| Op::Zero { at, len, flags }),
        1 => span().prop_map(|(at, len)| Op::Discard { at, len }),
        1 => span().prop_map(|(at, len)| Op::Allocate { at, len }),
        1 => (0..MAX).prop_map(Op::SetLen),
        2 => span().prop_map(|(at, len)| Op::Read { at, len }),
    ]
}

fn grow(model: &mut Vec<u8>, to: u64) {
    if model.len() < to as usize {
        model.resize(to as usize, 0);
    }
}

fn check(dir: &Path, direct: bool, ops: &[Op]) {
    let path = dir.join("file");
    let file = FileOptions::new().create_new(true).direct(direct).lock(LockMode::Off).open(&path).unwrap();
    let mut model = Vec::new();
    for op in ops {
        match *op {
            Op::Write { at, len, with } => {
                file.write_at(&vec![with; len as usize], at).unwrap();
                if len > 0 {
                    grow(&mut model, at + len);
                    model[at as usize..(at + len) as usize].fill(with);
                }
            }
            Op::Zero { at, len, flags } => {
                file.write_zeroes(ByteRange::at(at, len), flags).unwrap();
                if len > 0 {
                    grow(&mut model, at + len);
                    model[at as usize..(at + len) as usize].fill(0);
                }
            }
            Op::Discard { at, len } => {
                let present = model.len() as u64;
                let range = ByteRange::new(at.min(present), (at + len).min(present));
                file.discard(range).unwrap();
                // Each byte is as before or zero; then the model follows.
                let mut buf = vec![0; range.len() as usize];
                file.read_at(&mut buf, range.start()).unwrap();
                for (new, old) in buf.iter().zip(&mut model[range.start() as usize..range.end() as usize]) {
                    assert!(*new == 0 || new == old);
                    *old = *new;
                }
            }
            Op::Allocate { at, len } => {
                if len > 0 && file.allocate(ByteRange::at(at, len)).is_ok() {
                    grow(&mut model, at + len);
                }
            }
            Op::SetLen(len) => {
                file.set_len(len).unwrap();
                model.resize(len as usize, 0);
            }
            Op::Read { at, len } => {
                let mut buf = vec![0xee; len as usize];
                file.read_at(&mut buf, at).unwrap();
                let mut expected = model.clone();
                grow(&mut expected, at + len);
                assert!(buf == expected[at as usize..(at + len) as usize]);
            }
        }
        assert_eq!(file.len().unwrap(), model.len() as u64, "after {op:?}");
    }
    assert!(std::fs::read(&path).unwrap() == model, "contents differ");
    let mut at = 0;
    let mut last = None;
    file.extents(ByteRange::new(0, u64::MAX), &mut |run| {
        assert_eq!(run.range.start(), at, "no gap");
        assert!(!run.range.is_empty());
        assert_ne!(last.replace(run.hole), Some(run.hole), "runs are maximal");
        at = run.range.end();
        if run.hole {
            assert!(model[run.range.start() as usize..at as usize].iter().all(|b| *b == 0));
        }
        Visit::Continue(())
    })
    .unwrap();
    assert_eq!(at, model.len() as u64);
}

fn directory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap()
}

fn does_direct_io(dir: &Path) -> bool {
    match FileOptions::new().create_new(true).direct(true).open(dir.join("probe")) {
        Ok(_) => true,
        Err(e) => {
            assert_eq!(e.kind(), blockmirror_block::ErrorKind::Unsupported, "{e}");
            false
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_is_a_vector_of_bytes(ops in prop::collection::vec(op(), 1..30)) {
        check(directory().path(), false, &ops);
    }

    #[test]
    fn without_the_page_cache_as_well(ops in prop::collection::vec(op(), 1..30)) {
        let dir = tempfile::tempdir().unwrap();
        if !does_direct_io(dir.path()) {
            blockmirror_testing::skip_unsupported(format_args!("the temporary directory does not do direct I/O"));
            return Ok(());
        }
        check(dir.path(), true, &ops);
    }

    #[test]
    fn on_the_disk_as_well(ops in prop::collection::vec(op(), 1..30)) {
        check(tempfile::tempdir().unwrap().path(), false, &ops);
    }
}
