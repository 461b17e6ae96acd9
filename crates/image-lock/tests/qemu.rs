//! Our locks against QEMU's, both ways, with `qemu-io` holding an image open. Skipped visibly without
//! `qemu-io`, unless `BLOCKMIRROR_REQUIRE_QEMU=1`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use blockmirror_image_lock::{ImageLock, LockError, Permissions};
use blockmirror_testing::qemu::have;

fn image(dir: &Path, format: &str) -> PathBuf {
    let path = dir.join(format!("disk.{format}"));
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg("1M").status().unwrap();
    assert!(made.success());
    path
}

/// A `qemu-io` that has an image open until dropped.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    fn open(path: &Path, options: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(options)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // It answers a command only once the image is open.
        stdin.write_all(b"length\n").unwrap();
        stdin.flush().unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let answer = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("MiB")));
        assert!(answer.is_some(), "qemu-io did not open the image");
        Self { child, stdin: Some(stdin) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The end of its input makes it close the image and exit.
        self.stdin = None;
        let _ = self.child.wait();
    }
}

fn qemu_io(path: &Path, options: &[&str]) -> Output {
    Command::new("qemu-io").args(options).args(["-c", "length"]).arg(path).output().unwrap()
}

fn qemu_io_opens(path: &Path, options: &[&str]) -> bool {
    let out = qemu_io(path, options);
    let stderr = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        assert!(stderr.contains("lock"), "refused for another reason: {stderr}");
    }
    out.status.success()
}

fn acquire(path: &Path, wanted: Permissions, unshared: Permissions) -> Result<File, LockError> {
    let writable = wanted != Permissions::READ;
    let file = OpenOptions::new().read(true).write(writable).open(path).unwrap();
    ImageLock::acquire(&file, path, wanted, unshared)?;
    Ok(file)
}

fn our_writer(path: &Path) -> Result<File, LockError> {
    acquire(path, Permissions::READ_WRITE, Permissions::CHANGE)
}

fn our_reader(path: &Path) -> Result<File, LockError> {
    acquire(path, Permissions::READ, Permissions::CHANGE)
}

fn our_tolerant_reader(path: &Path) -> Result<File, LockError> {
    acquire(path, Permissions::READ, Permissions::NONE)
}

#[test]
fn while_qemu_writes_we_neither_write_nor_read() {
    if !have("locks", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for format in ["qcow2", "raw"] {
        let path = image(dir.path(), format);
        let holder = Holder::open(&path, &["-f", format]);
        for refused in [our_writer(&path).unwrap_err(), our_reader(&path).unwrap_err()] {
            let by = refused.holder().expect("the holder is found");
            assert_eq!((by.pid, by.command.as_str()), (holder.child.id(), "qemu-io"), "{format}: {refused}");
        }
        our_tolerant_reader(&path).unwrap();
        drop(holder);
        our_writer(&path).unwrap();
    }
}

#[test]
fn while_qemu_reads_we_read_but_do_not_write() {
    if !have("locks", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for format in ["qcow2", "raw"] {
        let path = image(dir.path(), format);
        let holder = Holder::open(&path, &["-r", "-f", format]);
        our_reader(&path).unwrap();
        if format == "qcow2" {
            assert!(our_writer(&path).is_err());
        } else {
            // QEMU's reader of a raw image lets others write.
            our_writer(&path).unwrap();
        }
        drop(holder);
        our_writer(&path).unwrap();
    }
}

#[test]
fn while_we_write_qemu_neither_writes_nor_reads() {
    if !have("locks", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for format in ["qcow2", "raw"] {
        let path = image(dir.path(), format);
        let held = our_writer(&path).unwrap();
        assert!(!qemu_io_opens(&path, &["-f", format]), "{format}: QEMU wrote what we write");
        // A raw reader of QEMU's bears with writers, a qcow2 one does not.
        assert_eq!(qemu_io_opens(&path, &["-r", "-f", format]), format == "raw");
        assert!(qemu_io_opens(&path, &["-r", "-U", "-f", format]));
        drop(held);
        assert!(qemu_io_opens(&path, &["-f", format]));
    }
}

#[test]
fn while_we_read_qemu_reads_but_does_not_write() {
    if !have("locks", &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for format in ["qcow2", "raw"] {
        let path = image(dir.path(), format);
        let held = our_reader(&path).unwrap();
        assert!(qemu_io_opens(&path, &["-r", "-f", format]));
        assert!(!qemu_io_opens(&path, &["-f", format]), "{format}: QEMU wrote what we read");
        drop(held);
        let held = our_tolerant_reader(&path).unwrap();
        assert!(qemu_io_opens(&path, &["-f", format]), "a tolerant reader excludes no user");
        drop(held);
    }
}
