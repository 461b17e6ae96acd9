//! How hard the job may press on devices that the guest uses too.
//!
//! A latency budget says what a write may take longer because of the job. What a write takes without it
//! cannot be known from outside, so the job is quiet for a moment now and then, a few milliseconds every five
//! seconds, and looks what the guest's writes take then. Afterwards the bytes that it has under way, the
//! window, follow from what they take now: less when they take a third longer, more when they do not. (Where
//! a budget was asked for, its figure counts instead of the third.) A guest that always has the same number
//! of writes under way so keeps three quarters of its throughput, if the devices can be shared that way at
//! all.
//!
//! Must hold: silence is bounded in time; without a guest that writes, or without a budget, nothing is held
//! back.

use std::time::Duration;

use super::{Core, Phase, Work};

/// From one silence to the next.
const EVERY: Duration = Duration::from_secs(5);
/// The longest silence, what was under way when it began included.
const LONGEST: Duration = Duration::from_millis(50);
/// So many writes tell what one takes.
const ENOUGH: u32 = 32;
/// So few tell it too, if there are no more.
const FEW: u32 = 4;
/// Bytes under way when the guest shows first.
const FIRST_WINDOW: u64 = 1 << 20;
/// Copies are not cut below this for the guest's sake.
const LEAST_SIZE: u64 = 64 << 10;
/// Operations under way are not fewer for the guest's sake, unless the window is as small as one.
const LEAST_DEPTH: usize = 2;

/// What writes take without the job.
#[derive(Clone, Copy, Debug, Default)]
struct Alone {
    mean: Duration,
    worst: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    sum: Duration,
    worst: Duration,
    count: u32,
}

#[derive(Clone, Copy, Debug)]
struct Quiet {
    until: Duration,
    /// Since when no data operation has been under way.
    silent: Option<Duration>,
    /// Since when the queues of the devices are those of the guest alone: the first write in the silence has
    /// finished.
    settled: Option<Duration>,
    tally: Tally,
    /// Of which kind the writes are that count.
    both: bool,
}

#[derive(Debug)]
pub(super) struct Pressure {
    window: u64,
    /// Of writes to the source, and of writes to both.
    alone: [Option<Alone>; 2],
    /// What writes took, in 256ths of what they take alone, and how many.
    ratios: u64,
    count: u32,
    over: u32,
    quiet: Option<Quiet>,
    next_quiet: Duration,
}

impl Default for Pressure {
    fn default() -> Self {
        Self {
            window: FIRST_WINDOW,
            alone: [None; 2],
            ratios: 0,
            count: 0,
            over: 0,
            quiet: None,
            next_quiet: Duration::ZERO,
        }
    }
}

impl Pressure {
    /// Devices are used in another way from now on.
    pub(super) fn look_again(&mut self, now: Duration) {
        self.next_quiet = now;
    }
}

impl Core {
    /// A write of the guest begins: time for silence?
    pub(super) fn listen(&mut self) {
        let idle = self.left() == 0 || self.is_paused() || self.held || !matches!(self.phase, Phase::Running);
        if self.config.latency_budget().is_none()
            || idle
            || self.pressure.quiet.is_some()
            || self.clock < self.pressure.next_quiet
        {
            return;
        }
        self.pressure.next_quiet = self.clock.saturating_add(EVERY);
        self.pressure.quiet = Some(Quiet {
            until: self.clock.saturating_add(LONGEST),
            silent: None,
            settled: None,
            tally: Tally::default(),
            both: self.is_blocking(),
        });
        self.note_silence();
    }

    /// Until when nothing is begun.
    pub(super) fn quiet_until(&self) -> Option<Duration> {
        self.pressure.quiet.map(|quiet| quiet.until).filter(|_| !self.held)
    }

    /// An operation may have been the last one under way.
    pub(super) fn note_silence(&mut self) {
        let moves = |work: Work| work.is_flush() || matches!(work, Work::Copy { .. } | Work::Zero { .. });
        if let Some(quiet) = &mut self.pressure.quiet
            && !self.in_flight.iter().any(|op| moves(op.work))
        {
            quiet.silent.get_or_insert(self.clock);
        }
    }

