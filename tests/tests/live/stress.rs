//! A few seconds of the stress: writers, and a thread that starts job after job. `cargo xtask stress` does it
//! for longer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::time::Duration;

use blockmirror_testing::report;
use blockmirror_tests::live::Stress;

#[test]
fn no_acknowledged_write_is_lost_and_a_kept_copy_shows_one_instant() {
    let stress = Stress { seed: 1, time: Duration::from_secs(5), len: 16 << 20, dir: None };
    let done = stress.run(|_| {}).unwrap();
    report(format_args!("stress: {done}"));
    assert!(done.jobs() > 0 && done.changes > 0 && done.reads > 0, "{done}");
}
