//! Chains of images in files, a guest that writes one, and QEMU's opinion of what is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "each test program uses its part of this")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_file::{FileOptions, LockMode};
use blockmirror_ops::Base;
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};
use blockmirror_testing::qemu::{have, run};

pub(crate) const SIZE: u64 = 4 << 20;

/// A folder with images, each standing on the one made before it.
pub(crate) struct Chain {
    dir: tempfile::TempDir,
    pub(crate) layers: Vec<Arc<Qcow2>>,
}

pub(crate) fn name(layer: usize) -> String {
    format!("layer{layer}.qcow2")
}

impl Chain {
    /// Images of the given lengths, the first at the bottom, each with some data, zeros and holes of its own.
    pub(crate) fn new(lens: &[u64]) -> Self {
        let mut chain = Self { dir: tempfile::tempdir().unwrap(), layers: Vec::new() };
        for (n, len) in lens.iter().enumerate() {
            let mut options = CreateOptions::new(*len);
            options.backing_file = n.checked_sub(1).map(|below| name(below).into_bytes());
            options.backing_format = (n > 0).then(|| "qcow2".to_owned());
            let file = FileOptions::new().create_new(true).lock(LockMode::Off).open(chain.path(n)).unwrap();
            let file = Arc::new(file);
            options.create(&*file, None).unwrap();
            let mut open = OpenOptions::new().writable(true);
            if let Some(below) = chain.layers.last() {
                open = open.backing(Arc::clone(below) as _);
            }
            let image = open.open(file).unwrap();
            // Layers differ in where they hold what, by strides that are no multiples of each other.
            let stride = 3 * (n as u64 + 1) * 65536 + 20_000;
            for (i, at) in (n as u64 * 50_000..*len).step_by(stride as usize).enumerate() {
                let part = ByteRange::at(at, 100_000).intersect(ByteRange::new(0, *len));
                if i % 3 == 2 && n > 0 {
                    image.write_zeroes(part, ZeroFlags::MAY_UNMAP).unwrap();
                } else {
                    let bytes = vec![(n as u8 + 1) << 4 | (i as u8 & 15); part.len() as usize];
                    image.write_at(&bytes, at, WriteFlags::NONE).unwrap();
                }
            }
            image.flush().unwrap();
            chain.layers.push(Arc::new(image));
        }
        chain
    }

    pub(crate) fn path(&self, layer: usize) -> PathBuf {
        self.dir.path().join(name(layer))
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn top(&self) -> &Arc<Qcow2> {
        self.layers.last().unwrap()
    }

    /// The layer as something to stand on.
    pub(crate) fn base(&self, layer: usize) -> Base {
        Base {
            device: Arc::clone(&self.layers[layer]) as _,
            name: name(layer).into_bytes(),
            format: Some("qcow2".into()),
        }
    }

    /// The files as they are, in another folder.
    pub(crate) fn copy(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for layer in 0..self.layers.len() {
            std::fs::copy(self.path(layer), copy.path().join(name(layer))).unwrap();
        }
        copy
    }
}

pub(crate) fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0; disk.len() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

/// Requests after which a guest only waits.
const BUSY: u64 = 10_000;

/// Writes `disk` until it is stopped or has done its number of requests, in places and lengths of every kind;
/// returns what must be read in the end.
pub(crate) fn guest(disk: &dyn BlockDevice, mut now: Vec<u8>, stop: &AtomicBool) -> Vec<u8> {
    let mut dice = 1u64;
    let mut roll = |below: u64| {
        dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (dice >> 33) % below
    };
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) || round < 200 {
        // Discards make work for the job faster than one that is ready when nothing is left may ever do it.
        if round == BUSY {
            thread::yield_now();
            continue;
        }
        round += 1;
        let len = 1 + roll(if round.is_multiple_of(10) { 150_000 } else { 5000 });
        let at = roll(now.len() as u64 - len);
        let range = ByteRange::at(at, len);
        let span = at as usize..(at + len) as usize;
        match roll(10) {
            0 => {
                disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap();
                now[span].fill(0);
            }
            1 => {
                disk.discard(range).unwrap();
                disk.read_at(&mut now[span], at).unwrap();
            }
            2 => {
                let mut found = vec![0; len as usize];
                disk.read_at(&mut found, at).unwrap();
                assert!(found == now[span], "round {round}: {range:?} reads wrong");
            }
            _ => {
                let byte = round as u8 | 1;
                disk.write_at(&vec![byte; len as usize], at, WriteFlags::NONE).unwrap();
                now[span].fill(byte);
            }
        }
    }
    now
}

/// Whether QEMU's tools can be run; without them a part of `test` is skipped.
pub(crate) fn qemu(test: &str) -> bool {
    have(test, &["qemu-img"])
}

/// Runs `qemu-img` in `dir`; panics with what it prints unless it succeeds.
pub(crate) fn img(dir: &Path, args: &[&str]) -> String {
    run("qemu-img", dir, args).unwrap()
}

/// QEMU finds the image sound, and reads `want` through whatever chain its header names.
pub(crate) fn judge(dir: &Path, image: &str, want: &[u8]) {
    std::fs::write(dir.join("want.raw"), want).unwrap();
    img(dir, &["check", "-q", "-f", "qcow2", image]);
    img(dir, &["compare", "-q", "-f", "qcow2", "-F", "raw", image, "want.raw"]);
}

/// The backing file that the image in `dir` names.
pub(crate) fn backing_name(dir: &Path, image: &str) -> Option<String> {
    let file = FileOptions::new().lock(LockMode::Off).open(dir.join(image)).unwrap();
    let header = blockmirror_qcow2::Header::read(&file).unwrap();
    header.backing.as_ref().map(|b| b.name.to_string())
}
