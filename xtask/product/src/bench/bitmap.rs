//! The dirty bitmap of an 8 TiB disk at 4 KiB: memory when clean, and the time to find its only dirty
//! granule.

use std::hint::black_box;
use std::time::Instant;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_testing::Outcome;
use serde::Serialize;

use super::median;

/// Name of the scenario.
pub(super) const NAME: &str = "bitmap";

const DISK: u64 = 8 << 40;
const GRANULARITY: u64 = 4 << 10;
/// Searches per sample, so that the clock's own cost vanishes.
const SEARCHES: u32 = 10_000;

#[derive(Serialize)]
pub(super) struct Figures {
    clean_heap_bytes: usize,
    full_heap_bytes: usize,
    find_one_ns: f64,
}

impl Figures {
    pub(super) fn line(&self) -> String {
        format!(
            "{NAME}: 8 TiB at 4 KiB: {} bytes clean, {} bytes all dirty; one dirty granule found in {:.0} ns",
            self.clean_heap_bytes, self.full_heap_bytes, self.find_one_ns
        )
    }
}

/// Measures, and fails if a search finds the wrong granule.
pub(super) fn run() -> Outcome<Figures> {
    let mut dirty = DirtyBitmap::new(DISK, GRANULARITY)?;
    let clean_heap_bytes = dirty.heap_bytes();
    dirty.set_all();
    let full_heap_bytes = dirty.heap_bytes();
    let mut samples = Vec::new();
    for tenth in 1..10 {
        let at = (DISK / 10 * tenth) & !(GRANULARITY - 1);
        dirty.clear_all();
        dirty.set(at..at + 1);
        let start = Instant::now();
        for _ in 0..SEARCHES {
            if black_box(&dirty).next_dirty(black_box(0), DISK) != Some(at..at + GRANULARITY) {
                return Err(format!("the dirty granule at {at} was not found").into());
            }
        }
        samples.push(start.elapsed().as_nanos() as f64 / f64::from(SEARCHES));
    }
    Ok(Figures { clean_heap_bytes, full_heap_bytes, find_one_ns: median(samples) })
}
