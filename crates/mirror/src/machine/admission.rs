//! Admission of guest writes: which may begin now, whether the target gets it at once, what is dirty after.
//!
//! Must hold:
//! - A range is marked after its write has finished, whether or not it succeeded.
//! - In write-blocking mode nothing else is in flight on the range. The granules that it covers wholly are
//!   cleared when the write is admitted, not when it ends, so that marks of others that arrive meanwhile
//!   stay; if either side fails they are set again. Granules that it covers in part keep what they have.
//! - No write is admitted while the guest is quiesced.

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::{Admission, Core, QueuedExtent, ScanCursor, Work};
use crate::scan::Failure;

/// Separate ranges remembered while scans are in flight; beyond, all that is scanned is scanned again.
const MAX_WRITTEN_DURING_SCAN: usize = 4096;

impl Core {
    /// A write to `range` wants to begin; its id.
    pub(crate) fn guest_begin(&mut self, range: ByteRange) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.guests.begin(id, range, self.clock);
        self.pacing.guest_begins(&self.config, range, self.guests.count());
        let idle = self.left() == 0 || self.is_standing() || self.lifecycle.is_quiesced();
        if !idle {
            let (both, job_idle) = (self.is_blocking(), !self.moves_data());
            self.pacing.start_probe(&self.config, self.clock, both, job_idle);
        }
        id
    }

    /// Whether the write `id` may begin now, and how.
    pub(crate) fn guest_admit(&mut self, id: u64) -> Admission {
        if self.is_concluded() {
            self.guests.forget(id);
            return Admission::JobEnded;
        }
        let Some((range, waited)) = self.guests.wait_until_now(id, self.clock) else {
            return Admission::JobEnded;
        };
        if self.lifecycle.is_quiesced() {
            self.guests.restart_wait(id, self.clock);
            return Admission::Wait;
        }
        if !self.is_blocking() {
            self.guests.admit(id, false, self.clock);
            return Admission::SourceOnly;
        }
        if self.must_wait(id, range) {
            if self.admission_timeout().is_some_and(|timeout| waited >= timeout) {
                // Left to the job after all: it is marked when it has finished.
                self.guests.admit(id, false, self.clock);
                self.pacing.guest_delayed(&self.config, waited);
                return Admission::SourceOnly;
            }
            if let Some(op) = self.in_flight.iter().find(|op| op.zeroes() > 0 && op.moves().overlaps(range)) {
                self.pacing.guest_waits_for_zeroing(op.zeroes());
            }
            return Admission::Wait;
        }
        self.guests.admit(id, true, self.clock);
        self.admit_to_target(range);
        Admission::SourceAndTarget
    }

    /// Whether a write to `range` that came now would have to wait.
    pub(crate) fn guest_would_wait(&self, range: ByteRange) -> bool {
        !self.is_concluded()
            && (self.lifecycle.is_quiesced() || self.is_blocking() && self.must_wait(self.next_id, range))
    }

    /// Whether the write `id` to `range` comes after an operation in flight, an earlier write, or the
    /// reservation.
    fn must_wait(&self, id: u64, range: ByteRange) -> bool {
        self.guests.is_after_others(id, range) || self.in_flight.iter().any(|op| op.moves().overlaps(range))
    }

    /// How long a guest write waits for the job before it goes to the source alone. While the guest is
    /// quiesced it waits for the end.
    pub(crate) fn admission_timeout(&self) -> Option<Duration> {
        self.config.latency_budget().filter(|_| !self.lifecycle.is_quiesced())
    }

    /// The write `id` has finished at the source and goes to the target now.
    pub(crate) fn guest_at_target(&mut self, id: u64) {
        self.guests.reaches_target(id, self.clock);
    }

    fn admit_to_target(&mut self, range: ByteRange) {
        self.note_target_written();
        self.cede_queued_to_guest(range);
        for op in &self.in_flight {
            // A scan may have looked before this write.
            let Work::Scan { range: looked_at, .. } = op.work else { continue };
            if op.id < self.scans_valid_from || !looked_at.overlaps(range) {
                continue;
            }
            if self.written_during_scan.count() >= MAX_WRITTEN_DURING_SCAN {
                self.scans_valid_from = self.next_id;
                break;
            }
            self.written_during_scan.insert(looked_at.intersect(range));
        }
        if let Some(written) = &mut self.guest_written {
            written.set(range.start()..range.end());
        }
        self.durability.wrote(range);
        self.dirty.clear(range.start()..range.end());
        self.retries.cleaned(range, &self.dirty);
    }

    /// Takes out of the queue what the guest is about to write at the target itself. What the scan said of
    /// it is outdated by then; and were it made dirt again, a busy guest would make work as fast as the job
    /// does it.
    fn cede_queued_to_guest(&mut self, range: ByteRange) {
        if self.in_progress.first_overlap(range).is_none() {
            return;
        }
        let mut queue = std::mem::take(&mut self.queue);
        queue.cut(range, |cut| self.cede_to_guest(cut));
        self.queue = queue;
    }

    /// The guest writes to the target itself from now on: what was scanned at length is scanned again, bit
    /// by bit.
    fn note_target_written(&mut self) {
        if std::mem::replace(&mut self.target_written, true) {
            return;
        }
        let mut scans: VecDeque<ScanCursor> = VecDeque::new();
        for QueuedExtent { range, tries, first_pass, .. } in self.queue.take_all() {
            match scans.back_mut() {
                Some(last)
                    if last.range.end() == range.start()
                        && (last.tries, last.first_pass) == (tries, first_pass) =>
                {
                    last.range = ByteRange::new(last.range.start(), range.end());
                }
                _ => scans.push_back(ScanCursor { range, tries, first_pass }),
            }
        }
        scans.append(&mut self.scans);
        self.scans = scans;
    }

    /// `range` was taken, and the guest writes it at the target instead, or marks it should that fail.
    pub(super) fn cede_to_guest(&mut self, range: ByteRange) {
        self.in_progress.remove(range);
        self.counters.passed_over(range.len());
    }

    /// `range` was taken and is not done: it is dirty again.
    pub(super) fn requeue(&mut self, range: ByteRange) {
        self.in_progress.remove(range);
        self.dirty.set(range.start()..range.end());
    }

    /// The write `id` has finished at the source, and at the target if `target` is something.
    pub(crate) fn guest_finished(&mut self, id: u64, source_ok: bool, target: Option<block::Result<()>>) {
        let Some(write) = self.guests.finish(id, self.clock) else { return };
        self.pacing.guest_ended(&self.config, self.clock, write.admitted, write.both);
        if write.both {
            self.pacing.guest_delayed(&self.config, write.delay);
        }
        match target {
            Some(Ok(())) if source_ok && write.both => {
                self.counters.mirrored(write.range.len());
                self.failed_ranges.remove(write.range);
            }
            Some(Err(error)) => {
                self.mark_dirty(write.range);
                if self.lifecycle.is_running() {
                    self.guest_write_failed(write.range, Failure::at_target(error));
                }
            }
            _ => self.mark_dirty(write.range),
        }
        self.conclude_if_idle();
    }

    /// `count` writes are under way that began before the job was attached; each is reported to
    /// [`pre_attach_write_finished`](Self::pre_attach_write_finished).
    pub(crate) fn expect_pre_attach_writes(&mut self, count: usize) {
        self.guests.expect_pre_attach_writes(count);
    }

    /// A write that began before the job was attached has finished.
    pub(crate) fn pre_attach_write_finished(&mut self, range: ByteRange) {
        self.guests.pre_attach_write_finished();
        self.mark_dirty(range);
    }

    /// Whether the target gets guest writes at once. Not while the job is paused: the target is left alone
    /// then.
    pub(super) fn is_blocking(&self) -> bool {
        self.pacing.is_through(self.config.copy_mode) && !self.is_standing()
    }

    /// Whether a guest write may wait for operations in flight.
    pub(crate) fn writes_through(&self) -> bool {
        self.is_blocking()
    }

    /// Nothing can begin, and something is left that writes are in the way of: the job goes next there.
    pub(super) fn reserve_what_is_left(&mut self) {
        if self.guests.reserved_range().is_some() {
            return;
        }
        let dirty = self.dirty.next_dirty(0, u64::MAX).map(|run| ByteRange::new(run.start, run.end));
        let left = self.scans.front().map(|scan| scan.range).or(dirty);
        if let Some(range) = left.and_then(|left| Some(self.guest_in_the_way(left)?.intersect(left))) {
            self.guests.reserve(self.whole_units(range), self.next_id);
        }
    }

    /// Releases the reservation where the job has copied it.
    pub(super) fn release_reservation_if_done(&mut self) {
        let Some(range) = self.guests.reserved_range() else { return };
        if self.dirty.dirty_bytes_in(range.start()..range.end()) == 0
            && self.in_progress.first_overlap(range).is_none()
        {
            self.guests.release_reservation();
        }
    }

    /// What the guest is writing to the target is not durable, whatever is flushed meanwhile.
    pub(super) fn guests_stay_unflushed(&mut self) {
        for range in self.guests.ranges_at_target() {
            self.durability.wrote(range);
        }
    }

    /// The first write in the way of an operation on `range`, in whole granules.
    pub(super) fn guest_in_the_way(&self, range: ByteRange) -> Option<ByteRange> {
        let queued_too = self.is_blocking() && !self.lifecycle.is_quiesced();
        self.guests.first_in_the_way(range, queued_too, |write| self.whole_units(write))
    }
}

#[cfg(test)]
mod tests;
