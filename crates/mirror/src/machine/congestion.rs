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
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// The longest silence, what was under way when it began included.
const LONGEST: Duration = Duration::from_millis(50);
/// So many writes tell what one takes.
const ENOUGH: u32 = 32;
/// So few tell it too, if there are no more.
const FEW: u32 = 4;
/// Bytes under way when the guest shows first.
const INITIAL_WINDOW: u64 = 1 << 20;
/// Copies are not cut below this for the guest's sake.
const MIN_COPY: u64 = 64 << 10;
/// Operations under way are not fewer for the guest's sake, unless the window is as small as one.
const MIN_DEPTH: usize = 2;

/// What writes take without the job.
#[derive(Clone, Copy, Debug, Default)]
struct Baseline {
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
struct Probe {
    until: Duration,
    /// Since when no data operation has been under way.
    idle_since: Option<Duration>,
    /// Since when the queues of the devices are those of the guest alone: the first write in the silence has
    /// finished.
    settled: Option<Duration>,
    tally: Tally,
    /// Of which kind the writes are that count.
    both: bool,
}

#[derive(Debug)]
pub(super) struct CongestionWindow {
    window: u64,
    /// Of writes to the source, and of writes to both.
    baseline: [Option<Baseline>; 2],
    /// What writes took, in 256ths of what they take alone, and how many.
    ratios: u64,
    count: u32,
    over: u32,
    probe: Option<Probe>,
    next_probe: Duration,
}

impl Default for CongestionWindow {
    fn default() -> Self {
        Self {
            window: INITIAL_WINDOW,
            baseline: [None; 2],
            ratios: 0,
            count: 0,
            over: 0,
            probe: None,
            next_probe: Duration::ZERO,
        }
    }
}

impl CongestionWindow {
    /// Devices are used in another way from now on.
    pub(super) fn reset_baseline(&mut self, now: Duration) {
        self.next_probe = now;
    }
}

impl Core {
    /// A write of the guest begins: time for silence?
    pub(super) fn start_probe(&mut self) {
        let idle =
            self.left() == 0 || self.is_paused() || self.quiesced || !matches!(self.phase, Phase::Running);
        if self.config.latency_budget().is_none()
            || idle
            || self.congestion.probe.is_some()
            || self.clock < self.congestion.next_probe
        {
            return;
        }
        self.congestion.next_probe = self.clock.saturating_add(PROBE_INTERVAL);
        self.congestion.probe = Some(Probe {
            until: self.clock.saturating_add(LONGEST),
            idle_since: None,
            settled: None,
            tally: Tally::default(),
            both: self.is_blocking(),
        });
        self.note_idle();
    }

    /// Until when nothing is begun.
    pub(super) fn probe_until(&self) -> Option<Duration> {
        self.congestion.probe.map(|probe| probe.until).filter(|_| !self.quiesced)
    }

    /// An operation may have been the last one under way.
    pub(super) fn note_idle(&mut self) {
        let moves = |work: Work| work.is_flush() || matches!(work, Work::Copy { .. } | Work::Zero { .. });
        if let Some(probe) = &mut self.congestion.probe
            && !self.in_flight.iter().any(|op| moves(op.work))
        {
            probe.idle_since.get_or_insert(self.clock);
        }
    }

    /// Ends a silence whose time is over; whether it did.
    pub(super) fn end_probe(&mut self) -> bool {
        let Some(probe) = self.congestion.probe else { return false };
        if self.clock < probe.until && probe.tally.count < ENOUGH {
            return false;
        }
        self.congestion.probe = None;
        if probe.tally.count >= FEW {
            let mean = probe.tally.sum / probe.tally.count;
            self.congestion.baseline[usize::from(probe.both)] =
                Some(Baseline { mean, worst: probe.tally.worst });
        }
        true
    }

