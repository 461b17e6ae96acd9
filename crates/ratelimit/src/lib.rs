//! Bytes per second, in slices of 100 ms, as a pure function of time.
//!
//! The copy engine of a mirror job and the throttle device account every operation that moves data here and
//! are given the time to wait before the next one. The clock is an argument (a [`Duration`] since any fixed
//! instant), so the same code runs under a real clock, a simulator and a model checker. Nothing is ever
//! refused: an operation larger than the quota pays for it by the wait that follows.
//!
//! Two things keep the mean exact. A slice is stretched to precisely the time that its bytes are worth; and
//! the next slice starts where the previous one *ended*, not when the caller happened to wake, unless that is
//! a whole slice ago or more (an idle spell earns at most one slice of credit).
//!
//! ```
//! use std::time::Duration;
//! use blockmirror_ratelimit::RateLimiter;
//!
//! let mut limiter = RateLimiter::new(10_000_000);
//! let start = Duration::ZERO;
//! assert_eq!(limiter.quota(), 1_000_000);
//! assert_eq!(limiter.account(start, 900_000), Duration::ZERO);
//! // 1.5 MB in all: the slice lasts 150 ms.
//! assert_eq!(limiter.account(start, 600_000), Duration::from_millis(150));
//! ```

#![forbid(unsafe_code)]

use std::time::Duration;

/// The length of a slice that is not stretched.
pub const SLICE: Duration = Duration::from_millis(100);

const NANOS_PER_SEC: u128 = 1_000_000_000;

/// Tells how long to wait so that the mean stays at a given speed.
///
/// Not a lock and not a clock: the owner brings both. Calls with a `now` earlier than a previous one are
/// taken as if no time had passed.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    /// Bytes per second; 0 is unlimited.
    speed: u64,
    /// Start of the present slice.
    start: Duration,
    /// End of the present slice, stretched by what was dispatched in it.
    end: Duration,
    /// Bytes accounted in the present slice.
    dispatched: u64,
    /// The slice takes nothing more, although its quota is not used up.
    closed: bool,
}

impl RateLimiter {
    /// A limiter at `speed` bytes per second; 0 means unlimited.
    pub const fn new(speed: u64) -> Self {
        Self { speed, start: Duration::ZERO, end: Duration::ZERO, dispatched: 0, closed: false }
    }

    /// Bytes per second; 0 means unlimited.
    pub const fn speed(&self) -> u64 {
        self.speed
    }

    /// Bytes that may pass in one slice without waiting, at least 1; `u64::MAX` if unlimited.
    ///
    /// Callers clip single operations to this (or to their own smallest unit if that is larger), so that no
    /// burst is longer than a slice.
    pub fn quota(&self) -> u64 {
        if self.speed == 0 {
            return u64::MAX;
        }
        let bytes = u128::from(self.speed) * SLICE.as_nanos() / NANOS_PER_SEC;
        u64::try_from(bytes).unwrap_or(u64::MAX).max(1)
    }

    /// Accounts `bytes` that are moved at `now`; returns how long to wait before the next operation.
    ///
    /// Operations that move no data (zeroing, discarding) are not accounted.
    pub fn account(&mut self, now: Duration, bytes: u64) -> Duration {
        if self.speed == 0 {
            return Duration::ZERO;
        }
        if now >= self.end {
            self.begin_slice(now);
        }
        self.dispatched = self.dispatched.saturating_add(bytes);
        if self.closed || self.over_quota() {
            self.end = self.start.saturating_add(self.worth(self.dispatched));
        }
        self.delay(now)
    }

    /// Bytes that still pass at `now` without a wait, and without the slice being stretched; `u64::MAX` if
    /// unlimited.
    pub fn room(&self, now: Duration) -> u64 {
        if self.speed == 0 || now >= self.end {
            return self.quota();
        }
        if self.closed { 0 } else { self.quota().saturating_sub(self.dispatched) }
    }

    /// Ends the present slice early, after precisely the time that its bytes are worth: for callers whose
    /// next operation is larger than the [`room`](Self::room) left and who would rather wait than burst.
    /// Returns the wait.
    pub fn close_slice(&mut self, now: Duration) -> Duration {
        if self.speed != 0 && now < self.end && !self.closed && !self.over_quota() {
            self.closed = true;
            self.end = self.start.saturating_add(self.worth(self.dispatched));
        }
        self.delay(now)
    }

    /// How long to wait, as seen from `now`, before the next operation. A sleeper that was woken early asks
    /// again.
    pub fn delay(&self, now: Duration) -> Duration {
        if self.closed || self.over_quota() { self.end.saturating_sub(now) } else { Duration::ZERO }
    }

    /// How long to wait, as seen from `now`, so that the slice is spent evenly and not at its beginning: for
    /// callers who would rather not keep others from the devices for a while in each slice. What is left of a
    /// slice after three quarters of it need not wait, so that nothing is lost by waking late.
    pub fn even_delay(&self, now: Duration) -> Duration {
        if self.speed == 0 || now >= self.end {
            return Duration::ZERO;
        }
        self.start.saturating_add(self.worth(self.dispatched) / 4 * 3).saturating_sub(now)
    }

    /// Changes the speed at `now`. Time already waited counts at the old speed; what is still owed is paid at
    /// the new one. A thread that sleeps on an earlier answer should be woken and ask for
    /// [`delay`](Self::delay).
    pub fn set_speed(&mut self, now: Duration, speed: u64) {
        let owed = if self.speed == 0 || now >= self.end { 0 } else { self.owed(now) };
        self.speed = speed;
        self.start = now;
        self.end = now;
        self.dispatched = 0;
        self.closed = false;
        if speed != 0 && owed != 0 {
            self.end = now.saturating_add(SLICE);
            self.account(now, owed);
        }
    }

    fn begin_slice(&mut self, now: Duration) {
        let late = now.saturating_sub(self.end);
        self.start = if late < SLICE { self.end } else { now };
        self.end = self.start.saturating_add(SLICE);
        self.dispatched = 0;
        self.closed = false;
    }

    fn over_quota(&self) -> bool {
        self.speed != 0 && self.dispatched >= self.quota()
    }

    /// The time that `bytes` take at the present speed, rounded up to a nanosecond.
    fn worth(&self, bytes: u64) -> Duration {
        let nanos = (u128::from(bytes) * NANOS_PER_SEC).div_ceil(u128::from(self.speed.max(1)));
        Duration::from_nanos_u128(nanos)
    }

    /// Bytes of this slice that the time since its start has not paid for.
    fn owed(&self, now: Duration) -> u64 {
        let paid =
            now.saturating_sub(self.start).as_nanos().saturating_mul(u128::from(self.speed)) / NANOS_PER_SEC;
        self.dispatched.saturating_sub(u64::try_from(paid).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests;
