//! Rate sampler: totals of what the job has done and of the work that the guest has made, over a sliding
//! window.
//!
//! Figures for users and the decisions of auto mode come from the same samples. Pure: time is an argument,
//! memory is bounded. Must hold: samples are in order of time; one is older than the window, which begins
//! between it and the next.

use std::collections::VecDeque;
use std::time::Duration;

/// The window that rates are taken over.
const WINDOW: Duration = Duration::from_secs(2);
/// Samples are at least this far apart, so that there are few.
pub(super) const STEP: Duration = Duration::from_millis(50);
/// No rate is taken over less.
const SHORTEST: Duration = Duration::from_millis(250);

/// What has been counted since the start, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::machine) struct Totals {
    /// Dealt with by the job.
    pub(in crate::machine) done: u64,
    /// Made dirty by the guest.
    pub(in crate::machine) dirtied: u64,
}

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rates {
    pub(super) copy: u64,
    pub(super) dirty: u64,
}

impl Rates {
    /// Whether the guest makes work about as fast as the job does it: seven eighths are too much, as the last
    /// eighth would take for ever. False while none is made, or nothing is done at all.
    pub(super) fn keep_even(self) -> bool {
        let (copy, dirty) = (u128::from(self.copy), u128::from(self.dirty));
        copy > 0 && dirty * 8 >= copy * 7
    }

    /// How long until `left` bytes are done, if ever.
    pub(super) fn time_for(self, left: u64) -> Option<Duration> {
        let gain = self.copy.checked_sub(self.dirty).filter(|&gain| gain > 0)?;
        let nanos = u128::from(left) * 1_000_000_000 / u128::from(gain);
        Some(Duration::from_nanos_u128(nanos))
    }
}

#[derive(Debug, Default)]
pub(super) struct RateSampler {
    samples: VecDeque<(Duration, Totals)>,
}

impl RateSampler {
    /// The totals at `now`; kept if the last ones are old enough. Whether they were.
    pub(super) fn sample(&mut self, now: Duration, totals: Totals) -> bool {
        if self.samples.back().is_some_and(|(last, _)| now.saturating_sub(*last) < STEP) {
            return false;
        }
        self.samples.push_back((now, totals));
        // One that is older than the window stays: the window begins between it and the next.
        while self.samples.get(1).is_some_and(|(second, _)| now.saturating_sub(*second) >= WINDOW) {
            self.samples.pop_front();
        }
        true
    }

    /// The rates at `now`, over the window, or since `mark` if that is later; `None` before that is long
    /// enough ago.
    pub(super) fn rates(&self, now: Duration, totals: Totals, mark: Duration) -> Option<Rates> {
        let from = mark.max(now.saturating_sub(WINDOW + STEP));
        let first = self.samples.iter().find(|(at, _)| *at >= from);
        // No sample was taken for longer than the window: the last one will do.
        let last = || self.samples.back().filter(|(at, _)| *at >= mark);
        let (at, before) = first.or_else(last)?;
        let span = now.checked_sub(*at).filter(|&span| span >= SHORTEST)?;
        let rate = |now: u64, before: u64| {
            let nanos = u128::from(now.saturating_sub(before)) * 1_000_000_000 / span.as_nanos().max(1);
            u64::try_from(nanos).unwrap_or(u64::MAX)
        };
        Some(Rates { copy: rate(totals.done, before.done), dirty: rate(totals.dirtied, before.dirtied) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn steady(sampler: &mut RateSampler, from: u64, to: u64, copy: u64, dirty: u64, start: Totals) -> Totals {
        let mut totals = start;
        for at in from..to {
            sampler.sample(ms(at), totals);
            totals.done += copy / 1000;
            totals.dirtied += dirty / 1000;
        }
        totals
    }

    #[test]
    fn rates_are_those_of_the_window_and_old_times_are_forgotten() {
        let mut sampler = RateSampler::default();
        let totals = steady(&mut sampler, 0, 5000, 10_000, 1000, Totals::default());
        assert_eq!(sampler.rates(ms(5000), totals, ms(0)), Some(Rates { copy: 10_000, dirty: 1000 }));
        assert!(sampler.samples.len() <= 42, "{}", sampler.samples.len());
        let totals = steady(&mut sampler, 5000, 8000, 2000, 4000, totals);
        assert_eq!(sampler.rates(ms(8000), totals, ms(0)), Some(Rates { copy: 2000, dirty: 4000 }));
    }

    #[test]
    fn too_short_a_time_tells_nothing_and_a_mark_cuts_what_came_before() {
        let mut sampler = RateSampler::default();
        let totals = steady(&mut sampler, 0, 1000, 8000, 0, Totals::default());
        let totals = steady(&mut sampler, 1000, 1200, 1000, 3000, totals);
        assert_eq!(sampler.rates(ms(1200), totals, ms(1000)), None);
        let totals = steady(&mut sampler, 1200, 1500, 1000, 3000, totals);
        assert_eq!(sampler.rates(ms(1500), totals, ms(1000)), Some(Rates { copy: 1000, dirty: 3000 }));
    }

    #[test]
    fn a_long_time_without_a_look_still_has_a_rate() {
        let mut sampler = RateSampler::default();
        let totals = steady(&mut sampler, 0, 1000, 8000, 0, Totals::default());
        let later = Totals { done: totals.done + 1_000_000, dirtied: 500_000 };
        let rates = sampler.rates(ms(100_950), later, ms(0)).unwrap();
        assert_eq!(rates.dirty, 5000);
    }

    #[test]
    fn even_is_seven_eighths() {
        assert!(Rates { copy: 8000, dirty: 7000 }.keep_even());
        assert!(!Rates { copy: 8000, dirty: 6999 }.keep_even());
        assert!(
            !Rates { copy: 0, dirty: 10 }.keep_even(),
            "a job that stands still is not helped by more work"
        );
        assert!(!Rates { copy: 0, dirty: 0 }.keep_even());
        assert_eq!(Rates { copy: 3000, dirty: 1000 }.time_for(4000), Some(Duration::from_secs(2)));
        assert_eq!(Rates { copy: 1000, dirty: 1000 }.time_for(1), None);
        assert_eq!(Rates { copy: u64::MAX, dirty: 0 }.time_for(u64::MAX), Some(Duration::from_secs(1)));
    }
}
