//! Host files as storage: lengths, holes, zeroing and errors, on tmpfs and on the disk below the
//! temporary directory.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;

use blockmirror_block::{ByteRange, ErrorKind, Storage, Visit, ZeroFlags};
use blockmirror_file::{FileOptions, FileStorage, LockMode};

const K: u64 = 1024;

/// Runs `test` in a fresh directory on tmpfs, where there is one, and in the usual temporary one.
fn everywhere(test: impl Fn(&Path)) {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        test(tempfile::tempdir_in(shm).unwrap().path());
    } else {
        blockmirror_testing::skip_unsupported(format_args!("on tmpfs: no /dev/shm"));
    }
    test(tempfile::tempdir().unwrap().path());
}

fn create(path: impl AsRef<Path>) -> FileStorage {
    FileOptions::new().create_new(true).open(path).unwrap()
}

fn runs(file: &FileStorage, range: ByteRange) -> Vec<(u64, u64, bool)> {
    let mut out = Vec::new();
    file.extents(range, &mut |run| {
        out.push((run.range.start(), run.range.end(), run.hole));
        Visit::Continue(())
    })
    .unwrap();
    out
}

fn bytes(file: &FileStorage, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    file.read_at(&mut buf, offset).unwrap();
    buf
}

#[test]
fn reads_past_the_end_are_zeros_and_writes_grow() {
    everywhere(|dir| {
        let file = create(dir.join("a"));
        assert_eq!(bytes(&file, 0, 7), [0; 7]);
        assert_eq!(bytes(&file, u64::MAX - 3, 16), [0; 16]);
        file.write_at(b"abc", 1000).unwrap();
        assert_eq!(file.len().unwrap(), 1003);
        assert_eq!(bytes(&file, 999, 6), *b"\0abc\0\0");
        file.write_at(b"", 5000).unwrap();
        assert_eq!(file.len().unwrap(), 1003, "an empty write grows nothing");
        file.flush().unwrap();
    });
}

#[test]
fn an_empty_request_past_the_end_is_not_remembered_as_length() {
    // It once raised the length that writes are compared with, and the next growing call believed that there
    // was nothing to grow.
    everywhere(|dir| {
        let file = create(dir.join("a"));
        file.write_at(b"", 5000).unwrap();
        file.allocate(ByteRange::at(6000, 0)).unwrap();
        file.write_zeroes(ByteRange::new(0, 100), ZeroFlags::NONE).unwrap();
        assert_eq!(file.len().unwrap(), 100);
    });
}

#[test]
fn holes_are_found_and_clipped_to_the_question() {
    everywhere(|dir| {
        let file = create(dir.join("a"));
        file.set_len(1024 * K).unwrap();
        assert_eq!(runs(&file, ByteRange::new(0, u64::MAX)), [(0, 1024 * K, true)]);
        file.write_at(&[1; 64 * 1024], 256 * K).unwrap();
        file.write_at(&[2; 64 * 1024], 320 * K).unwrap();
        let all = [(0, 256 * K, true), (256 * K, 384 * K, false), (384 * K, 1024 * K, true)];
        assert_eq!(runs(&file, ByteRange::new(0, 2048 * K)), all);
        assert_eq!(
            runs(&file, ByteRange::new(300 * K + 1, 400 * K)),
            [(300 * K + 1, 384 * K, false), (384 * K, 400 * K, true)]
        );
        assert_eq!(runs(&file, ByteRange::new(1024 * K, 2048 * K)), []);
        let mut seen = 0;
        file.extents(ByteRange::new(0, 1024 * K), &mut |_| {
            seen += 1;
            Visit::Break(())
        })
        .unwrap();
        assert_eq!(seen, 1, "the visitor is obeyed");
    });
}

#[test]
fn a_visitor_may_use_the_file() {
    everywhere(|dir| {
        let file = create(dir.join("a"));
        file.write_at(&[1; 4096], 64 * K).unwrap();
        file.extents(ByteRange::new(0, 1024 * K), &mut |run| {
            // Grows, shrinks and punches what is being visited.
            file.write_at(b"x", run.range.end() + 100 * K).unwrap();
            file.set_len(run.range.start() + 1).unwrap();
            Visit::Continue(())
        })
        .unwrap();
        assert!(file.len().unwrap() > 0);
    });
}

