//! The conformance suite of jobs: one list of rules, checked of every kind of job through its own handle.
//!
//! A kind implements [`Kind`] and [`Subject`] in its tests, and [`conformance!`](crate::conformance) makes a
//! test of each rule. What must hold for the suite to be deterministic: a job that is started on a disk that
//! [blocks](Disk::Blocks) has been seen to block before `start` returns, and blocks until it is unblocked,
//! also when it is cancelled.

#![allow(clippy::panic, reason = "a test that cannot go on fails")]

mod life;
mod rules;
mod subject;
#[cfg(test)]
mod tests;

pub use rules::{
    check_cancel, check_event_order, check_failed_disk, check_moves, check_refusals, check_stages,
};
pub use subject::{Disk, Features, Kind, OneThread, Setup, Subject, TestDisk};

/// Makes a test of each rule for a [`Kind`].
#[macro_export]
macro_rules! conformance {
    ($kind:expr) => {
        #[test]
        fn the_stages_of_the_suite_are_reached() {
            $crate::testing::check_stages(&$kind);
        }

        #[test]
        fn each_verb_is_allowed_or_refused_as_the_table_says() {
            $crate::testing::check_refusals(&$kind);
        }

        #[test]
        fn each_move_is_in_the_table() {
            $crate::testing::check_moves(&$kind);
        }

        #[test]
        fn events_come_in_the_order_of_qemu() {
            $crate::testing::check_event_order(&$kind);
        }

        #[test]
        fn a_cancel_ends_the_job_in_each_state() {
            $crate::testing::check_cancel(&$kind);
        }

        #[test]
        fn a_failed_disk_ends_the_job_with_its_error() {
            $crate::testing::check_failed_disk(&$kind);
        }
    };
}
