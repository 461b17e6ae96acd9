//! Those of the fifteen ways to get a mirror wrong that a schedule of events provokes best.
//!
//! The others stand where their subject is: `tests/provocations.rs` of this crate, and of the whole.

use super::End;
use super::tests::tally;

const SEEDS: std::ops::Range<u64> = 0..300;

/// Slow source writes, one hot granule, 8 writers, random completion: what was acknowledged last must win.
#[test]
fn provocation_01_a_mark_before_the_write_lands_is_a_lost_update() {
    let ends = tally("hot", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Slow target writes, and the guest rewrites what is being written.
#[test]
fn provocation_02_a_bit_cleared_after_the_read_is_a_lost_update() {
    let ends = tally("rewrite", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Random delays, one hot spot, 16 in flight.
#[test]
fn provocation_03_operations_on_one_granule_do_not_overtake_each_other() {
    let ends = tally("reorder", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

/// Writers through every end: nothing is under way when it is performed, and nothing differs.
#[test]
fn provocation_04_the_last_look_and_the_end_are_one_step_for_the_guest() {
    let ends = tally("last-look", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}

#[test]
fn provocation_05_an_unaligned_write_through_does_not_clean_what_it_does_not_cover() {
    let ends = tally("unaligned", SEEDS);
    assert!(ends[&End::Pivoted] > 50 && ends[&End::Kept] > 50, "{ends:?}");
}
