//! Auto mode: when the target gets guest writes at once, and when later.
//!
//! A job in auto mode begins in background, because write-blocking gains nothing while the bulk is copied.
//! After the first pass the [rate samples](super::rate_sampler) decide: a guest that makes work as fast as
//! the job does it would keep it from ever being ready, so its writes go through from then on. Dirt then only
//! gets less, and READY is reached. It stays so until the target stalls guest writes; then the job is back in
//! background, for a time that doubles with each stall.
//!
//! A decision is made at each sample, at most twenty times a second. Must hold: two changes are never nearer
//! to each other than the shortest stay; nothing is decided while the job is paused or ends.

use std::time::Duration;

use super::rate_sampler::Totals;
use super::{Pacing, RateSampler};
use crate::machine::config::Config;
use crate::options::CopyMode;
use crate::progress::{Convergence, Event, ModeReason};

/// Decisions are made from rates over this.
const LOOK_BACK: Duration = Duration::from_secs(1);
/// The shortest stay in background after a stall; doubles with each further one.
const FIRST_STAY: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_STAY: Duration = Duration::from_secs(32);
/// Once writes have gone through for so long, earlier stalls are forgotten.
const FORGIVEN: Duration = Duration::from_secs(30);
/// The shortest stay in write-blocking, unless one write stalls.
const SHORTEST_STAY: Duration = Duration::from_secs(1);
/// One write that waits for the target for so many latency budgets is a stall by itself.
const STALL: u32 = 10;

/// What auto mode has decided.
#[derive(Debug, Default)]
pub(super) struct Auto {
    /// Guest writes go to the target at once.
    through: bool,
    /// Begin of the present phase: the end of the first pass, a change of mode, or the end of a pause.
    /// Samples from before do not count.
    mark: Duration,
    /// Writes do not go through before this.
    not_before: Duration,
    /// Stalls in a row.
    stalls: u32,
    /// At the last sample the job was in its first pass, paused, or at its end: there was nothing to decide.
    suspended: bool,
}

impl Auto {
    /// Auto mode as it begins at `now`.
    pub(super) fn starting(through: bool, now: Duration) -> Self {
        Self { through, mark: now, ..Self::default() }
    }

    pub(super) fn is_through(&self) -> bool {
        self.through
    }
}

/// What a decision is made from, besides rates.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct Situation {
    pub(in crate::machine) now: Duration,
    pub(in crate::machine) totals: Totals,
    /// Bytes left.
    pub(in crate::machine) work_left: u64,
    pub(in crate::machine) has_been_ready: bool,
    /// How long the guest write that waits longest for the target has done so.
    pub(in crate::machine) longest_target_wait: Duration,
}

/// The rates shown to users.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct Outlook {
    pub(in crate::machine) copy_rate: u64,
    pub(in crate::machine) dirty_rate: u64,
    pub(in crate::machine) convergence: Convergence,
    pub(in crate::machine) eta: Option<Duration>,
}

impl Pacing {
    /// Whether auto mode may decide at this sample: not while it is `suspended`, by what the job does.
    pub(in crate::machine) fn may_decide(&mut self, now: Duration, suspended: bool) -> bool {
        if suspended || self.auto.suspended {
            self.auto.mark = now;
        }
        self.auto.suspended = suspended;
        !suspended
    }

    /// Decides; the event if the mode changes.
    pub(in crate::machine) fn decide(&mut self, config: &Config, situation: &Situation) -> Option<Event> {
        let reason = match self.auto.through {
            true => self.target_stalls(config, situation)?,
            false => does_not_converge(&self.auto, &self.sampler, config, situation)?,
        };
        let now = situation.now;
        if self.auto.through {
            if now.saturating_sub(self.auto.mark) >= FORGIVEN {
                self.auto.stalls = 0;
            }
            let stay = FIRST_STAY.saturating_mul(1 << self.auto.stalls.min(10)).min(LONGEST_STAY);
            self.auto.stalls += 1;
            self.auto.not_before = now.saturating_add(stay);
        }
        self.auto.through = !self.auto.through;
        self.auto.mark = now;
        self.congestion.reset_baseline(now);
        let mode = if self.auto.through { CopyMode::WriteBlocking } else { CopyMode::Background };
        Some(Event::CopyMode { mode, reason })
    }

    /// Why guest writes must not go through any longer, if so.
    fn target_stalls(&self, config: &Config, situation: &Situation) -> Option<ModeReason> {
        let budget = config.latency_budget()?;
        let bound = budget.saturating_mul(STALL);
        let delay = situation.longest_target_wait;
        if delay > bound {
            return Some(ModeReason::TargetStalls { delay, bound });
        }
        if situation.now.saturating_sub(self.auto.mark) < SHORTEST_STAY
            || !self.congestion.is_at_minimum(config)
        {
            return None;
        }
        // The job takes as little as it can, and delays are over the budget all the same.
        self.budget.p99_over_budget().map(|delay| ModeReason::TargetStalls { delay, bound: budget })
    }

    /// The rates at `now` for a job with `left` bytes left; `stands`: it is paused, or over.
    pub(in crate::machine) fn outlook(
        &self,
        now: Duration,
        totals: Totals,
        left: u64,
        stands: bool,
    ) -> Outlook {
        // The rate of the bulk says nothing about dirt.
        let since = if self.auto.suspended { Duration::ZERO } else { self.auto.mark };
        let rates = self.sampler.rates(now, totals, since);
        let (copy_rate, dirty_rate) = rates.map_or((0, 0), |rates| (rates.copy, rates.dirty));
        let (convergence, eta) = match rates {
            _ if left == 0 && !stands => (Convergence::Equal, Some(Duration::ZERO)),
            Some(rates) if !stands => match rates.time_for(left) {
                Some(eta) => (Convergence::Converging, Some(eta)),
                None => (Convergence::NotConverging, None),
            },
            _ => (Convergence::Unknown, None),
        };
        Outlook { copy_rate, dirty_rate, convergence, eta }
    }
}

/// Why guest writes have to go through, if they have to. A job that is ready may stay a little behind: only
/// what is too much to be copied while the guest is quiesced counts.
fn does_not_converge(
    auto: &Auto,
    sampler: &RateSampler,
    config: &Config,
    situation: &Situation,
) -> Option<ModeReason> {
    let &Situation { now, totals, work_left: left, has_been_ready, .. } = situation;
    let tolerable = if has_been_ready { config.operation } else { 0 };
    if left <= tolerable || now < auto.not_before {
        return None;
    }
    let since = auto.mark.max(now.saturating_sub(LOOK_BACK));
    let rates = sampler.rates(now, totals, since)?;
    rates.keep_even().then_some(ModeReason::NotConverging {
        left,
        dirty_rate: rates.dirty,
        copy_rate: rates.copy,
    })
}

#[cfg(test)]
mod tests;
