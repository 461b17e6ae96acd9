//! Leaky buckets: the arithmetic of throttling. Pure; `now` is an argument.
//!
//! A bucket leaks at its rate, and each request pours in what it costs. A request may go when no bucket of
//! its direction is over its size; it may then fill the bucket beyond, so that an oversize request passes and
//! those after it pay. Without bursts the size is a tenth of a second's worth. With them it is what a whole
//! burst pours in, and a burst longer than a second is itself held to its rate by a second level that leaks
//! at that rate.

use std::time::Duration;

use super::limits::{Rate, ThrottleLimits};

/// Which way data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device.
    Read,
    /// To the device: writes, zeroing, discards.
    Write,
}

impl Direction {
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }

    pub(super) const fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// Seconds' worth that passes at once where no burst is set.
const PLAIN_SECONDS: f64 = 0.1;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    level: f64,
    burst_level: f64,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self { rate, level: 0.0, burst_level: 0.0 }
    }

    fn leak(&mut self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.level = (self.level - self.rate.avg as f64 * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.rate.max as f64 * seconds).max(0.0);
    }

    fn pour(&mut self, units: f64) {
        if self.rate.avg > 0 {
            self.level += units;
            if self.rate.max_length > 1 {
                self.burst_level += units;
            }
        }
    }

    /// Seconds until the next request may go.
    fn wait(&self) -> f64 {
        let (avg, max) = (self.rate.avg as f64, self.rate.max as f64);
        if self.rate.avg == 0 {
            return 0.0;
        }
        let size = if self.rate.max == 0 { avg * PLAIN_SECONDS } else { max * self.rate.max_length as f64 };
        let long_run = (self.level - size).max(0.0) / avg;
        if self.rate.max_length <= 1 {
            return long_run;
        }
        long_run.max((self.burst_level - max * PLAIN_SECONDS).max(0.0) / max)
    }
}

/// All buckets of a group.
#[derive(Clone, Debug)]
pub(super) struct Buckets {
    limits: ThrottleLimits,
    /// As [`ThrottleLimits::rates`] orders them.
    buckets: [Bucket; 6],
    /// When they leaked last.
    leaked: Duration,
}

impl Buckets {
    /// Empty buckets at `now`.
    pub(super) fn new(limits: ThrottleLimits, now: Duration) -> Self {
        Self { limits, buckets: limits.rates().map(Bucket::new), leaked: now }
    }

    pub(super) fn limits(&self) -> ThrottleLimits {
        self.limits
    }

    /// Those that a request in `direction` pours into: total and its own, of bytes and of requests.
    fn of(direction: Direction) -> [usize; 4] {
        let own = 1 + direction.index();
        [0, own, 3, 3 + own]
    }

    /// How long a request in `direction` has to wait at `now`; zero if it may go.
    pub(super) fn delay(&mut self, now: Duration, direction: Direction) -> Duration {
        let elapsed = now.saturating_sub(self.leaked);
        self.leaked = self.leaked.max(now);
        for bucket in &mut self.buckets {
            bucket.leak(elapsed);
        }
        let seconds = Self::of(direction).map(|i| self.buckets[i].wait()).into_iter().fold(0.0, f64::max);
        if seconds <= 0.0 {
            return Duration::ZERO;
        }
        // Rounded up, so that a request that has waited so long may pass.
        let exact = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        exact.saturating_add(Duration::from_nanos(1))
    }

    /// Accounts a request of `bytes` that goes now.
    pub(super) fn account(&mut self, direction: Direction, bytes: u64) {
        let [bytes_total, bytes_own, requests_total, requests_own] = Self::of(direction);
        let size = self.limits.iops_size;
        let requests = if size != 0 && bytes > size { bytes as f64 / size as f64 } else { 1.0 };
        for (i, units) in [
            (bytes_total, bytes as f64),
            (bytes_own, bytes as f64),
            (requests_total, requests),
            (requests_own, requests),
        ] {
            self.buckets[i].pour(units);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sends requests one after another for `seconds` of a virtual clock; returns how many bytes and requests
    /// went.
    fn drive(limits: ThrottleLimits, direction: Direction, bytes: u64, seconds: u64) -> (u64, u64) {
        let mut buckets = Buckets::new(limits, Duration::ZERO);
        let (mut now, mut requests) = (Duration::ZERO, 0u64);
        loop {
            let mut tries = 0;
            loop {
                let delay = buckets.delay(now, direction);
                if delay.is_zero() {
                    break;
                }
                tries += 1;
                assert!(tries <= 2, "waiting as long as the answer says is enough");
                now += delay;
            }
            if now >= Duration::from_secs(seconds) {
                return (requests * bytes, requests);
            }
            buckets.account(direction, bytes);
            requests += 1;
        }
    }

    #[test]
    fn the_long_run_keeps_the_rate() {
        let limits = ThrottleLimits { bps_total: Rate::per_second(1 << 20), ..Default::default() };
        let (bytes, _) = drive(limits, Direction::Read, 4096, 100);
        let ideal = 100u64 << 20;
        assert!(bytes.abs_diff(ideal) <= (1 << 20) / 10 + 4096, "{bytes}");
    }

    #[test]
    fn a_burst_goes_at_its_rate_for_its_length() {
        let limits =
            ThrottleLimits { iops_write: Rate::per_second(100).burst(1000, 5), ..Default::default() };
        let (_, first_seconds) = drive(limits, Direction::Write, 512, 4);
        assert!((4000..=4101).contains(&first_seconds), "{first_seconds}");
        let (_, long) = drive(limits, Direction::Write, 512, 100);
        // The burst fills 5000 units; besides, the bucket leaks all the time.
        assert!((14_900..=15_101).contains(&long), "{long}");
    }

    #[test]
    fn the_other_direction_and_what_is_not_limited_pass() {
        let limits = ThrottleLimits { iops_read: Rate::per_second(1), ..Default::default() };
        let mut buckets = Buckets::new(limits, Duration::ZERO);
        for _ in 0..100 {
            buckets.account(Direction::Read, 1 << 30);
        }
        assert_eq!(buckets.delay(Duration::ZERO, Direction::Write), Duration::ZERO);
        assert!(buckets.delay(Duration::ZERO, Direction::Read) > Duration::from_secs(99));
    }

    #[test]
    fn large_requests_count_as_several_of_the_size() {
        let limits =
            ThrottleLimits { iops_total: Rate::per_second(100), iops_size: 4096, ..Default::default() };
        let (_, requests) = drive(limits, Direction::Read, 40_960, 100);
        assert!((1000..=1003).contains(&requests), "{requests}");
        let (_, requests) = drive(limits, Direction::Read, 512, 10);
        assert!((1000..=1011).contains(&requests), "a small one counts whole: {requests}");
    }

    proptest! {
        #[test]
        fn the_mean_is_kept_for_any_rate_and_size(
            rate in 1_000u64..1_000_000_000,
            bytes in 512u64..(4 << 20),
        ) {
            let limits = ThrottleLimits { bps_read: Rate::per_second(rate), ..Default::default() };
            // Long enough for a few thousand requests at most.
            let seconds = (bytes * 1000 / rate).clamp(1, 100_000);
            let (moved, _) = drive(limits, Direction::Read, bytes, seconds);
            prop_assert!(moved <= rate * seconds + rate / 10 + 2 * bytes);
            prop_assert!(moved + bytes >= rate * seconds);
        }
    }
}
