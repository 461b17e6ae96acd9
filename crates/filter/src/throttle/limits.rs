//! What a throttle group limits, and which combinations make sense. Texts of refusals are those scripts know
//! from QEMU.

/// The largest rate and burst rate.
pub const MAX_THROTTLE_VALUE: u64 = 1_000_000_000_000_000;

/// One limit: so much per second, and for how long how much more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units (bytes, requests) per second in the long run; 0 is unlimited.
    pub avg: u64,
    /// Units per second in a burst; 0 means that bursts have no limit of their own (a tenth of a second's
    /// worth passes at once).
    pub max: u64,
    /// Seconds that a burst at `max` may last.
    pub max_length: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { avg: 0, max: 0, max_length: 1 }
    }
}

impl Rate {
    /// `avg` units per second, without bursts.
    pub const fn per_second(avg: u64) -> Self {
        Self { avg, max: 0, max_length: 1 }
    }

    /// The same with bursts of `max` units per second for `seconds`.
    #[must_use]
    pub const fn burst(mut self, max: u64, seconds: u64) -> Self {
        self.max = max;
        self.max_length = seconds;
        self
    }
}

/// The limits of a group. By default nothing is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ThrottleLimits {
    /// Requests, reads and writes together.
    pub iops_total: Rate,
    /// Reads.
    pub iops_read: Rate,
    /// Writes, zeroing and discards.
    pub iops_write: Rate,
    /// Bytes, read and written together.
    pub bps_total: Rate,
    /// Bytes read.
    pub bps_read: Rate,
    /// Bytes written, zeroed and discarded.
    pub bps_write: Rate,
    /// A larger request counts as several of this size; 0 counts each as one.
    pub iops_size: u64,
}

/// Why limits make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ThrottleError {
    /// A total next to a rate for one direction.
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    TotalAndSplit,
    /// A size for requests that are not counted.
    #[error("iops size requires an iops value to be set")]
    SizeWithoutIops,
    /// A rate beyond [`MAX_THROTTLE_VALUE`].
    #[error("bps/iops/max values must be within [0, 1000000000000000]")]
    OutOfRange,
    /// A burst of no length.
    #[error("the burst length cannot be 0")]
    BurstLengthZero,
    /// A length for bursts that are not allowed.
    #[error("burst length set without burst rate")]
    BurstLengthWithoutRate,
    /// More units in a burst than can be counted.
    #[error("burst length too high for this burst rate")]
    BurstTooLong,
    /// A burst rate without a rate.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    BurstWithoutRate,
    /// A burst slower than the rate.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    BurstBelowRate,
}

impl ThrottleLimits {
    /// All six rates: total, read, write of bytes, then of requests.
    pub(super) fn rates(&self) -> [Rate; 6] {
        [self.bps_total, self.bps_read, self.bps_write, self.iops_total, self.iops_read, self.iops_write]
    }

    /// Whether anything is limited.
    pub fn is_limiting(&self) -> bool {
        self.rates().iter().any(|rate| rate.avg > 0)
    }

    /// Tests that the limits make sense together.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), ThrottleError> {
        let rates = self.rates();
        for [total, read, write] in [[rates[0], rates[1], rates[2]], [rates[3], rates[4], rates[5]]] {
            let both = |total: u64, split: u64| total != 0 && split != 0;
            if both(total.avg, read.avg | write.avg) || both(total.max, read.max | write.max) {
                return Err(ThrottleError::TotalAndSplit);
            }
        }
        if self.iops_size != 0 && rates[3..].iter().all(|rate| rate.avg == 0) {
            return Err(ThrottleError::SizeWithoutIops);
        }
        rates.iter().try_for_each(check_rate)
    }
}

fn check_rate(rate: &Rate) -> Result<(), ThrottleError> {
    if rate.avg > MAX_THROTTLE_VALUE || rate.max > MAX_THROTTLE_VALUE {
        return Err(ThrottleError::OutOfRange);
    }
    if rate.max_length == 0 {
        return Err(ThrottleError::BurstLengthZero);
    }
    if rate.max_length > 1 && rate.max == 0 {
        return Err(ThrottleError::BurstLengthWithoutRate);
    }
    if rate.max != 0 && rate.max_length > MAX_THROTTLE_VALUE / rate.max {
        return Err(ThrottleError::BurstTooLong);
    }
    if rate.max != 0 && rate.avg == 0 {
        return Err(ThrottleError::BurstWithoutRate);
    }
    if rate.max != 0 && rate.max < rate.avg {
        return Err(ThrottleError::BurstBelowRate);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_is_told_apart() {
        use ThrottleError as E;
        let none = ThrottleLimits::default();
        let iops = |rate| ThrottleLimits { iops_total: rate, ..none };
        let rate = Rate::per_second;
        for (limits, want) in [
            (none, Ok(())),
            (iops(rate(MAX_THROTTLE_VALUE)), Ok(())),
            (iops(rate(100).burst(500, 60)), Ok(())),
            (ThrottleLimits { iops_read: rate(5), ..iops(rate(10)) }, Err(E::TotalAndSplit)),
            (ThrottleLimits { bps_read: rate(5), ..iops(rate(10)) }, Ok(())),
            (ThrottleLimits { bps_write: rate(9), iops_size: 512, ..none }, Err(E::SizeWithoutIops)),
            (ThrottleLimits { iops_write: rate(9), iops_size: 512, ..none }, Ok(())),
            (iops(rate(MAX_THROTTLE_VALUE + 1)), Err(E::OutOfRange)),
            (iops(rate(100).burst(500, 0)), Err(E::BurstLengthZero)),
            (iops(rate(100).burst(0, 5)), Err(E::BurstLengthWithoutRate)),
            (iops(rate(100).burst(MAX_THROTTLE_VALUE, 2)), Err(E::BurstTooLong)),
            (iops(rate(0).burst(100, 1)), Err(E::BurstWithoutRate)),
            (iops(rate(100).burst(50, 1)), Err(E::BurstBelowRate)),
        ] {
            assert_eq!(limits.check(), want, "{limits:?}");
        }
    }
}
