//! Our users against each other: who keeps whom out, and what is left afterwards. Two open file descriptions
//! of one process are two users, as are two processes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use blockmirror_block::{Error, ErrorKind};
use blockmirror_image_lock::{ImageLock, LockError, Permission, Permissions};
use proptest::prelude::*;

struct Image {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, "data").unwrap();
        Self { path, _dir: dir }
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }

    fn user(&self, wanted: Permissions, unshared: Permissions) -> Result<(File, ImageLock), LockError> {
        let file = self.open();
        let lock = ImageLock::acquire(&file, &self.path, wanted, unshared)?;
        Ok((file, lock))
    }

    fn writer(&self) -> Result<(File, ImageLock), LockError> {
        self.user(Permissions::READ_WRITE, Permissions::CHANGE)
    }

    fn reader(&self) -> Result<(File, ImageLock), LockError> {
        self.user(Permissions::READ, Permissions::CHANGE)
    }
}

/// The lock bytes that the kernel lists for an open file.
fn bytes_held(file: &File) -> Vec<u64> {
    use std::os::fd::AsRawFd;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
    let mut bytes: Vec<_> = info
        .lines()
        .filter(|line| line.contains("OFDLCK"))
        .flat_map(|line| {
            let mut numbers = line.split_whitespace().rev().map(|n| n.parse::<u64>().unwrap());
            let end = numbers.next().unwrap();
            numbers.next().unwrap()..=end
        })
        .collect();
    bytes.sort_unstable();
    bytes
}

#[test]
fn the_bytes_are_those_of_qemu() {
    let image = Image::new();
    let (file, lock) = image.writer().unwrap();
    assert!(lock.is_enforced());
    assert_eq!(bytes_held(&file), [100, 101, 103, 201, 203]);
    drop(file);
    let (file, _) = image.reader().unwrap();
    assert_eq!(bytes_held(&file), [100, 201, 203]);
    drop(file);
    let (file, _) = image.user(Permissions::READ, Permissions::NONE).unwrap();
    assert_eq!(bytes_held(&file), [100]);
}

#[test]
fn a_writer_is_alone_and_readers_are_many() {
    let image = Image::new();
    let writer = image.writer().unwrap();
    assert!(matches!(image.writer(), Err(LockError::NotShared { permission: Permission::Write, .. })));
    assert!(matches!(image.reader(), Err(LockError::Held { permission: Permission::Write, .. })));
    image.user(Permissions::READ, Permissions::NONE).unwrap();
    drop(writer);
    let _readers = [image.reader().unwrap(), image.reader().unwrap()];
    assert!(matches!(image.writer(), Err(LockError::NotShared { permission: Permission::Write, .. })));
}

#[test]
fn a_refused_user_leaves_no_lock_behind() {
    let image = Image::new();
    let writer = image.writer().unwrap();
    let file = image.open();
    ImageLock::acquire(&file, &image.path, Permissions::READ, Permissions::CHANGE).unwrap_err();
    assert_eq!(bytes_held(&file), []);
    drop(writer);
    ImageLock::acquire(&file, &image.path, Permissions::READ_WRITE, Permissions::CHANGE).unwrap();
}

#[test]
fn the_error_names_the_holder_and_becomes_a_disk_error() {
    let image = Image::new();
    let _writer = image.writer().unwrap();
    let error = image.writer().unwrap_err();
    assert_eq!(error.holder().unwrap().pid, std::process::id());
    let path = image.path.display();
    assert_eq!(
        error.to_string(),
        format!("lock: {path}: locked by this process itself, which excludes writers")
    );
    let error = Error::from(error);
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert_eq!(
        error.to_string(),
        format!("lock: {path}: locked by this process itself, which excludes writers")
    );
}

#[test]
fn a_read_only_descriptor_can_lock_for_a_writer() {
    // Replacing a file locks the old one as a writer would, without being able to write it.
    let image = Image::new();
    let file = File::open(&image.path).unwrap();
    ImageLock::acquire(&file, &image.path, Permissions::READ_WRITE, Permissions::CHANGE).unwrap();
    assert!(image.reader().is_err());
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop::sample::subsequence(Permission::ALL.to_vec(), 0..=4).prop_map(|p| p.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sequence of users is admitted exactly when no present user forbids what they do, or does what they
    /// forbid.
    #[test]
    fn users_are_admitted_by_what_they_do(
        users in prop::collection::vec((permissions(), permissions(), any::<bool>()), 1..12),
    ) {
        let image = Image::new();
        let mut inside: Vec<(Permissions, Permissions, File)> = Vec::new();
        for (wanted, unshared, leave_first) in users {
            if leave_first && !inside.is_empty() {
                inside.remove(0);
            }
            let clash = |a: Permissions, b: Permissions| a.iter().any(|p| b.contains(p));
            let refused = inside.iter().any(|(w, u, _)| clash(wanted, *u) || clash(unshared, *w));
            match image.user(wanted, unshared) {
                Ok((file, lock)) => {
                    prop_assert!(!refused);
                    prop_assert_eq!((lock.permissions(), lock.unshared()), (wanted, unshared));
                    inside.push((wanted, unshared, file));
                }
                Err(e) => prop_assert!(refused, "{}", e),
            }
        }
    }
}

/// A program that copies images on several threads and starts `qemu-img` on each copy found, now and then, a
/// copy in use that was free: another thread was just starting a child, and between fork and exec the child
/// had a copy of the descriptor that the copy's lock hung on. Such a copy of a descriptor is made here
/// without a fork.
#[test]
fn a_lock_that_was_given_back_does_not_live_on_in_a_copy_of_the_descriptor() {
    let image = Image::new();
    let (file, lock) = image.writer().unwrap();
    let copy = file.try_clone().unwrap();
    lock.release(&file);
    drop(file);
    assert!(bytes_held(&copy).is_empty());
    image.writer().unwrap();
}
