//! Counters: bytes dealt with since the start, and bytes of work that the guest has made.
//!
//! The source of [`Progress`](crate::Progress) and of the totals that rates are taken from. Must hold: no
//! counter ever falls.

use super::Moved;
use super::pacing::Totals;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Counters {
    moved: Moved,
    /// System calls of clones.
    clone_calls: u64,
    /// Taken from the dirty bitmap and dealt with.
    offset: u64,
    /// Bytes that turned out to be no work of this job.
    left_out: u64,
    dirtied: u64,
    /// The same without what lay ahead of the copy, which costs nothing.
    new_work: u64,
    mirrored: u64,
}

impl Counters {
    /// `bytes` became dirty; `new_work`: the job would not have copied them anyway.
    pub(super) fn dirtied(&mut self, bytes: u64, new_work: bool) {
        self.dirtied += bytes;
        if new_work {
            self.new_work += bytes;
        }
    }

    /// `bytes` were copied, cloned, zeroed or skipped.
    pub(super) fn completed(&mut self, bytes: u64, moved: Moved) {
        self.offset += bytes;
        self.moved.copied += moved.copied;
        self.moved.zeroed += moved.zeroed;
        self.moved.skipped += moved.skipped;
        self.moved.shared += moved.shared;
    }

    /// A clone took so many system calls.
    pub(super) fn cloned_by(&mut self, calls: u64) {
        self.clone_calls += calls;
    }

    /// `bytes` need no operation of the job any more: the guest writes them to the target itself, or they are
    /// a failed range.
    pub(super) fn passed_over(&mut self, bytes: u64) {
        self.offset += bytes;
    }

    /// `bytes` are left to the target's backing file. Progress never counted them.
    pub(super) fn left_to_backing(&mut self, bytes: u64) {
        self.moved.skipped += bytes;
        self.left_out += bytes;
    }

    /// A guest write of `bytes` has reached both sides.
    pub(super) fn mirrored(&mut self, bytes: u64) {
        self.mirrored += bytes;
    }

    pub(super) fn moved(&self) -> Moved {
        self.moved
    }

    pub(super) fn clone_calls(&self) -> u64 {
        self.clone_calls
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn bytes_dirtied(&self) -> u64 {
        self.dirtied
    }

    pub(super) fn bytes_mirrored(&self) -> u64 {
        self.mirrored
    }

    /// What rates are taken from.
    pub(super) fn totals(&self) -> Totals {
        Totals { done: self.offset + self.left_out, dirtied: self.new_work }
    }
}
