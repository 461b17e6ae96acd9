//! Allocating writes to one qcow2 image from one thread and from four: on a storage that takes 200 us for
//! each write, where they overlap, and on a file in memory, where they compete.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{
    BlockDevice, ByteRange, Result as BlockResult, Storage, StorageExtent, StorageInfo, Visit, WriteFlags,
    ZeroFlags,
};
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
use blockmirror_qcow2::CreateOptions;
use blockmirror_testing::Outcome;
use blockmirror_testing::scratch::scratch;
use serde::Serialize;

use super::median;

/// Name of the scenario.
pub(super) const NAME: &str = "parallel writes";

/// What a write takes on the slow storage.
const LATENCY: Duration = Duration::from_micros(200);
const THREADS: u64 = 4;
/// Bytes of a write: one cluster.
const CHUNK: u64 = 64 << 10;

/// Medians over the rounds of the throughput of four threads / that of one.
#[derive(Serialize)]
pub(super) struct Throughput {
    slow_ratio: f64,
    tmpfs_ratio: f64,
    /// Bytes per second of one thread.
    slow_one: f64,
    tmpfs_one: f64,
}

impl Throughput {
    pub(super) fn line(&self) -> String {
        format!(
            "{NAME}: {THREADS} threads do {:.2} times what one does at 200 us a write ({:.0} MiB/s), \
             {:.2} times on a file in memory ({:.0} MiB/s)",
            self.slow_ratio,
            self.slow_one / f64::from(1 << 20),
            self.tmpfs_ratio,
            self.tmpfs_one / f64::from(1 << 20),
        )
    }
}

/// Measures; `smoke` says that results are right, nothing about speed.
pub(super) fn run(rounds: usize, smoke: bool) -> Outcome<Throughput> {
    let dir = scratch()?;
    let (slow_chunks, fast_chunks) = if smoke { (64, 64) } else { (4096, 8192) };
    let mut samples: [Vec<f64>; 4] = Default::default();
    for round in 0..rounds {
        // Which comes first changes from round to round.
        for threads in if round % 2 == 0 { [1, THREADS] } else { [THREADS, 1] } {
            let which = usize::from(threads == THREADS);
            samples[which].push(write(&*slow_disk(slow_chunks)?, threads, slow_chunks)?);
            let path = dir.path().join("disk.qcow2");
            samples[2 + which].push(write(&*file_disk(&path, fast_chunks)?, threads, fast_chunks)?);
            std::fs::remove_file(path)?;
        }
    }
    let [slow_one, slow_all, tmpfs_one, tmpfs_all] = samples;
    let ratio = |all: &[f64], one: &[f64]| median(all.iter().zip(one).map(|(all, one)| all / one).collect());
    Ok(Throughput {
        slow_ratio: ratio(&slow_all, &slow_one),
        tmpfs_ratio: ratio(&tmpfs_all, &tmpfs_one),
        slow_one: median(slow_one),
        tmpfs_one: median(tmpfs_one),
    })
}

fn slow_disk(chunks: u64) -> Outcome<Arc<dyn BlockDevice>> {
    let storage = Arc::new(SlowStorage(MemoryStorage::new()));
    CreateOptions::new(chunks * CHUNK).create(&storage.0, None)?;
    Ok(Arc::new(blockmirror_qcow2::OpenOptions::new().writable(true).open(storage)?))
}

fn file_disk(path: &Path, chunks: u64) -> Outcome<Arc<dyn BlockDevice>> {
    let spec = CreateSpec::new(Format::Qcow2, chunks * CHUNK, CreateSettings::default());
    NewImage::create(path, &spec)?.persist()?;
    let image = OpenOptions::new().format(Format::Qcow2).writable(true).open(path)?;
    Ok(Arc::clone(image.device()))
}

/// Writes all of `disk`, which is empty, from `threads` threads, each of which takes the next chunk, and
/// flushes it. Returns bytes per second.
fn write(disk: &dyn BlockDevice, threads: u64, chunks: u64) -> Outcome<f64> {
    let next = AtomicU64::new(0);
    let data = vec![0x5a; CHUNK as usize];
    let writer = || -> BlockResult<()> {
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                return Ok(());
            }
            disk.write_at(&data, chunk * CHUNK, WriteFlags::NONE)?;
        }
    };
    let start = Instant::now();
    let written: Outcome = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(writer)).collect();
        for one in running {
            one.join().map_err(|_| "a writer panicked")??;
        }
        Ok(())
    });
    written?;
    disk.flush()?;
    let seconds = start.elapsed().as_secs_f64();
    let mut last = vec![0; CHUNK as usize];
    disk.read_at(&mut last, (chunks - 1) * CHUNK)?;
    if last != data {
        return Err("what was written last is not there".into());
    }
    Ok((chunks * CHUNK) as f64 / seconds)
}

/// Takes [`LATENCY`] for each write.
#[derive(Debug)]
struct SlowStorage(MemoryStorage);

impl Storage for SlowStorage {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn len(&self) -> BlockResult<u64> {
        self.0.len()
    }

    fn info(&self) -> StorageInfo {
        self.0.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        thread::sleep(LATENCY);
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> BlockResult<()> {
        self.0.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> BlockResult<()> {
        self.0.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> BlockResult<()> {
        self.0.allocate(range)
    }

    fn set_len(&self, len: u64) -> BlockResult<()> {
        self.0.set_len(len)
    }

    fn flush(&self) -> BlockResult<()> {
        self.0.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> BlockResult<()> {
        self.0.extents(range, visit)
    }
}
