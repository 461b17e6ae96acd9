//! A guest that writes over NBD and knows what it wrote.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockmirror_block::{BlockDevice, WriteFlags};

/// The unit of its writes.
pub(crate) const BLOCK: u64 = 4096;
/// Writers; each has blocks of its own.
const WRITERS: u64 = 4;
/// Most writes go to the first so many blocks.
const HOT: u64 = 256;

/// What block `index` holds in its `version`: 0 is what was there before the guest.
fn content(index: u64, version: u32, out: &mut [u8]) {
    let mut hash = blake3::Hasher::new();
    hash.update(&index.to_be_bytes()).update(&version.to_be_bytes());
    hash.finalize_xof().fill(out);
}

/// The first `len` bytes of a disk that was never written to.
pub(crate) fn fresh(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for (index, block) in bytes.chunks_mut(BLOCK as usize).enumerate() {
        content(index as u64, 0, block);
    }
    bytes
}

/// Writers that are at work until they are stopped.
pub(crate) struct Guest {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    versions: Arc<Vec<AtomicU32>>,
    writers: Vec<JoinHandle<()>>,
    /// So much of the disk is [`fresh`] content at the start; the rest is zeros.
    data: u64,
}

impl Guest {
    /// Begins to write all over `disk`, with so long a pause after each write.
    pub(crate) fn start<D: BlockDevice + 'static>(disk: D, data: u64, pause: Duration) -> Self {
        let blocks = disk.len() / BLOCK;
        let (disk, stop, writes) = (Arc::new(disk), Arc::default(), Arc::default());
        let versions: Arc<Vec<AtomicU32>> = Arc::new((0..blocks).map(|_| AtomicU32::new(0)).collect());
        let writers = (0..WRITERS)
            .map(|writer| {
                let (disk, stop, writes, versions) =
                    (Arc::clone(&disk), Arc::clone(&stop), Arc::clone(&writes), Arc::clone(&versions));
                thread::spawn(move || write(&*disk, writer, &stop, &writes, &versions, data, pause))
            })
            .collect();
        Self { stop, writes, versions, writers, data }
    }

    /// How many writes were acknowledged so far.
    pub(crate) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Waits until so many more writes were acknowledged.
    pub(crate) fn goes_on(&self, more: u64) {
        let (until, deadline) = (self.writes() + more, std::time::Instant::now() + Duration::from_secs(60));
        while self.writes() < until {
            assert!(std::time::Instant::now() < deadline, "the guest stands still");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops; none of its writes has failed, and none of its reads has shown anything but what it wrote.
    pub(crate) fn stop(mut self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers.drain(..) {
            writer.join().expect("the guest is content");
        }
        let versions = self.versions.iter().map(|version| version.load(Ordering::Relaxed)).collect();
        Written { versions, data: self.data }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn write(
    disk: &dyn BlockDevice,
    writer: u64,
    stop: &AtomicBool,
    writes: &AtomicU64,
    versions: &[AtomicU32],
    data: u64,
    pause: Duration,
) {
    let mut dice = writer + 1;
    let mut below = |n: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % n
    };
    let (mut new, mut old, mut back) = ([0; BLOCK as usize], [0; BLOCK as usize], [0; BLOCK as usize]);
    while !stop.load(Ordering::Relaxed) {
        let span = if below(10) == 0 { versions.len() as u64 } else { HOT };
        let index = below(span / WRITERS) * WRITERS + writer;
        let slot = &versions[index as usize];
        let version = slot.load(Ordering::Relaxed);
        if version > 0 || index * BLOCK < data {
            disk.read_at(&mut back, index * BLOCK).expect("a read of the guest");
            content(index, version, &mut old);
            assert!(back == old, "block {index} is not what was written last");
        }
        content(index, version + 1, &mut new);
        let flags = if below(8) == 0 { WriteFlags::FUA } else { WriteFlags::NONE };
        disk.write_at(&new, index * BLOCK, flags).expect("a write of the guest");
        slot.store(version + 1, Ordering::Relaxed);
        writes.fetch_add(1, Ordering::Relaxed);
        thread::sleep(pause);
    }
}

/// What the guest wrote, block by block.
pub(crate) struct Written {
    versions: Vec<u32>,
    data: u64,
}

impl Written {
    /// That the file `raw` holds all of it, and else what was there before.
    pub(crate) fn is_in(&self, raw: &Path) {
        let bytes = std::fs::read(raw).unwrap();
        assert_eq!(bytes.len() as u64, self.versions.len() as u64 * BLOCK);
        let mut expected = [0; BLOCK as usize];
        for (index, (block, version)) in bytes.chunks(BLOCK as usize).zip(&self.versions).enumerate() {
            if *version == 0 && index as u64 * BLOCK >= self.data {
                expected.fill(0);
            } else {
                content(index as u64, *version, &mut expected);
            }
            assert!(block == expected, "block {index} lacks version {version}");
        }
    }
}
