//! A file that was opened for reading becomes one that is written, and back, while it is open.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use blockmirror_block::{ErrorKind, Storage};
use blockmirror_file::{FileOptions, FileStorage};
use blockmirror_image_lock::Permissions;

fn image() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [7; 4096]).unwrap();
    (dir, path)
}

fn byte(file: &FileStorage) -> u8 {
    let mut byte = [0];
    file.read_at(&mut byte, 0).unwrap();
    byte[0]
}

#[test]
fn a_reader_becomes_a_writer_and_a_reader_again() {
    let (_dir, path) = image();
    let file = FileOptions::new().open(&path).unwrap();
    for round in 0..3 {
        assert_eq!(file.write_at(&[1], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(file.lock().unwrap().permissions(), Permissions::READ);
        file.set_writable(true).unwrap();
        assert!(file.info().writable);
        assert_eq!(file.lock().unwrap().permissions(), Permissions::READ_WRITE);
        file.write_at(&[round], 0).unwrap();
        file.write_at(&[9], 5000).unwrap();
        assert_eq!((byte(&file), file.len().unwrap()), (round, 5001));
        file.set_writable(false).unwrap();
        assert!(!file.info().writable);
        file.flush().unwrap();
    }
}

#[test]
fn one_that_was_opened_for_writing_becomes_a_reader() {
    let (_dir, path) = image();
    let file = FileOptions::new().writable(true).open(&path).unwrap();
    file.set_writable(false).unwrap();
    assert_eq!(file.write_at(&[1], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
    // Two readers get along.
    FileOptions::new().open(&path).unwrap();
    file.set_writable(true).unwrap();
    assert_eq!(FileOptions::new().open(&path).unwrap_err().kind(), ErrorKind::Locked);
}

#[test]
fn somebody_elses_lock_stands_in_the_way() {
    let (_dir, path) = image();
    let file = FileOptions::new().open(&path).unwrap();
    let other = FileOptions::new().open(&path).unwrap();
    assert_eq!(file.set_writable(true).unwrap_err().kind(), ErrorKind::Locked);
    assert!(!file.info().writable);
    assert_eq!(file.lock().unwrap().permissions(), Permissions::READ);
    // What it had it has still: no writer comes in.
    drop(other);
    assert_eq!(FileOptions::new().writable(true).open(&path).unwrap_err().kind(), ErrorKind::Locked);
    file.set_writable(true).unwrap();
}

/// The name may lead elsewhere by now; what is written is the file that is open.
#[test]
fn it_is_the_file_that_is_open_whatever_its_name_leads_to() {
    let (dir, path) = image();
    let file = FileOptions::new().open(&path).unwrap();
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    std::fs::write(&path, [3; 16]).unwrap();
    file.set_writable(true).unwrap();
    file.write_at(&[1], 0).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [3; 16]);
    assert_eq!(std::fs::read(dir.path().join("moved")).unwrap()[0], 1);
}

#[test]
fn a_file_that_was_given_up_is_free_although_somebody_holds_it() {
    let (_dir, path) = image();
    let file = FileOptions::new().writable(true).open(&path).unwrap();
    file.write_at(&[1], 0).unwrap();
    file.close().unwrap();
    assert_eq!(file.write_at(&[2], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
    let other = FileOptions::new().writable(true).open(&path).unwrap();
    // Dropping the one takes nothing from the other.
    drop(file);
    assert_eq!(FileOptions::new().open(&path).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(byte(&other), 1);
}

/// Every way in which a file can be open leads to the same bytes.
#[test]
fn it_goes_past_the_page_cache_and_through_it() {
    let (_dir, path) = image();
    for writable in [true, false] {
        let file = FileOptions::new().writable(writable).open(&path).unwrap();
        match file.set_direct(true) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return,
            result => result.unwrap(),
        }
        assert!(file.info().request_alignment > 1);
        assert_eq!(file.info().writable, writable);
        file.set_writable(true).unwrap();
        for round in 0..4 {
            file.write_at(&[round; 700], 100).unwrap();
            file.set_direct(round % 2 == 0).unwrap();
            let mut read = [9; 700];
            file.read_at(&mut read, 100).unwrap();
            assert_eq!(read, [round; 700]);
        }
        assert_eq!(file.info().request_alignment, 1);
        file.flush().unwrap();
    }
}
