//! NBD servers that others wrote, on a Unix domain socket in a folder of their own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(dead_code, reason = "each test file uses some of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags, ZeroFlags};
use blockmirror_nbd::{Client, ClientOptions, NbdUri};
use blockmirror_testing::qemu::listens;
use blockmirror_testing::scratch::scratch;
use tempfile::TempDir;

/// A server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) dir: TempDir,
    /// What it was started with, without the program.
    command: Vec<std::ffi::OsString>,
    program: &'static str,
}

impl Server {
    fn start(dir: TempDir, program: &'static str, command: Vec<std::ffi::OsString>) -> Self {
        let child = spawn(dir.path(), program, &command);
        Self { child, dir, command, program }
    }

    /// `qemu-nbd` with `image`, which lies in `dir`.
    pub(crate) fn qemu(dir: TempDir, format: &str, image: &str, args: &[&str]) -> Self {
        let (socket, image) = (socket_in(dir.path()), dir.path().join(image));
        let mut command: Vec<std::ffi::OsString> =
            ["-t", "-e", "8", "-f", format, "--discard=unmap", "-k"].map(Into::into).into();
        command.push(socket.into());
        command.extend(args.iter().map(Into::into));
        command.push(image.into());
        Self::start(dir, "qemu-nbd", command)
    }

    /// `qemu-nbd` with the qcow2 image `image`, which lies in `dir`, without the backing file that it names.
    pub(crate) fn qemu_without_backing(dir: TempDir, image: &str, args: &[&str]) -> Self {
        let socket = socket_in(dir.path());
        let mut command: Vec<std::ffi::OsString> =
            ["-t", "-e", "8", "--discard=unmap", "-k"].map(Into::into).into();
        command.push(socket.into());
        command.extend(args.iter().map(Into::into));
        let file = dir.path().join(image).display().to_string();
        let file = format!(r#"{{"driver": "file", "filename": "{file}"}}"#);
        command.push(
            format!(r#"json:{{"driver": "qcow2", "backing": null, "discard": "unmap", "file": {file}}}"#)
                .into(),
        );
        Self::start(dir, "qemu-nbd", command)
    }

    /// `qemu-nbd` with a new raw image of `size` bytes, called `image`.
    pub(crate) fn qemu_raw(size: u64, args: &[&str]) -> Self {
        let dir = scratch().unwrap();
        fs::File::create(dir.path().join("image")).unwrap().set_len(size).unwrap();
        Self::qemu(dir, "raw", "image", args)
    }

    /// `nbdkit` with `args` after the socket; `@` in them is the folder with a slash.
    pub(crate) fn nbdkit(dir: TempDir, args: &[&str]) -> Self {
        let mut command: Vec<std::ffi::OsString> = ["-f", "--exit-with-parent", "-U"].map(Into::into).into();
        command.push(socket_in(dir.path()).into());
        let here = format!("{}/", dir.path().display());
        command.extend(args.iter().map(|arg| arg.replace('@', &here).into()));
        Self::start(dir, "nbdkit", command)
    }

    /// `nbdkit` with a disk of `size` bytes in memory.
    pub(crate) fn nbdkit_memory(size: u64, args: &[&str]) -> Self {
        let size = format!("size={size}");
        let words: Vec<_> = args.iter().copied().filter(|arg| arg.starts_with('-')).collect();
        let keys = args.iter().copied().filter(|arg| !arg.starts_with('-'));
        let all: Vec<_> = words.into_iter().chain(["memory", &size]).chain(keys).collect();
        Self::nbdkit(scratch().unwrap(), &all)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn uri(&self) -> NbdUri {
        NbdUri::unix(socket_in(self.dir.path()), "")
    }

    pub(crate) fn options(&self) -> ClientOptions {
        ClientOptions::new(self.uri()).writable(true)
    }

    pub(crate) fn open(&self) -> Client {
        self.options().open().unwrap()
    }

    /// Kills it as a lost host would go: no connection is closed by the protocol.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether it ends by itself.
    pub(crate) fn ends(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Starts it again, after it was killed.
    pub(crate) fn restart(&mut self) {
        self.child = spawn(self.dir.path(), self.program, &self.command);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join("socket")
}

fn spawn(dir: &Path, program: &str, command: &[std::ffi::OsString]) -> Child {
    let socket = socket_in(dir);
    let _ = fs::remove_file(&socket);
    let mut child =
        Command::new(program).args(command).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !listens(&socket) {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("{program} {command:?} ended: {status}");
        }
        assert!(Instant::now() < deadline, "{program} does not listen");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Bytes that differ everywhere.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut out);
    out
}

/// A small deterministic generator for operation sequences.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Random operations on the device and on a vector of bytes; both must agree all the time.
pub(crate) fn agrees_with_a_vector(disk: &dyn BlockDevice, seed: u64, operations: u32) {
    let len = disk.len();
    let mut model = vec![0; len as usize];
    disk.read_at(&mut model, 0).unwrap();
    let mut dice = Dice(seed);
    for i in 0..operations {
        let offset = dice.below(len);
        let longest = if dice.below(4) == 0 { 300_000 } else { 3000 };
        let size = 1 + dice.below((len - offset).min(longest));
        let (range, slice) = (ByteRange::at(offset, size), offset as usize..(offset + size) as usize);
        match dice.below(6) {
            0 | 1 => {
                let data = noise(seed ^ u64::from(i), size as usize);
                let flags = if dice.below(3) == 0 { WriteFlags::FUA } else { WriteFlags::NONE };
                disk.write_at(&data, offset, flags).unwrap();
                model[slice].copy_from_slice(&data);
            }
            2 => {
                let flags = if dice.below(2) == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::FUA };
                disk.write_zeroes(range, flags).unwrap();
                model[slice].fill(0);
            }
            3 => disk.flush().unwrap(),
            4 => {
                let mut at = offset;
                disk.extents(range, &mut |extent| {
                    assert_eq!(extent.range.start(), at);
                    at = extent.range.end();
                    let part = &model[extent.range.start() as usize..at as usize];
                    assert!(!extent.reads_as_zero() || part.iter().all(|b| *b == 0), "{extent:?}");
                    Visit::Continue(())
                })
                .unwrap();
                assert_eq!(at, range.end());
            }
            _ => {
                let mut buf = vec![0xaa; size as usize];
                disk.read_at(&mut buf, offset).unwrap();
                assert!(buf == model[slice], "read of {range:?} after {i} operations");
            }
        }
    }
    let mut all = vec![0; len as usize];
    disk.read_at(&mut all, 0).unwrap();
    assert!(all == model);
}
