//! Auto mode: when the target gets what the guest writes at once, and when later.
//!
//! A job in auto mode begins in background, because a guest that waits for the target while the bulk is
//! copied gains nothing by it. After the first pass the samples of the [`meter`](super::rate_sampler) decide: a
//! guest that makes work as fast as the job does it would keep it from ever being ready, so its writes go
//! through from then on. What is dirty then only gets less, and READY is reached. It stays so until the
//! target makes the guest wait too long; then the job is back in background, for a time that doubles with
//! each such stall.
//!
//! The core asks at each sample, so at most twenty times a second. What must hold: no two changes are nearer
//! to each other than the shortest stay; nothing is decided while the job is paused or ends.

use std::time::Duration;

use blockmirror_block::ByteRange;

use super::{Core, Phase, Work};
use crate::options::CopyMode;
use crate::progress::{Convergence, Event, ModeReason};

/// Decisions look at rates over this.
const LOOK_BACK: Duration = Duration::from_secs(1);
/// The shortest stay in background after a stall; doubles with each further one.
const FIRST_STAY: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_STAY: Duration = Duration::from_secs(32);
/// Once writes have gone through for so long, earlier stalls are forgotten.
const FORGIVEN: Duration = Duration::from_secs(30);
/// Counting what is left looks at so many pieces one by one.
const MAX_COUNTED: usize = 512;
/// Unless it stands still, the target gets so much time to show what it can do.
const SHORTEST_STAY: Duration = Duration::from_secs(1);
/// One write that waits for the target for so many latency budgets is a stall by itself.
const STALL: u32 = 10;

/// What a job in auto mode has decided.
#[derive(Debug, Default)]
pub(super) struct Auto {
    /// The guest's writes go through.
    through: bool,
    /// Where the present stretch of time began: with the end of the first pass, a change of mode, or the end
    /// of a pause. Samples from before say nothing about now.
    mark: Duration,
    /// Writes do not go through before this.
    not_before: Duration,
    /// Stalls in a row.
    stalls: u32,
    /// There was nothing to decide when it was last looked at: the first pass, a pause, the end.
    elsewhere: bool,
}

impl Core {
    /// Time has come to `now`; takes a sample and thinks about the copy mode when it is time to. Whether
    /// anything was changed that waiting threads should know.
    pub(crate) fn tick(&mut self, now: Duration) -> bool {
        self.clock = self.clock.max(now);
        let may_go_on = self.end_probe();
        if !self.sampler.note(self.clock, self.counters.totals()) {
            return may_go_on;
        }
        self.step_budget();
        self.decide() || may_go_on
    }

    /// Whether the target gets the guest's writes at once, by what was asked and what was decided.
    pub(super) fn mode_is_through(&self) -> bool {
        match self.config.copy_mode {
            CopyMode::Background => false,
            CopyMode::WriteBlocking => true,
            CopyMode::Auto => self.auto.through,
        }
    }

    /// Another mode was asked for. Auto mode begins with how things are.
    pub(super) fn mode_asked(&mut self, mode: CopyMode) {
        self.auto = Auto { through: self.mode_is_through(), mark: self.clock, ..Auto::default() };
        self.config.copy_mode = mode;
    }

    fn decide(&mut self) -> bool {
        let stands =
            self.is_paused() || self.quiesced || self.is_ending() || !matches!(self.phase, Phase::Running);
        let elsewhere = stands || (!self.auto.through && self.in_first_pass());
        if elsewhere || self.auto.elsewhere {
            self.auto.mark = self.clock;
        }
        self.auto.elsewhere = elsewhere;
        if elsewhere || self.config.copy_mode != CopyMode::Auto {
            return false;
        }
        let reason = if self.auto.through { self.target_stalls() } else { self.does_not_converge() };
        let Some(reason) = reason else { return false };
        let now = self.clock;
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
        self.outbox.push(Event::CopyMode { mode, reason });
        true
    }

    /// Whether all of `range` is taken but not begun: what is marked there is copied without more work.
    pub(super) fn is_ahead(&self, range: ByteRange) -> bool {
        let taken = self.in_progress.first_overlap(range).is_some_and(|run| run.contains_range(range));
        taken && !self.in_flight.iter().any(|op| op.moves().overlaps(range))
    }

    /// Bytes left, those that are taken and marked again counted once. (Where very many pieces are taken,
    /// twice.)
    fn work_left(&self) -> u64 {
        if self.in_progress.count() > MAX_COUNTED {
            return self.left();
        }
        let dirty = |range: ByteRange| self.dirty.dirty_bytes_in(range.start()..range.end());
        let taken: u64 = self.in_progress.iter().map(dirty).sum();
        let begun: u64 = self.in_flight.iter().map(|op| dirty(op.moves())).sum();
        self.left().saturating_sub(taken.saturating_sub(begun))
    }

    fn in_first_pass(&self) -> bool {
        self.scans.iter().any(|scan| scan.first_pass)
            || self.queue.iter().any(|queued| queued.first_pass)
            || self.in_flight.iter().any(|op| matches!(op.work, Work::Scan { first_pass: true, .. }))
    }

    /// Why the guest's writes have to go through, if they have to. A job that is ready may stay a little
    /// behind: only what is too much to be copied while the guest is held counts.
    fn does_not_converge(&self) -> Option<ModeReason> {
        let left = self.work_left();
        let bearable = if self.has_been_ready() { self.config.operation } else { 0 };
        if left <= bearable || self.clock < self.auto.not_before {
            return None;
        }
        let since = self.auto.mark.max(self.clock.saturating_sub(LOOK_BACK));
        let rates = self.sampler.rates(self.clock, self.counters.totals(), since)?;
        rates.keep_even().then_some(ModeReason::NotConverging {
            left,
            dirty_rate: rates.dirty,
            copy_rate: rates.copy,
        })
    }

    /// Why the guest's writes must not go through any longer, if so.
    fn target_stalls(&self) -> Option<ModeReason> {
        let budget = self.config.latency_budget()?;
        let bound = budget.saturating_mul(STALL);
        let delay = self.longest_wait_for_target();
        if delay > bound {
            return Some(ModeReason::TargetStalls { delay, bound });
        }
        if self.clock.saturating_sub(self.auto.mark) < SHORTEST_STAY {
            return None;
        }
        self.delay_beyond_help().map(|delay| ModeReason::TargetStalls { delay, bound: budget })
    }

    /// The rates shown to users at `now`: bytes done and made dirty per second, and the estimated end.
    pub(super) fn outlook(&self, now: Duration) -> (u64, u64, Convergence, Option<Duration>) {
        let left = self.work_left();
        // What the bulk was copied at says nothing about dirt.
        let since = if self.auto.elsewhere { Duration::ZERO } else { self.auto.mark };
        let rates = self.sampler.rates(now, self.counters.totals(), since);
        let (copy, dirty) = rates.map_or((0, 0), |rates| (rates.copy, rates.dirty));
        let stands = self.is_paused() || !matches!(self.phase, Phase::Running);
        let (convergence, eta) = match rates {
            _ if left == 0 && !stands => (Convergence::Equal, Some(Duration::ZERO)),
            Some(rates) if !stands => match rates.time_for(left) {
                Some(eta) => (Convergence::Converging, Some(eta)),
                None => (Convergence::NotConverging, None),
            },
            _ => (Convergence::Unknown, None),
        };
        (copy, dirty, convergence, eta)
    }
}

#[cfg(test)]
mod tests;
