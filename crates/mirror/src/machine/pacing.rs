//! Pacing: how fast the job goes, how large its operations are, and when guest writes go to the target at
//! once.
//!
//! It owns the speed limit, the rate samples, auto mode's decisions, the latency budget, the congestion
//! window and the size of zeroing operations; nothing here knows which ranges are copied. The scheduler asks
//! for sizes, depth and delays; completions and guest writes report what things took. Pure: time is an
//! argument.

mod auto;
mod budget;
mod congestion;
mod rate_sampler;
mod zeroing;

use std::time::Duration;

use blockmirror_block::ByteRange;
use blockmirror_ratelimit::RateLimiter;

use super::config::{Config, floor_power_of_two};
use crate::options::CopyMode;
use auto::Auto;
pub(super) use auto::{Outlook, Situation};
use budget::Budget;
use congestion::CongestionWindow;
use rate_sampler::RateSampler;
pub(super) use rate_sampler::Totals;
use zeroing::Zeroing;

/// With a speed limit, a slice is spent in at least so many operations if the granularity allows.
const OPERATIONS_PER_SLICE: u64 = 64;

/// What pacing has to know of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GuestState {
    /// Its writes go to the target at once.
    pub(super) writes_through: bool,
    /// None of its writes is admitted.
    pub(super) quiesced: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Pacing {
    limiter: RateLimiter,
    sampler: RateSampler,
    auto: Auto,
    budget: Budget,
    congestion: CongestionWindow,
    zeroing: Zeroing,
    /// The target has shown that it cannot zero without writing.
    zero_by_data: bool,
}

