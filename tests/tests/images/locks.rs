//! Image locks, QEMU's and ours: the second user is refused, and readers share.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::common::{Ran, ours};
use blockmirror_image::{Format, OpenOptions};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

/// A `qemu-io` that holds an image until dropped.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    fn new(image: &Path, format: &str, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).args(read_only.then_some("-r")).arg(image);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // Its answer tells that the image is open.
        stdin.write_all(b"length\n").unwrap();
        stdin.flush().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "qemu-io did not open {}", image.display());
        Self { child, stdin: Some(stdin) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

fn copy(source: &Path, target: &Path, more: &[&str]) -> Ran {
    let words = ["mirror", "-q", "-f", "qcow2", "-O", "qcow2"].into_iter().chain(more.iter().copied());
    ours(words.map(OsStr::new).chain([source.as_os_str(), target.as_os_str()]))
}

#[test]
fn an_image_that_qemu_writes_is_refused_and_u_ignores_it() {
    let Some(qemu) = Qemu::find("locks") else { return };
    let dir = scratch().unwrap();
    let (image, target) = (dir.path().join("image.qcow2"), dir.path().join("target.qcow2"));
    for name in ["image.qcow2", "target.qcow2"] {
        qemu.img_in(dir.path(), ["create", "-q", "-f", "qcow2", name, "1M"]).unwrap();
    }
    let holder = Holder::new(&image, "qcow2", false);
    let other = dir.path().join("other.qcow2");
    let ran = copy(&image, &other, &[]);
    assert_eq!(ran.code, 1, "read while written: {ran:?}");
    assert!(ran.stderr.contains("image.qcow2"), "{}", ran.stderr);
    assert!(ran.stderr.contains(&holder.child.id().to_string()), "the holder is not named: {}", ran.stderr);
    let command = format!("(pid {}) running \"qemu-io -f qcow2 ", holder.child.id());
    assert!(ran.stderr.contains(&command), "{}", ran.stderr);
    assert!(!other.exists());
    let ran = copy(&target, &image, &["-n"]);
    assert_eq!(ran.code, 1, "two writers: {ran:?}");
    let ran = copy(&image, &other, &["-U"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    drop(holder);
    std::fs::remove_file(&other).unwrap();
    assert_eq!(copy(&image, &other, &[]).code, 0);
}

#[test]
fn readers_share() {
    let Some(qemu) = Qemu::find("locks") else { return };
    let dir = scratch().unwrap();
    let image = dir.path().join("image.qcow2");
    qemu.img_in(dir.path(), ["create", "-q", "-f", "qcow2", "image.qcow2", "1M"]).unwrap();
    let holder = Holder::new(&image, "qcow2", true);
    let ran = copy(&image, &dir.path().join("copy"), &[]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let ran = copy(&dir.path().join("copy"), &image, &["-n"]);
    assert_eq!(ran.code, 1, "written while read: {ran:?}");
    drop(holder);
}

#[test]
fn qemu_is_refused_while_we_hold_an_image() {
    let Some(qemu) = Qemu::find("locks") else { return };
    let dir = scratch().unwrap();
    for (format, name) in [("qcow2", "image.qcow2"), ("raw", "image.raw")] {
        let image = dir.path().join(name);
        qemu.img_in(dir.path(), ["create", "-q", "-f", format, name, "1M"]).unwrap();
        let open = |writable| {
            let format: Format = format.parse().unwrap();
            OpenOptions::new().format(format).writable(writable).open(&image).unwrap()
        };
        let held = open(true);
        let error = qemu.io(format, &image, &["write 0 512"]).unwrap_err().to_string();
        assert!(error.contains("lock"), "{error}");
        drop(held);
        let held = open(false);
        let reader = Holder::new(&image, format, true);
        drop(reader);
        let second = open(false);
        drop((held, second));
        qemu.io(format, &image, &["write 0 512"]).unwrap();
    }
}