#[test]
fn zeroing_frees_keeps_or_grows() {
    everywhere(|dir| {
        let file = create(dir.join("a"));
        file.write_at(&[7; 512 * 1024], 0).unwrap();
        file.flush().unwrap();
        let full = file.allocated_bytes().unwrap().unwrap();
        assert!(full >= 512 * K);

        file.write_zeroes(ByteRange::new(100, 128 * K + 5), ZeroFlags::NONE).unwrap();
        assert_eq!(bytes(&file, 99, 3), [7, 0, 0]);
        assert_eq!(bytes(&file, 128 * K + 4, 2), [0, 7]);
        assert!(file.allocated_bytes().unwrap().unwrap() >= full, "space is kept");

        assert!(file.info().cheap_zero && file.info().discards);
        file.write_zeroes(ByteRange::new(0, 256 * K), ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK).unwrap();
        assert_eq!(bytes(&file, 0, 16), [0; 16]);
        assert_eq!(file.allocated_bytes().unwrap().unwrap(), full - 256 * K, "space is given back");
        assert_eq!(file.len().unwrap(), 512 * K);

        // The part past the end costs nothing, whatever the flags.
        let before = file.allocated_bytes().unwrap();
        file.write_zeroes(ByteRange::new(512 * K, 8192 * K + 3), ZeroFlags::FUA).unwrap();
        assert_eq!(file.len().unwrap(), 8192 * K + 3);
        assert_eq!(file.allocated_bytes().unwrap(), before);

        file.discard(ByteRange::new(256 * K, u64::MAX)).unwrap();
        assert_eq!(file.len().unwrap(), 8192 * K + 3, "a discard does not change the length");
        assert_eq!(runs(&file, ByteRange::new(0, 8192 * K + 3)), [(0, 8192 * K + 3, true)]);
        file.write_zeroes(ByteRange::new(5, 5), ZeroFlags::NO_FALLBACK).unwrap();
    });
}

#[test]
fn allocation_reserves_and_changes_nothing_else() {
    everywhere(|dir| {
        let file = create(dir.join("a"));
        file.write_at(b"data", 0).unwrap();
        file.allocate(ByteRange::new(0, 256 * K)).unwrap();
        assert_eq!(file.len().unwrap(), 256 * K);
        assert!(file.allocated_bytes().unwrap().unwrap() >= 256 * K);
        assert_eq!(bytes(&file, 0, 5), *b"data\0");
    });
}

#[test]
fn appending_writers_and_a_zeroer_lose_nothing() {
    // "Look at the length, then set it" once cut off what another thread had appended in between: growing
    // must wait for appending writes.
    everywhere(|dir| {
        let file = create(dir.join("a"));
        std::thread::scope(|s| {
            let file = &file;
            s.spawn(move || {
                for i in 0..2000u64 {
                    file.write_at(&[1; 16], i * 64).unwrap();
                }
            });
            s.spawn(move || {
                for i in 0..2000u64 {
                    file.write_zeroes(ByteRange::at(i * 64 + 16, 16), ZeroFlags::MAY_UNMAP).unwrap();
                }
            });
        });
        for i in 0..2000 {
            assert_eq!(bytes(&file, i * 64, 16), [1; 16], "write {i}");
        }
    });
}

#[test]
fn offsets_past_the_signed_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = create(dir.path().join("a"));
    for error in [
        file.write_at(b"x", u64::MAX).unwrap_err(),
        file.write_at(b"xx", i64::MAX as u64 - 1).unwrap_err(),
        file.write_zeroes(ByteRange::new(0, u64::MAX), ZeroFlags::NONE).unwrap_err(),
        file.set_len(1 << 63).unwrap_err(),
        file.allocate(ByteRange::new(1, u64::MAX)).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{error}");
    }
    assert_eq!(file.len().unwrap(), 0);
}

#[test]
fn a_read_only_file_refuses_every_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    create(&path).write_at(b"data", 0).unwrap();
    let file = FileOptions::new().open(&path).unwrap();
    assert!(!file.info().writable);
    for error in [
        file.write_at(b"x", 0).unwrap_err(),
        file.write_zeroes(ByteRange::new(0, 1), ZeroFlags::NONE).unwrap_err(),
        file.discard(ByteRange::new(0, 1)).unwrap_err(),
        file.allocate(ByteRange::new(0, 1)).unwrap_err(),
        file.set_len(0).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
        assert_eq!(error.name(), path.to_str());
    }
    assert_eq!(bytes(&file, 0, 4), *b"data");
    file.flush().unwrap();
}

#[test]
fn what_cannot_hold_an_image_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for (path, what) in
        [(dir.path().to_owned(), "a directory"), (fifo, "a FIFO"), ("/dev/null".into(), "a character device")]
    {
        let error = FileOptions::new().open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(
            error.to_string(),
            format!(
                "open: {}: it is {what}; only regular files and block devices hold images",
                path.display()
            )
        );
    }
}

#[test]
fn open_errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no-such-file");
    let error = FileOptions::new().open(&missing).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.to_string(),
        format!("open: {}: No such file or directory (os error 2)", missing.display())
    );
    create(dir.path().join("there"));
    let error = FileOptions::new().create_new(true).open(dir.path().join("there")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
}

#[test]
fn one_file_has_one_identity() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let first = create(&a);
    std::fs::hard_link(&a, &b).unwrap();
    let options = FileOptions::new().lock(LockMode::Off);
    assert_eq!(options.open(&b).unwrap().id(), first.id());
    assert_ne!(create(dir.path().join("c")).id(), first.id());
}

#[test]
fn a_file_that_cannot_be_reached_in_full_is_an_error_not_a_panic() {
    // The filesystem's own limit lies far below 2^63: the kernel says so, and the error says where.
    let dir = tempfile::tempdir().unwrap();
    let file = create(dir.path().join("a"));
    if let Err(e) = file.write_at(b"x", i64::MAX as u64 - 1) {
        assert_eq!(e.offset(), Some(i64::MAX as u64 - 1));
        assert!(e.name().is_some());
    }
    assert!(file.len().unwrap() == 0 || file.len().unwrap() == i64::MAX as u64);
}