impl Pacing {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            limiter: RateLimiter::new(config.speed),
            sampler: RateSampler::default(),
            auto: Auto::default(),
            budget: Budget::new(config.operation),
            congestion: CongestionWindow::default(),
            zeroing: Zeroing::new(config.latency_budget()),
            zero_by_data: !config.zero_by_metadata,
        }
    }

    /// Takes a sample of the totals if the last one is old enough, and with it a step: the congestion window
    /// follows. `writes` guest writes are under way. Whether a sample was taken.
    pub(super) fn step(&mut self, config: &Config, now: Duration, totals: Totals, writes: usize) -> bool {
        if !self.sampler.sample(now, totals) {
            return false;
        }
        let over_budget = self.budget.step(writes);
        self.congestion.adjust(config, over_budget);
        true
    }

    /// The speed limit is another one.
    pub(super) fn set_speed(&mut self, now: Duration, bytes_per_second: u64) {
        self.limiter.set_speed(now, bytes_per_second);
    }

    /// How long the speed limit delays the next operation.
    pub(super) fn delay(&mut self, now: Duration) -> Duration {
        self.limiter.delay(now)
    }

    /// How long it delays a copy of `bytes`.
    pub(super) fn copy_delay(&mut self, now: Duration, bytes: u64) -> Duration {
        let mut delay = self.limiter.delay(now);
        let room = self.limiter.room(now);
        if bytes > room && room < self.limiter.quota() {
            // The next slice instead of a burst beyond this one.
            delay = self.limiter.close_slice(now);
        }
        // Evenly spread, because the guest meets one copy with less delay than many at once.
        delay.max(self.limiter.even_delay(now))
    }

    /// A copy of `bytes` begins that the limit is for.
    pub(super) fn account(&mut self, now: Duration, bytes: u64) {
        self.limiter.account(now, bytes);
    }

    /// The maximum size of a copy that begins at `start`; `limited`: by the speed limit, too.
    pub(super) fn copy_size(
        &self,
        config: &Config,
        now: Duration,
        start: u64,
        guest: GuestState,
        limited: bool,
    ) -> u64 {
        let step = if limited { self.limited_size(config, now) } else { config.operation };
        let share = self.share_of_window(config, guest);
        floor_power_of_two(step.min(share).min(self.max_copy_size(config, start, guest)))
    }

    fn limited_size(&self, config: &Config, now: Duration) -> u64 {
        let share = (self.limiter.quota() / OPERATIONS_PER_SLICE).min(self.limiter.room(now));
        // A coarse granularity is no lower bound of a copy.
        let least = config.granularity.min(config.min_copy_size());
        floor_power_of_two(share).max(least).min(config.operation)
    }

    /// The size of a copy that begins at `start`, as far as the latency budget is concerned.
    fn max_copy_size(&self, config: &Config, start: u64, guest: GuestState) -> u64 {
        if !guest.writes_through || guest.quiesced {
            return config.operation;
        }
        self.budget.max_copy_size(config, start)
    }

    /// A guest write to `range` asks for admission, the last of `writes`.
    pub(super) fn guest_begins(&mut self, config: &Config, range: ByteRange, writes: usize) {
        self.budget.guest_begins(config, range, writes);
    }

    /// A guest write that was admitted at `admitted` has finished; `both`: at source and target.
    pub(super) fn guest_ended(&mut self, config: &Config, now: Duration, admitted: Duration, both: bool) {
        self.congestion.guest_ended(config, now, admitted, both);
    }

    /// The job has added `delay` to a guest write.
    pub(super) fn guest_delayed(&mut self, config: &Config, delay: Duration) {
        self.budget.guest_delayed(config, delay);
    }

    /// The p99 of the delays of the latest guest writes.
    pub(super) fn guest_delay(&self) -> Option<Duration> {
        self.budget.p99()
    }

    /// A copy of `bytes` took `time`.
    pub(super) fn copied(&mut self, config: &Config, bytes: u64, time: Duration) {
        self.budget.copied(config, bytes, time);
    }

    /// The maximum number of operations in flight.
    pub(super) fn depth(&self, config: &Config, guest: GuestState) -> usize {
        match self.active_writes(config, guest) {
            Some(writes) => self.congestion.depth(config, writes, guest.writes_through),
            None => config.max_in_flight,
        }
    }

    /// The maximum size of one copy, as far as the congestion window is concerned.
    fn share_of_window(&self, config: &Config, guest: GuestState) -> u64 {
        if self.active_writes(config, guest).is_none() {
            return u64::MAX;
        }
        self.congestion.share(config, self.depth(config, guest))
    }

    /// The peak of guest writes under way lately, if there is a latency budget to respect.
    fn active_writes(&self, config: &Config, guest: GuestState) -> Option<usize> {
        let writes = self.budget.peak();
        (config.latency_budget().is_some() && writes > 0 && !guest.quiesced).then_some(writes)
    }

    /// A guest write begins: starts a probe if one is due. `job_idle`: no data operation is in flight.
    pub(super) fn start_probe(&mut self, config: &Config, now: Duration, both: bool, job_idle: bool) {
        if config.latency_budget().is_some() {
            self.congestion.start_probe(now, both, job_idle);
        }
    }

    /// No data operation is in flight.
    pub(super) fn job_idle(&mut self, now: Duration) {
        self.congestion.job_idle(now);
    }

    /// Ends a probe whose time is over; whether it did.
    pub(super) fn end_probe(&mut self, now: Duration) -> bool {
        self.congestion.end_probe(now)
    }

    /// No operation begins before this, because a probe goes on.
    pub(super) fn probe_until(&self) -> Option<Duration> {
        self.congestion.probe_until()
    }

    /// Whether the target gets guest writes at once, by the copy mode that was asked for and what auto mode
    /// has decided.
    pub(super) fn is_through(&self, asked: CopyMode) -> bool {
        match asked {
            CopyMode::WriteBlocking => true,
            CopyMode::Auto => self.auto.is_through(),
            // Background, which any other mode is taken for.
            _ => false,
        }
    }

    /// Another copy mode is asked for than `before`. Auto mode begins with how things are.
    pub(super) fn mode_asked(&mut self, before: CopyMode, now: Duration) {
        self.auto = Auto::starting(self.is_through(before), now);
    }

    /// The maximum size of a zeroing operation; less than a unit of the target would be data.
    pub(super) fn zero_size(&self, config: &Config) -> u64 {
        self.zeroing.step().max(config.zero_unit)
    }

    /// Whether a zeroing of `bytes` may begin while `in_flight` bytes are being zeroed.
    pub(super) fn may_zero(&self, bytes: u64, in_flight: u64) -> bool {
        self.zeroing.may_begin(bytes, in_flight)
    }

    /// A zeroing of `bytes` took `time`.
    pub(super) fn zeroed(&mut self, bytes: u64, time: Duration) {
        self.zeroing.took(bytes, time);
    }

    /// A guest write waits for a zeroing of `bytes`.
    pub(super) fn guest_waits_for_zeroing(&mut self, bytes: u64) {
        self.zeroing.guest_waits(bytes);
    }

    /// The target cannot zero without writing.
    pub(super) fn zero_by_data_only(&mut self) {
        self.zero_by_data = true;
    }

    /// Whether zeroing writes data.
    pub(super) fn zeroes_by_data(&self) -> bool {
        self.zero_by_data
    }
}
