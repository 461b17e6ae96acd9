//! The guest of the live benchmark: threads that each write 4 KiB somewhere, wait for the answer, and write
//! again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_testing::Outcome;
use blockmirror_testing::content::noise;

/// Bytes of one write.
pub(super) const BLOCK: u64 = 4096;

/// One thread's way to the disk.
pub(in crate::bench) trait Writer: Send {
    /// Writes `block` at `offset`, and comes back when that is acknowledged.
    fn write(&mut self, offset: u64, block: &[u8]) -> Outcome;
}

/// What the guest got done in a stretch of time.
#[derive(Debug)]
pub(super) struct Sample {
    seconds: f64,
    /// Of each write, in nanoseconds, in order of length.
    latencies: Vec<u32>,
}

impl Sample {
    pub(super) fn bytes(&self) -> u64 {
        self.latencies.len() as u64 * BLOCK
    }

    /// Writes per second.
    pub(super) fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.seconds
    }

    /// The latency that `part` of the writes do not exceed, in microseconds.
    pub(super) fn percentile(&self, part: f64) -> f64 {
        let index = (self.latencies.len() as f64 * part) as usize;
        self.latencies
            .get(index.min(self.latencies.len().saturating_sub(1)))
            .map_or(f64::NAN, |&ns| f64::from(ns) / 1000.0)
    }
}

/// Lets a guest run on `writers`, a thread each, while `watch` watches; it ends when `watch` does.
pub(super) fn run(
    writers: Vec<Box<dyn Writer>>,
    len: u64,
    seed: u64,
    watch: impl FnOnce() -> Outcome,
) -> Outcome<Sample> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = &stop;
        let start = Instant::now();
        let threads: Vec<_> = (seed * 1000..)
            .zip(writers)
            .map(|(seed, writer)| scope.spawn(move || write(writer, len, seed, stop)))
            .collect();
        let watched = watch();
        let seconds = start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        let mut latencies = Vec::new();
        for thread in threads {
            latencies.extend(thread.join().map_err(|_| "a guest's thread has panicked")??);
        }
        watched?;
        latencies.sort_unstable();
        Ok(Sample { seconds, latencies })
    })
}

/// The same for a fixed time.
pub(super) fn run_for(time: Duration, writers: Vec<Box<dyn Writer>>, len: u64, seed: u64) -> Outcome<Sample> {
    run(writers, len, seed, || {
        thread::sleep(time);
        Ok(())
    })
}

fn write(mut writer: Box<dyn Writer>, len: u64, seed: u64, stop: &AtomicBool) -> Outcome<Vec<u32>> {
    let mut block = vec![0; BLOCK as usize];
    noise(&mut block, seed);
    let mut state = seed | 1;
    let mut latencies = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        // A multiplicative generator is random enough to spread writes.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (state >> 24) % (len / BLOCK) * BLOCK;
        block[..8].copy_from_slice(&state.to_be_bytes());
        let start = Instant::now();
        writer.write(offset, &block)?;
        latencies.push(u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    Ok(latencies)
}
