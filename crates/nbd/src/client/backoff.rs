//! How long to wait between attempts to reconnect.
//!
//! Pure: the number of attempts and a random number go in, a time comes out. The pool asks, once per attempt.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);

/// The longest retry.
pub(crate) const LONGEST: Duration = Duration::from_secs(5);

/// The wait after `failed` attempts in a row: none before the first, then 50 ms doubled for each up to
/// [`LONGEST`], of which `random` takes up to half away. Clients that lost one server together so do not come
/// back together.
pub(crate) fn backoff(failed: u32, random: u32) -> Duration {
    if failed == 0 {
        return Duration::ZERO;
    }
    let full = FIRST.saturating_mul(1 << (failed - 1).min(16)).min(LONGEST);
    let half = full / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn doubles_from_the_first_to_the_longest() {
        assert_eq!(backoff(0, 7), Duration::ZERO);
        let waits: Vec<_> = (1..=9).map(|failed| backoff(failed, u32::MAX).as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff(3, 0).as_millis(), 100);
    }

    proptest! {
        #[test]
        fn stays_between_half_and_full(failed in 1u32.., random: u32) {
            let wait = backoff(failed, random);
            let full = backoff(failed, u32::MAX);
            prop_assert!(wait >= full / 2 && wait <= full && full <= LONGEST);
        }
    }
}
