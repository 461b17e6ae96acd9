//! Files that get their name when they are whole.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use blockmirror_block::{ErrorKind, Storage};
use blockmirror_file::{Existing, FileOptions, LockMode, NewFile};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn it_has_its_name_only_when_persisted() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    let new = NewFile::create(&target, Existing::Refuse, &FileOptions::new()).unwrap();
    new.storage().write_at(b"data", 0).unwrap();
    assert!(!target.exists());
    let partial = names(dir.path());
    assert!(partial[0].starts_with(".disk.raw.") && partial[0].ends_with(".partial"), "{partial:?}");
    assert_eq!(new.partial_path().file_name().unwrap().to_str().unwrap(), partial[0]);
    assert_eq!(new.storage().name(), target.to_str().unwrap());
    let storage = new.storage().clone();
    new.persist().unwrap();
    assert_eq!(names(dir.path()), ["disk.raw"]);
    assert_eq!(fs::read(&target).unwrap(), b"data");
    storage.write_at(b"more", 4).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"datamore");
}

#[test]
fn dropped_it_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    let new = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap();
    new.storage().write_at(b"new", 0).unwrap();
    drop(new);
    assert_eq!(names(dir.path()), ["disk.raw"]);
    assert_eq!(fs::read(&target).unwrap(), b"old");
}

#[test]
fn an_existing_file_is_refused_or_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old and long").unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
    let refused = NewFile::create(&target, Existing::Refuse, &FileOptions::new()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists);

    let link = dir.path().join("link");
    std::os::unix::fs::symlink("disk.raw", &link).unwrap();
    let new = NewFile::create(&link, Existing::Replace, &FileOptions::new()).unwrap();
    new.storage().write_at(b"new", 0).unwrap();
    new.persist().unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "the link is followed, not replaced");
    assert_eq!(names(dir.path()), ["disk.raw", "link"]);
}

#[test]
fn a_file_that_appears_meanwhile_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    let new = NewFile::create(&target, Existing::Refuse, &FileOptions::new()).unwrap();
    fs::write(&target, "somebody else's").unwrap();
    assert_eq!(new.persist().unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&target).unwrap(), b"somebody else's");
    assert_eq!(names(dir.path()), ["disk.raw"]);
}

#[test]
fn a_file_in_use_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("disk.raw");
    fs::write(&target, "old").unwrap();
    let reader = FileOptions::new().open(&target).unwrap();
    let error = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    drop(reader);
    let new = NewFile::create(&target, Existing::Replace, &FileOptions::new()).unwrap();
    // And it is in use by us until it is replaced.
    assert_eq!(FileOptions::new().open(&target).unwrap_err().kind(), ErrorKind::Locked);
    assert!(FileOptions::new().lock(LockMode::Shared).open(&target).is_ok());
    drop(new);
    assert!(FileOptions::new().open(&target).is_ok());
}

/// Renaming over a file takes no leave to write it: one that was protected against writing was once replaced. Root
/// may write any file but a program that runs, as this one does.
#[test]
fn a_file_that_may_not_be_written_is_not_replaced() {
    let program = std::env::current_exe().unwrap();
    let error = NewFile::create(&program, Existing::Replace, &FileOptions::new()).unwrap_err();
    assert_eq!(error.name(), program.to_str());
}

#[test]
fn names_of_any_length_and_kind_work_or_fail_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("n".repeat(255));
    NewFile::create(&long, Existing::Refuse, &FileOptions::new()).unwrap().persist().unwrap();
    assert!(long.exists());
    let nowhere = dir.path().join("missing").join("disk");
    let error = NewFile::create(&nowhere, Existing::Refuse, &FileOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.name(), nowhere.to_str());
    for bad in [dir.path().join(".."), dir.path().to_owned(), "/dev/null".into()] {
        let error = NewFile::create(&bad, Existing::Replace, &FileOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(names(dir.path()).len(), 1);
}