    /// Ends a silence whose time is over; whether it did.
    pub(super) fn end_silence(&mut self) -> bool {
        let Some(quiet) = self.pressure.quiet else { return false };
        if self.clock < quiet.until && quiet.tally.count < ENOUGH {
            return false;
        }
        self.pressure.quiet = None;
        if quiet.tally.count >= FEW {
            let mean = quiet.tally.sum / quiet.tally.count;
            self.pressure.alone[usize::from(quiet.both)] = Some(Alone { mean, worst: quiet.tally.worst });
        }
        true
    }

    /// A write of the guest that was admitted at `admitted` has finished, at the source or at both.
    pub(super) fn note_write(&mut self, admitted: Duration, both: bool) {
        let Some(budget) = self.config.latency_budget() else { return };
        let time = self.clock.saturating_sub(admitted);
        let pressure = &mut self.pressure;
        if let Some(quiet) = &mut pressure.quiet {
            if quiet.both != both || quiet.silent.is_none_or(|since| since > admitted) {
                // Something of the job was under way when it began.
            } else if *quiet.settled.get_or_insert(self.clock) <= admitted {
                quiet.tally.count += 1;
                quiet.tally.sum += time;
                quiet.tally.worst = quiet.tally.worst.max(time);
            }
        } else if let Some(alone) = pressure.alone[usize::from(both)] {
            let ratio = time.as_nanos().saturating_mul(256) / alone.mean.as_nanos().max(1);
            pressure.ratios += u64::try_from(ratio).unwrap_or(u64::MAX).min(1 << 20);
            pressure.count += 1;
            pressure.over += u32::from(time > alone.worst.saturating_add(budget));
        }
    }

    /// A step of the meter has passed: the window follows from what writes took in it.
    pub(super) fn adjust_window(&mut self, delays_over_budget: bool) {
        let most = self.config.operation.saturating_mul(self.config.max_in_flight as u64);
        let least = self.least_size();
        let pressure = &mut self.pressure;
        if delays_over_budget {
            pressure.window /= 2;
        } else if pressure.count >= ENOUGH {
            let ratio = pressure.ratios / u64::from(pressure.count);
            // By default a write may take a third longer; a little less leaves the window as it is.
            let (bearable, good) =
                if self.config.asked_budget.is_none() { (341, 315) } else { (u64::MAX, u64::MAX) };
            if ratio > bearable {
                let factor = (bearable * 256 / ratio).max(64);
                pressure.window = pressure.window.saturating_mul(factor) / 256;
            } else if u64::from(pressure.over) * 100 > u64::from(pressure.count) {
                pressure.window /= 2;
            } else if ratio < good {
                pressure.window += pressure.window / 2;
            }
        } else {
            return;
        }
        pressure.window = pressure.window.clamp(least, most.max(least));
        (pressure.ratios, pressure.count, pressure.over) = (0, 0, 0);
    }

    /// The most operations that may be under way: rather few large ones than many small ones, because some
    /// devices count bytes and some count requests.
    pub(super) fn depth(&self) -> usize {
        let most = self.config.max_in_flight;
        let Some(writes) = self.guest_about() else { return most };
        if self.is_at_its_least() {
            return 1;
        }
        let fit = usize::try_from(self.pressure.window / self.config.operation).unwrap_or(usize::MAX);
        // Not knowing better, leave the guest two places of three on a device that serves one request after
        // another.
        let known = self.pressure.alone[usize::from(self.is_blocking())].is_some();
        let places = if known { most } else { writes / 2 };
        most.min(places.min(fit).max(LEAST_DEPTH))
    }

    /// The most bytes of one copy, as far as the window is concerned.
    pub(super) fn share_of_window(&self) -> u64 {
        if self.guest_about().is_none() {
            return u64::MAX;
        }
        (self.pressure.window / self.depth() as u64).max(self.least_size())
    }

    /// The most writes that the guest has had under way lately, if there is a budget to mind for it.
    fn guest_about(&self) -> Option<usize> {
        let writes = self.budget.peak();
        (self.config.latency_budget().is_some() && writes > 0 && !self.held).then_some(writes)
    }

    /// Smaller copies are of no use to anybody.
    pub(super) fn least_size(&self) -> u64 {
        LEAST_SIZE.max(self.config.zero_unit).min(self.config.operation)
    }

    /// Whether the job does as little as it can for the guest's sake.
    pub(super) fn is_at_its_least(&self) -> bool {
        self.pressure.window <= self.least_size()
    }
}

#[cfg(test)]
mod tests;
