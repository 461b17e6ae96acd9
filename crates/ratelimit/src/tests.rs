//! The limiter against a virtual clock.

use std::time::Duration;

use proptest::prelude::*;

use crate::{RateLimiter, SLICE};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Moves data in `unit`s for `span`, waking `oversleep(i)` too late each time; returns bytes moved.
fn run(
    limiter: &mut RateLimiter,
    from: Duration,
    span: Duration,
    unit: u64,
    oversleep: impl Fn(u64) -> Duration,
) -> u64 {
    let (mut now, mut moved, mut i) = (from, 0, 0);
    while now < from + span {
        let wait = limiter.account(now, unit);
        moved += unit;
        if !wait.is_zero() {
            now += wait + oversleep(i);
            i += 1;
        }
    }
    moved
}

#[test]
fn under_quota_there_is_no_wait_and_the_excess_stretches_the_slice() {
    let mut l = RateLimiter::new(1000);
    assert_eq!(l.quota(), 100);
    assert_eq!(l.account(ms(5), 99), Duration::ZERO);
    assert_eq!(l.account(ms(6), 1), ms(94));
    assert_eq!(l.delay(ms(50)), ms(50));
    assert_eq!(l.account(ms(50), 150), ms(200));
}

#[test]
fn the_first_slice_starts_at_the_first_use() {
    let mut l = RateLimiter::new(1000);
    assert_eq!(l.account(ms(777_777), 100), ms(100));
}

#[test]
fn a_slice_follows_the_previous_one_unless_a_whole_slice_was_idle() {
    let mut l = RateLimiter::new(1000);
    assert_eq!(l.account(ms(1000), 200), ms(200));
    // 99 ms late: the slice began at 1200.
    assert_eq!(l.account(ms(1299), 100), ms(1));
    // 100 ms late: a fresh slice.
    assert_eq!(l.account(ms(1400), 100), ms(100));
}

#[test]
fn unlimited_never_waits_and_has_no_quota() {
    let mut l = RateLimiter::new(0);
    assert_eq!(l.quota(), u64::MAX);
    assert_eq!(l.account(ms(0), u64::MAX), Duration::ZERO);
    assert_eq!(l.delay(ms(0)), Duration::ZERO);
}

#[test]
fn a_change_of_speed_keeps_what_was_paid_and_charges_the_rest_at_the_new_speed() {
    let mut l = RateLimiter::new(1000);
    assert_eq!(l.account(ms(0), 10_000), ms(10_000));
    l.set_speed(ms(4000), 100_000);
    // 6000 bytes are owed: 60 ms at the new speed, which is within one slice.
    assert_eq!(l.delay(ms(4000)), Duration::ZERO);
    assert_eq!(l.account(ms(4000), 4000), ms(100));

    let mut l = RateLimiter::new(1000);
    l.account(ms(0), 10_000);
    l.set_speed(ms(4000), 2000);
    assert_eq!(l.delay(ms(4000)), ms(3000));
    l.set_speed(ms(4000), 0);
    assert_eq!(l.delay(ms(4000)), Duration::ZERO);
    l.set_speed(ms(4000), 1);
    assert_eq!(l.delay(ms(4000)), Duration::ZERO);
}

#[test]
fn extremes_do_not_overflow() {
    for speed in [1, 2, u64::MAX / 2, u64::MAX] {
        let mut l = RateLimiter::new(speed);
        for now in [Duration::ZERO, Duration::MAX, ms(1)] {
            l.account(now, u64::MAX);
            l.account(now, u64::MAX);
            l.set_speed(now, speed / 2);
            l.delay(now);
        }
        assert!(l.quota() >= 1);
    }
}

#[test]
fn a_slow_speed_is_exact_although_the_quota_is_a_whole_number_of_bytes() {
    // A quota of 1 byte taken literally would be 10 bytes a second.
    for speed in [3, 15, 19] {
        let moved = run(&mut RateLimiter::new(speed), ms(0), ms(100_000), 1, |_| Duration::ZERO);
        assert!(moved.abs_diff(speed * 100) <= 3, "{moved} at {speed}");
    }
}

