//! Congestion control: sizes the job's window (bytes in flight) so that guest writes take at most 4/3 of
//! their baseline latency, or the latency budget if one was asked for.
//!
//! The baseline is probed: every 5 s the job goes idle for at most 50 ms and samples guest writes (cf.
//! ProbeRTT in BBR). Afterwards the window shrinks while writes take longer than they may, and grows while
//! they do not. A guest that always has the same number of writes in flight keeps three quarters of its
//! throughput, if the devices can be shared that way at all.
//!
//! Must hold: a probe is bounded in time; without guest writes, or without a budget, the job is not delayed.

use std::time::Duration;

use crate::machine::config::Config;

/// From one probe to the next.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// Longest probe, the drain of what was in flight when it began included.
pub(super) const MAX_PROBE: Duration = Duration::from_millis(50);
/// Samples that end a probe.
pub(super) const ENOUGH: u32 = 32;
/// Samples that a baseline needs.
const FEW: u32 = 4;
/// Window when guest writes are first seen.
const INITIAL_WINDOW: u64 = 1 << 20;
/// Operations in flight are not fewer, unless the window is as small as one.
const MIN_DEPTH: usize = 2;

/// Latency of guest writes without the job.
#[derive(Clone, Copy, Debug, Default)]
struct Baseline {
    mean: Duration,
    worst: Duration,
}

/// Samples of a probe.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    sum: Duration,
    worst: Duration,
    count: u32,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    until: Duration,
    /// Since when no data operation has been in flight.
    idle_since: Option<Duration>,
    /// Since when the queues of the devices are the guest's alone: the first write after that has finished.
    settled: Option<Duration>,
    tally: Tally,
    /// The writes that are sampled go to source and target.
    both: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct CongestionWindow {
    window: u64,
    /// Of writes to the source, and of writes to both.
    baseline: [Option<Baseline>; 2],
    /// Sum of the latencies since the last adjustment, in 256ths of the baseline, and their number.
    ratios: u64,
    count: u32,
    /// Those of them that were over the budget.
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
    /// The devices are used in another way from now on: the next guest write starts a probe.
    pub(super) fn reset_baseline(&mut self, now: Duration) {
        self.next_probe = now;
    }

    /// Starts a probe if one is due. `job_idle`: no data operation is in flight.
    pub(super) fn start_probe(&mut self, now: Duration, both: bool, job_idle: bool) {
        if self.probe.is_some() || now < self.next_probe {
            return;
        }
        self.next_probe = now.saturating_add(PROBE_INTERVAL);
        self.probe = Some(Probe {
            until: now.saturating_add(MAX_PROBE),
            idle_since: job_idle.then_some(now),
            settled: None,
            tally: Tally::default(),
            both,
        });
    }

    /// No data operation is in flight.
    pub(super) fn job_idle(&mut self, now: Duration) {
        if let Some(probe) = &mut self.probe {
            probe.idle_since.get_or_insert(now);
        }
    }

    pub(super) fn probe_until(&self) -> Option<Duration> {
        self.probe.map(|probe| probe.until)
    }

    /// Ends a probe whose time is over or that has its samples; whether it did.
    pub(super) fn end_probe(&mut self, now: Duration) -> bool {
        let Some(probe) = self.probe else { return false };
        if now < probe.until && probe.tally.count < ENOUGH {
            return false;
        }
        self.probe = None;
        if probe.tally.count >= FEW {
            let mean = probe.tally.sum / probe.tally.count;
            self.baseline[usize::from(probe.both)] = Some(Baseline { mean, worst: probe.tally.worst });
        }
        true
    }

    /// A guest write that was admitted at `admitted` has finished, at the source or at `both`.
    pub(super) fn guest_ended(&mut self, config: &Config, now: Duration, admitted: Duration, both: bool) {
        let Some(budget) = config.latency_budget() else { return };
        let time = now.saturating_sub(admitted);
        if let Some(probe) = &mut self.probe {
            if probe.both != both || probe.idle_since.is_none_or(|since| since > admitted) {
                // An operation of the job was in flight when it began.
            } else if *probe.settled.get_or_insert(now) <= admitted {
                probe.tally.count += 1;
                probe.tally.sum += time;
                probe.tally.worst = probe.tally.worst.max(time);
            }
        } else if let Some(baseline) = self.baseline[usize::from(both)] {
            let ratio = time.as_nanos().saturating_mul(256) / baseline.mean.as_nanos().max(1);
            self.ratios += u64::try_from(ratio).unwrap_or(u64::MAX).min(1 << 20);
            self.count += 1;
            self.over += u32::from(time > baseline.worst.saturating_add(budget));
        }
    }

    /// A step has passed: the window follows from the latencies in it.
    pub(super) fn adjust(&mut self, config: &Config, delays_over_budget: bool) {
        let most = config.operation.saturating_mul(config.max_in_flight as u64);
        let least = config.min_copy_size();
        if delays_over_budget {
            self.window /= 2;
        } else if self.count >= ENOUGH {
            let ratio = self.ratios / u64::from(self.count);
            // By default a write may take a third longer; a little less leaves the window as it is.
            let (tolerable, good) =
                if config.asked_budget.is_none() { (341, 315) } else { (u64::MAX, u64::MAX) };
            if ratio > tolerable {
                let factor = (tolerable * 256 / ratio).max(64);
                self.window = self.window.saturating_mul(factor) / 256;
            } else if u64::from(self.over) * 100 > u64::from(self.count) {
                self.window /= 2;
            } else if ratio < good {
                self.window += self.window / 2;
            }
        } else {
            return;
        }
        self.window = self.window.clamp(least, most.max(least));
        (self.ratios, self.count, self.over) = (0, 0, 0);
    }

    /// The maximum number of operations in flight while the guest has had up to `writes` under way: rather
    /// few large ones than many small ones, because some devices count bytes and some count requests.
    pub(super) fn depth(&self, config: &Config, writes: usize, both: bool) -> usize {
        let most = config.max_in_flight;
        if self.is_at_minimum(config) {
            return 1;
        }
        let fit = usize::try_from(self.window / config.operation).unwrap_or(usize::MAX);
        // Without a baseline, leave the guest two places of three on a device that serves one request after
        // another.
        let known = self.baseline[usize::from(both)].is_some();
        let places = if known { most } else { writes / 2 };
        most.min(places.min(fit).max(MIN_DEPTH))
    }

    /// The maximum size of one copy of `depth` in flight.
    pub(super) fn share(&self, config: &Config, depth: usize) -> u64 {
        (self.window / depth as u64).max(config.min_copy_size())
    }

    /// Whether the job takes as little of the devices as it can.
    pub(super) fn is_at_minimum(&self, config: &Config) -> bool {
        self.window <= config.min_copy_size()
    }
}

#[cfg(test)]
mod tests;
