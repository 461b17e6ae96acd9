//! The latency budget: what the job may add to a write of the guest, and what it does about it.
//!
//! A write pays for the job where it waits for admission (for a copy under way on its bytes, or for one whose
//! turn it is) and where it waits for the target. The core tells each such delay here. What follows from it:
//!
//! - Depth: while the guest writes, the job has no more bytes under way than the window of `pressure`, which
//!   is halved whenever more than one delay in a hundred was over the budget.
//! - Size: where the guest has written lately and would wait for a copy, copies are cut so that one takes no
//!   more than half the budget, but not below 64 KiB.
//! - Patience: a write that has waited for the whole budget goes to the source alone (see `guest`).
//!
//! Pure: time is an argument. Memory is a few KiB whatever the disk.

use std::time::Duration;

use blockmirror_block::ByteRange;

use super::{Core, Work};

/// The disk is divided into so many regions to remember where the guest writes.
const REGIONS: u64 = 1024;
/// A region stays hot for so many steps of the meter, one second.
const HOT: u32 = 20;
/// The guest's writes under way are remembered for so many steps.
const PEAKS: usize = 4;
/// A percentile of fewer delays says nothing.
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

/// What is known of the guest and of the delays that the job causes it.
#[derive(Debug)]
pub(super) struct Budget {
    step: u32,
    /// The most writes under way in each of the last steps.
    peaks: [usize; PEAKS],
    /// By region: the step after the last write there; 0 for never.
    heat: Box<[u32]>,
    /// The delays of this generation and of the one before.
    delays: [Delays; 2],
    /// Bytes of a copy where the guest is about.
    size: u64,
}

impl Budget {
    pub(super) fn new(size: u64) -> Self {
        Self { step: 0, peaks: [0; PEAKS], heat: Box::default(), delays: Default::default(), size }
    }

    /// Another step begins; `under_way` writes are. Whether too many delays were over the budget.
    fn step(&mut self, under_way: usize) -> bool {
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

impl Core {
    /// A step of the meter has passed.
    pub(super) fn step_budget(&mut self) {
        let over = self.budget.step(self.guests.len());
        self.adjust_window(over);
    }

    /// The guest begins to write in `range`.
    pub(super) fn note_guest(&mut self, range: ByteRange) {
        let peak = &mut self.budget.peaks[self.budget.step as usize % PEAKS];
        *peak = (*peak).max(self.guests.len());
        if self.config.latency_budget().is_none() {
            return;
        }
        let regions = self.regions(range);
        if self.budget.heat.is_empty() {
            self.budget.heat = vec![0; REGIONS as usize + 1].into_boxed_slice();
        }
        self.budget.heat[regions].fill(self.budget.step + 1);
    }

    /// The job has added `delay` to a write of the guest.
    pub(super) fn note_delay(&mut self, delay: Duration) {
        if let Some(budget) = self.config.latency_budget() {
            self.budget.delays[0].note(delay, budget);
        }
    }

    /// A copy of `bytes` took `time`.
    pub(super) fn note_copy(&mut self, bytes: u64, time: Duration) {
        let Some(budget) = self.config.latency_budget() else { return };
        let (size, least) = (self.budget.size, self.min_copy_size());
        if bytes >= least && time > budget / 2 {
            self.budget.size = size.min((bytes.next_power_of_two() / 2).max(least));
        } else if bytes >= size && time < budget / 8 {
            self.budget.size = (size * 2).min(self.config.operation);
        }
    }

    /// The most bytes of a copy that begins at `start`, as far as the guest is concerned.
    pub(super) fn max_copy_size(&self, start: u64) -> u64 {
        let most = self.config.operation;
        if self.budget.heat.is_empty() || !self.is_blocking() || self.quiesced {
            return most;
        }
        let regions = self.regions(ByteRange::at(start, most));
        let hot = |&at: &u32| at != 0 && self.budget.step.saturating_sub(at) < HOT;
        if self.budget.heat[regions].iter().any(hot) { self.budget.size.min(most) } else { most }
    }

    /// What 99 of 100 of the guest's latest writes were not delayed by more than, where they wait for the job
    /// or the target.
    pub(super) fn guest_delay(&self) -> Option<Duration> {
        let enough = |delays: &&Delays| delays.all >= ENOUGH;
        self.budget.delays.iter().find(enough)?.p99()
    }

    /// The delay that the guest suffers if it is over the budget although the job does as little as it can.
    pub(super) fn delay_beyond_help(&self) -> Option<Duration> {
        let latest = self.budget.delays.iter().find(|delays| delays.all >= ENOUGH)?;
        if !self.is_at_minimum() || !latest.too_many_over() {
            return None;
        }
        latest.p99()
    }

    /// How long a write waits for the job before it goes to the source alone. While the guest is held it
    /// waits for the end.
    pub(crate) fn admission_timeout(&self) -> Option<Duration> {
        self.config.latency_budget().filter(|_| !self.quiesced)
    }

    fn regions(&self, range: ByteRange) -> std::ops::RangeInclusive<usize> {
        let size = (self.config.len / REGIONS).max(1);
        // As many regions as the disk is divided in, and one for what is left over; so each index fits.
        let region = |at: u64| (at / size).min(REGIONS) as usize;
        region(range.start())..=region(range.end().saturating_sub(1).max(range.start()))
    }

    /// Whether the operation is one that a guest waits for.
    pub(super) fn is_urgent(&self, work: Work) -> bool {
        let range = match work {
            Work::Copy { range, .. } | Work::Zero { range, .. } => range,
            Work::Scan { .. } | Work::Flush | Work::PeriodicFlush | Work::End(_) => return false,
        };
        self.reserved_range().is_some_and(|reservation| reservation.overlaps(range))
    }
}

#[cfg(test)]
mod tests;
