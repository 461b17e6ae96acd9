//! Known-bug tests: those of the fifteen known bugs of mirrors that a schedule of events provokes best.
//!
//! The others are in `tests/it/known_bugs.rs` of this crate, and in `tests/live/known_bugs.rs` of the
//! workspace.

use std::time::Duration;

use blockmirror_block::testing::Rng;
use blockmirror_block::{ByteRange, Geometry};

use super::End;
use super::tests::tally;
use crate::machine::config::Config;
use crate::machine::{Cloned, Core, Done, Moved, Next, Work};
use crate::options::MirrorOptions;
use crate::scan::{CopyAction, CopyExtent};
use crate::state::JobState;

const SEEDS: std::ops::Range<u64> = 0..300;

/// Slow source writes, one hot granule, 8 writers, random completion: what was acknowledged last must win.
#[test]
fn known_bug_01_a_mark_before_the_write_lands_is_a_lost_update() {
    let ends = tally("hot", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Slow target writes, and the guest rewrites what is being written.
#[test]
fn known_bug_02_a_bit_cleared_after_the_read_is_a_lost_update() {
    let ends = tally("rewrite", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Random delays, one hot spot, 16 in flight.
#[test]
fn known_bug_03_operations_on_one_granule_do_not_overtake_each_other() {
    let ends = tally("reorder", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Writers through every end: nothing is under way when it is performed, and nothing differs.
#[test]
fn known_bug_04_the_final_check_and_the_end_are_one_step_for_the_guest() {
    let ends = tally("final-check", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

#[test]
fn known_bug_05_an_unaligned_write_through_does_not_clean_what_it_does_not_cover() {
    let ends = tally("unaligned", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Zeros and holes over a target that is full of 0x2a.
#[test]
fn known_bug_07_what_reads_as_zero_at_the_source_does_at_the_target() {
    let ends = tally("prefilled", SEEDS);
    assert!(ends[&End::Copied] > 100, "{ends:?}");
}

/// Failures under the policies that go on: each range is dirty again, and in the end all of it is there.
#[test]
fn known_bug_10_no_failure_leaves_a_range_behind() {
    let ends = tally("errors", SEEDS);
    assert!(ends[&End::Pivoted] > 30 && ends[&End::Kept] > 30, "{ends:?}");
}

/// Flushes that fail and lose what came before them.
#[test]
fn known_bug_11_ready_and_the_end_come_after_a_flush_that_succeeded() {
    let ends = tally("flush", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

#[test]
fn known_bug_12_a_paused_job_stands_still_and_events_end() {
    let ends = tally("paused", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 20, "{ends:?}");
}

/// Plays honest devices that take no time; what moved data, until the job waits without an end in sight or
/// `until`.
fn drive(core: &mut Core, rng: &mut Rng, now: &mut Duration, until: Duration) -> Vec<(Duration, u64)> {
    let mut moved = Vec::new();
    while *now < until {
        let action = match core.next(*now) {
            Next::Do(action) => action,
            Next::Wait(Some(at)) => {
                // Threads do not wake to the microsecond.
                *now = at + Duration::from_micros(rng.below(15_000));
                continue;
            }
            Next::Wait(None) | Next::Finished => break,
        };
        let done = match action.work {
            Work::Scan { range, .. } => {
                let action = CopyAction::Copy { target_zero: false };
                Done::Scanned(vec![CopyExtent { range, action, below: false }])
            }
            Work::Copy { range, .. } => {
                moved.push((*now, range.len()));
                Done::Copied(Moved { copied: range.len(), ..Moved::default() })
            }
            Work::Clone { range, .. } => Done::Cloned(Cloned { end: range.end(), ..Cloned::default() }),
            Work::Zero { .. } => Done::Zeroed,
            Work::Flush | Work::PeriodicFlush => Done::Flushed,
            Work::End(_) => Done::Ended,
        };
        core.on_completion(*now, action.id, Ok(done));
    }
    moved
}

fn live_core(len: u64, speed: u64) -> Core {
    let options = MirrorOptions::new().granularity(4096).speed(speed);
    let mut config = Config::new(&options, 4096, len, Geometry::plain());
    config.live = true;
    Core::new(config).unwrap()
}

/// The mean over five seconds is the speed although every wake-up is late, no burst is longer than a slice,
/// and nothing overflows.
#[test]
fn known_bug_13_the_mean_carries_what_a_slice_left_over() {
    for speed in [1_000_000, 12_345_678, 300 << 20] {
        let (mut core, mut rng, mut now) =
            (live_core(1 << 40, speed), Rng::from_state(speed), Duration::ZERO);
        let moved = drive(&mut core, &mut rng, &mut now, Duration::from_secs(5));
        let mut sum = 0;
        for (at, bytes) in &moved {
            sum += bytes;
            let due = (speed as f64 * at.as_secs_f64()) as u64;
            assert!(sum <= due + speed / 10 + 4096, "{speed}: {sum} bytes at {at:?}");
        }
        assert!((sum / 5).abs_diff(speed) * 50 <= speed, "{speed}: {} on average", sum / 5);
    }
    let (mut core, mut now) = (live_core(64 << 20, u64::MAX), Duration::MAX - Duration::from_secs(100));
    drive(&mut core, &mut Rng::from_state(1), &mut now, Duration::MAX);
    assert_eq!(core.progress(now).state, JobState::Ready);
}

/// A limit on the copy of the bulk is none on what the guest writes once the job is ready: it would fall
/// behind for good, and its end would never come near.
#[test]
fn known_bug_13_a_ready_job_is_not_throttled() {
    let (mut core, mut now) = (live_core(1 << 20, 0), Duration::ZERO);
    drive(&mut core, &mut Rng::from_state(1), &mut now, Duration::MAX);
    assert_eq!(core.progress(now).state, JobState::Ready);
    core.set_speed(now, 1000).unwrap();
    core.mark_dirty(ByteRange::new(0, 1 << 20));
    let then = now;
    let moved = drive(&mut core, &mut Rng::from_state(1), &mut now, Duration::MAX);
    assert_eq!((moved.iter().map(|(_, bytes)| bytes).sum::<u64>(), now), (1 << 20, then));
}
