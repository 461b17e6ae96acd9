//! What several tests of this crate share.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "each test program uses its part of this")]

use std::process::Command;
use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, Storage};
use blockmirror_testing::qemu::have;

/// A backing disk whose bytes tell where they are, and are never zero.
pub(crate) fn backing_disk(len: u64) -> Arc<dyn BlockDevice> {
    let bytes: Vec<u8> = (0..len).map(|at| (at / 512) as u8 | 0x80).collect();
    Arc::new(MemoryDisk::with_contents(&bytes))
}

/// The big-endian word at `at`.
pub(crate) fn word(storage: &MemoryStorage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Asks `qemu-img check` about an image; leaks are allowed. Says so where it is not installed.
pub(crate) fn qemu_check_finds_no_corruption(image: &[u8], what: &str) {
    qemu_check(image, &[0, 3], what);
}

/// The same, without leaks.
pub(crate) fn qemu_check_finds_nothing(image: &[u8], what: &str) {
    qemu_check(image, &[0], what);
}

fn qemu_check(image: &[u8], allowed: &[i32], what: &str) {
    if !have(what, &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, image).unwrap();
    let out = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&path).output().unwrap();
    let code = out.status.code();
    assert!(code.is_some_and(|code| allowed.contains(&code)), "{what}: qemu-img check: {out:?}");
}