    /// A write of the guest that was admitted at `admitted` has finished, at the source or at both.
    pub(super) fn note_write(&mut self, admitted: Duration, both: bool) {
        let Some(budget) = self.config.latency_budget() else { return };
        let time = self.clock.saturating_sub(admitted);
        let congestion = &mut self.congestion;
        if let Some(probe) = &mut congestion.probe {
            if probe.both != both || probe.idle_since.is_none_or(|since| since > admitted) {
                // Something of the job was under way when it began.
            } else if *probe.settled.get_or_insert(self.clock) <= admitted {
                probe.tally.count += 1;
                probe.tally.sum += time;
                probe.tally.worst = probe.tally.worst.max(time);
            }
        } else if let Some(baseline) = congestion.baseline[usize::from(both)] {
            let ratio = time.as_nanos().saturating_mul(256) / baseline.mean.as_nanos().max(1);
            congestion.ratios += u64::try_from(ratio).unwrap_or(u64::MAX).min(1 << 20);
            congestion.count += 1;
            congestion.over += u32::from(time > baseline.worst.saturating_add(budget));
        }
    }

    /// A step of the meter has passed: the window follows from what writes took in it.
    pub(super) fn adjust_window(&mut self, delays_over_budget: bool) {
        let most = self.config.operation.saturating_mul(self.config.max_in_flight as u64);
        let least = self.min_copy_size();
        let congestion = &mut self.congestion;
        if delays_over_budget {
            congestion.window /= 2;
        } else if congestion.count >= ENOUGH {
            let ratio = congestion.ratios / u64::from(congestion.count);
            // By default a write may take a third longer; a little less leaves the window as it is.
            let (bearable, good) =
                if self.config.asked_budget.is_none() { (341, 315) } else { (u64::MAX, u64::MAX) };
            if ratio > bearable {
                let factor = (bearable * 256 / ratio).max(64);
                congestion.window = congestion.window.saturating_mul(factor) / 256;
            } else if u64::from(congestion.over) * 100 > u64::from(congestion.count) {
                congestion.window /= 2;
            } else if ratio < good {
                congestion.window += congestion.window / 2;
            }
        } else {
            return;
        }
        congestion.window = congestion.window.clamp(least, most.max(least));
        (congestion.ratios, congestion.count, congestion.over) = (0, 0, 0);
    }

    /// The most operations that may be under way: rather few large ones than many small ones, because some
    /// devices count bytes and some count requests.
    pub(super) fn depth(&self) -> usize {
        let most = self.config.max_in_flight;
        let Some(writes) = self.active_writes() else { return most };
        if self.is_at_minimum() {
            return 1;
        }
        let fit = usize::try_from(self.congestion.window / self.config.operation).unwrap_or(usize::MAX);
        // Not knowing better, leave the guest two places of three on a device that serves one request after
        // another.
        let known = self.congestion.baseline[usize::from(self.is_blocking())].is_some();
        let places = if known { most } else { writes / 2 };
        most.min(places.min(fit).max(MIN_DEPTH))
    }

    /// The most bytes of one copy, as far as the window is concerned.
    pub(super) fn share_of_window(&self) -> u64 {
        if self.active_writes().is_none() {
            return u64::MAX;
        }
        (self.congestion.window / self.depth() as u64).max(self.min_copy_size())
    }

    /// The most writes that the guest has had under way lately, if there is a budget to mind for it.
    fn active_writes(&self) -> Option<usize> {
        let writes = self.budget.peak();
        (self.config.latency_budget().is_some() && writes > 0 && !self.quiesced).then_some(writes)
    }

    /// Smaller copies are of no use to anybody.
    pub(super) fn min_copy_size(&self) -> u64 {
        MIN_COPY.max(self.config.zero_unit).min(self.config.operation)
    }

    /// Whether the job does as little as it can for the guest's sake.
    pub(super) fn is_at_minimum(&self) -> bool {
        self.congestion.window <= self.min_copy_size()
    }
}

#[cfg(test)]
mod tests;