proptest! {
    #[test]
    fn the_mean_over_five_seconds_is_within_two_percent(
        speed in 5120u64..10_000_000_000,
        part in 1u64..=64,
        late in proptest::collection::vec(0u64..99_000, 1..20),
    ) {
        let mut l = RateLimiter::new(speed);
        let unit = (l.quota() / part).max(1);
        let from = ms(123_456);
        let lateness = |i| Duration::from_micros(late[i as usize % late.len()]);
        let moved = run(&mut l, from, ms(5000), unit, lateness);
        let ideal = speed * 5;
        let slack = ideal / 50 + unit;
        prop_assert!(moved.abs_diff(ideal) <= slack, "{moved} of {ideal}, unit {unit}");
    }

    #[test]
    fn no_moment_is_ahead_of_the_line_by_more_than_a_slice_and_one_operation(
        speed in 1u64..1_000_000_000,
        steps in proptest::collection::vec((0u64..200_000_000, 0u64..300_000), 1..100),
    ) {
        let mut l = RateLimiter::new(speed);
        let (mut now, mut moved) = (ms(1000), 0u128);
        for (bytes, pause) in steps {
            let allowed = u128::from(speed) * (now - ms(1000) + SLICE).as_nanos() / 1_000_000_000 + 2;
            prop_assert!(moved <= allowed, "{moved} above {allowed}");
            moved += u128::from(bytes);
            now += l.account(now, bytes) + Duration::from_micros(pause);
        }
    }

    #[test]
    fn with_a_sleeper_that_wakes_often_the_answers_agree(
        speed in 1u64..1_000_000,
        bytes in 0u64..10_000_000,
        cut in 0u32..1000,
    ) {
        let mut l = RateLimiter::new(speed);
        let wait = l.account(ms(10), bytes);
        let part = wait * cut / 1000;
        prop_assert_eq!(l.delay(ms(10) + part), wait - part);
    }
}

#[test]
fn a_slice_closed_early_lasts_as_long_as_its_bytes_are_worth() {
    let mut limiter = RateLimiter::new(1_000_000);
    assert_eq!(limiter.room(ms(0)), 100_000);
    assert_eq!(limiter.account(ms(0), 65_536), ms(0));
    assert_eq!(limiter.room(ms(1)), 34_464);
    assert_eq!(limiter.close_slice(ms(1)), Duration::from_nanos(64_536_000));
    assert_eq!(limiter.room(ms(1)), 0);
    // Who does not wait pays all the same.
    assert_eq!(limiter.account(ms(1), 1000), Duration::from_nanos(65_536_000));
    // The next slice follows without a gap, and is open again.
    assert_eq!(limiter.room(ms(70)), 100_000);
    assert_eq!(limiter.account(ms(70), 1), ms(0));
    assert_eq!(limiter.room(ms(70)), 99_999);

    let mut unlimited = RateLimiter::new(0);
    assert_eq!((unlimited.room(ms(0)), unlimited.close_slice(ms(0))), (u64::MAX, ms(0)));
}

proptest! {
    #[test]
    fn who_closes_rather_than_bursts_is_never_a_slice_ahead(
        speed in 1u64..1 << 40,
        ops in prop::collection::vec(1u64..1 << 30, 1..200),
    ) {
        let mut limiter = RateLimiter::new(speed);
        let (mut now, mut sum) = (ms(0), 0u128);
        for bytes in ops {
            let bytes = bytes.min(limiter.quota());
            if bytes > limiter.room(now) {
                now += limiter.close_slice(now);
            }
            now += limiter.delay(now);
            sum += u128::from(bytes);
            limiter.account(now, bytes);
            let line = now.as_nanos() * u128::from(speed) / 1_000_000_000;
            prop_assert!(sum <= line + u128::from(limiter.quota()) + 1, "{} at {:?}", sum, now);
        }
    }
}

/// A slice of 20 MB was copied in its first milliseconds by all threads at once, and writers of the disk
/// waited meanwhile.
#[test]
fn a_slice_is_spent_evenly_over_three_quarters_of_it() {
    let mut limiter = RateLimiter::new(10_000_000);
    assert_eq!(limiter.even_delay(ms(0)), ms(0));
    limiter.account(ms(0), 200_000);
    assert_eq!(limiter.even_delay(ms(0)), ms(15));
    assert_eq!(limiter.even_delay(ms(10)), ms(5));
    // Who comes late catches up.
    assert_eq!(limiter.even_delay(ms(40)), ms(0));
    limiter.account(ms(40), 200_000);
    assert_eq!(limiter.even_delay(ms(40)), ms(0));
    limiter.account(ms(40), 400_000);
    assert_eq!(limiter.even_delay(ms(40)), ms(20));
    // What is left passes without waiting then, and nothing of a slice before counts.
    assert_eq!(
        (limiter.room(ms(60)), limiter.even_delay(ms(60)), limiter.even_delay(ms(100))),
        (200_000, ms(0), ms(0))
    );
    assert_eq!(RateLimiter::new(0).even_delay(ms(1)), ms(0));
}
