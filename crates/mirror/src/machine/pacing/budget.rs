//! Latency budget: what the job may add to a guest write, and the size of copies that follows from it.
//!
//! A write pays for the job where it waits for admission (for a copy in flight on its bytes, or for a
//! reservation) and where it waits for the target. Each such delay is recorded here. What follows from them:
//!
//! - Depth: while the guest writes, the job has no more bytes in flight than the [window](super::congestion),
//!   which is halved whenever more than one delay in a hundred was over the budget.
//! - Size: where the guest has written lately and would wait for a copy, copies are cut so that one takes no
//!   more than half the budget, but not below 64 KiB.
//! - Admission timeout: a write that has waited for the whole budget goes to the source alone.
//!
//! Pure: time is an argument. Memory is a few KiB whatever the disk.

use std::time::Duration;

use blockmirror_block::ByteRange;

use crate::machine::config::Config;

/// The disk is divided into so many regions to remember where the guest writes.
const REGIONS: u64 = 1024;
/// A region stays hot for so many steps of the sampler, one second.
const HOT: u32 = 20;
/// The guest's writes under way are remembered for so many steps.
const PEAKS: usize = 4;
/// No percentile is taken of fewer delays.
const ENOUGH: u32 = 100;
/// Delays are counted anew after so many steps, half a second.
const GENERATION: u32 = 10;
/// Four classes of delays per octave of nanoseconds.
const CLASSES: usize = 4 * 64;

/// Delays by size, four classes to an octave.
#[derive(Clone, Debug)]
struct Delays {
    classes: [u32; CLASSES],
    all: u32,
    over: u32,
}

impl Default for Delays {
    fn default() -> Self {
        Self { classes: [0; CLASSES], all: 0, over: 0 }
    }
}

impl Delays {
    fn note(&mut self, delay: Duration, budget: Duration) {
        let nanos = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX).max(4);
        let octave = nanos.ilog2();
        let quarter = (nanos >> (octave - 2) & 3) as usize;
        self.classes[octave as usize * 4 + quarter] += 1;
        self.all += 1;
        self.over += u32::from(delay > budget);
    }

    /// Whether more than one in a hundred was over the budget.
    fn too_many_over(&self) -> bool {
        u64::from(self.over) * 100 > u64::from(self.all)
    }

    /// What 99 of 100 did not exceed, rounded up to a class.
    fn p99(&self) -> Option<Duration> {
        let mut left = self.all - self.all / 100;
        for (index, &count) in self.classes.iter().enumerate() {
            left = left.saturating_sub(count);
            if left == 0 && self.all > 0 {
                let (octave, quarter) = ((index / 4) as u32, (index % 4) as u128);
                return Some(Duration::from_nanos_u128(((5 + quarter) << octave) / 4));
            }
        }
        None
    }
}

/// Where the guest writes, and the delays that the job adds.
#[derive(Debug)]
pub(super) struct Budget {
    step: u32,
    /// The most writes under way in each of the last steps.
    peaks: [usize; PEAKS],
    /// By region: the step after the last write there; 0 for never.
    heat: Box<[u32]>,
    /// The delays of this generation and of the one before.
    delays: [Delays; 2],
    /// Size of a copy where the guest writes.
    size: u64,
}

impl Budget {
    pub(super) fn new(size: u64) -> Self {
        Self { step: 0, peaks: [0; PEAKS], heat: Box::default(), delays: Default::default(), size }
    }

    /// Another step begins; `under_way` writes are. Whether too many delays were over the budget.
    pub(super) fn step(&mut self, under_way: usize) -> bool {
        let over = self.delays[0].all >= ENOUGH && self.delays[0].too_many_over();
        if over || self.step.is_multiple_of(GENERATION) {
            // Counted anew, so that what follows shows whether it helped.
            self.delays = [Delays::default(), std::mem::take(&mut self.delays[0])];
        }
        self.step = self.step.wrapping_add(1);
        self.peaks[self.step as usize % PEAKS] = under_way;
        over
    }

    /// The most writes under way of late.
    pub(super) fn peak(&self) -> usize {
        self.peaks.iter().copied().max().unwrap_or(0)
    }
}

impl Budget {
    /// A guest write to `range` asks for admission, the last of `writes`.
    pub(super) fn guest_begins(&mut self, config: &Config, range: ByteRange, writes: usize) {
        let peak = &mut self.peaks[self.step as usize % PEAKS];
        *peak = (*peak).max(writes);
        if config.latency_budget().is_none() {
            return;
        }
        if self.heat.is_empty() {
            self.heat = vec![0; REGIONS as usize + 1].into_boxed_slice();
        }
        self.heat[regions(config.len, range)].fill(self.step + 1);
    }

    /// The job has added `delay` to a guest write.
    pub(super) fn guest_delayed(&mut self, config: &Config, delay: Duration) {
        if let Some(budget) = config.latency_budget() {
            self.delays[0].note(delay, budget);
        }
    }

    /// A copy of `bytes` took `time`.
    pub(super) fn copied(&mut self, config: &Config, bytes: u64, time: Duration) {
        let Some(budget) = config.latency_budget() else { return };
        let least = config.min_copy_size();
        if bytes >= least && time > budget / 2 {
            self.size = self.size.min((bytes.next_power_of_two() / 2).max(least));
        } else if bytes >= self.size && time < budget / 8 {
            self.size = (self.size * 2).min(config.operation);
        }
    }

    /// The maximum size of a copy that begins at `start` while guest writes go through.
    pub(super) fn max_copy_size(&self, config: &Config, start: u64) -> u64 {
        let most = config.operation;
        if self.heat.is_empty() {
            return most;
        }
        let regions = regions(config.len, ByteRange::at(start, most));
        let hot = |&at: &u32| at != 0 && self.step.saturating_sub(at) < HOT;
        if self.heat[regions].iter().any(hot) { self.size.min(most) } else { most }
    }

    /// The p99 of the delays of the latest guest writes.
    pub(super) fn p99(&self) -> Option<Duration> {
        self.latest()?.p99()
    }

    /// The same if too many of them were over the budget.
    pub(super) fn p99_over_budget(&self) -> Option<Duration> {
        self.latest().filter(|delays| delays.too_many_over())?.p99()
    }

    fn latest(&self) -> Option<&Delays> {
        self.delays.iter().find(|delays| delays.all >= ENOUGH)
    }
}

/// The regions of a disk of `len` bytes that `range` lies in.
fn regions(len: u64, range: ByteRange) -> std::ops::RangeInclusive<usize> {
    let size = (len / REGIONS).max(1);
    // As many regions as the disk is divided in, and one for the remainder; so each index fits.
    let region = |at: u64| (at / size).min(REGIONS) as usize;
    region(range.start())..=region(range.end().saturating_sub(1).max(range.start()))
}

#[cfg(test)]
mod tests;
