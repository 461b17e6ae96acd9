//! The guest's writes, as the core sees them: who may write now, whether the target gets it at once, what is
//! dirty after.
//!
//! What must hold:
//! - A range is marked after its write has finished, whether or not it succeeded.
//! - In write-blocking mode nothing else is in flight on the range. The bits it covers wholly are cleared
//!   when the write is admitted, not when it ends, so that marks of others that arrive meanwhile stay; if
//!   either side fails they are set again. Units that it covers in part keep what they have.
//! - Writers wait for operations in flight and for writers that came before them, never the other way round:
//!   no wait runs in a circle. An operation is not begun where a writer waits, so none waits for long.
//! - No write is admitted while the guest is quiesced.

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::{Core, Phase, QueuedExtent, ScanCursor, Work};
use crate::scan::Failure;

/// Separate ranges remembered while scans are under way; beyond, all that is scanned is looked at again.
const MAX_WRITTEN_DURING_SCAN: usize = 4096;

/// A write of the guest that has not finished.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuestWrite {
    id: u64,
    range: ByteRange,
    stage: WriteStage,
    /// When it asked for admission.
    begun: Duration,
    /// How long it waited for the job before it was admitted.
    waited: Duration,
    /// Since when it waits for the target: since its admission, until the source's write has completed.
    at_target: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteStage {
    Queued,
    /// Admitted; the job copies it to the target later.
    SourceOnly,
    /// Admitted; source and target get it.
    SourceAndTarget,
}

/// Anti-starvation reservation: guest writes that arrive later and overlap it wait until the job has copied
/// it. Else writers that take turns on one dirty unit would keep the job from it for ever.
///
/// Rounded to whole units: a write that overlaps it in part and neither precedes the job nor waits for it
/// could close the cycle write A -> write B -> job -> A.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reservation {
    range: ByteRange,
    /// Writers from this one on come after the job.
    first_after: u64,
}

impl Reservation {
    fn precedes(&self, id: u64, range: ByteRange) -> bool {
        id >= self.first_after && range.overlaps(self.range)
    }
}

/// The state of a write that asks for admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Ask again when anything has changed.
    Wait,
    /// Write to the source.
    SourceOnly,
    /// Write to the source and, if that succeeds, to the target.
    SourceAndTarget,
    /// The job is over; it does not know this write any more.
    JobEnded,
}

impl GuestWrite {
    /// Whether the target has it as soon as it has finished, or it has not begun.
    pub(super) fn reaches_target(&self) -> bool {
        self.stage != WriteStage::SourceOnly
    }
}

impl Core {
    /// A write to `range` wants to begin.
    pub(crate) fn guest_begin(&mut self, range: ByteRange) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let begun = self.clock;
        let guest = GuestWrite {
            id,
            range,
            stage: WriteStage::Queued,
            begun,
            waited: Duration::ZERO,
            at_target: begun,
        };
        self.guests.push(guest);
        self.pacing.guest_begins(&self.config, range, self.guests.len());
        self.start_probe();
        id
    }

    /// A write of the guest begins: a probe may be due, unless the job is idle anyway.
    fn start_probe(&mut self) {
        let idle =
            self.left() == 0 || self.is_paused() || self.quiesced || !matches!(self.phase, Phase::Running);
        if !idle {
            let (both, job_idle) = (self.is_blocking(), !self.moves_data());
            self.pacing.start_probe(&self.config, self.clock, both, job_idle);
        }
    }

    /// Whether the write `id` may begin now, and how.
    pub(crate) fn guest_admit(&mut self, id: u64) -> Admission {
        let Some(index) = self.guests.iter().position(|guest| guest.id == id) else {
            return Admission::JobEnded;
        };
        if matches!(self.phase, Phase::Concluded(_)) {
            self.guests.swap_remove(index);
            return Admission::JobEnded;
        }
        if self.quiesced {
            // Waiting for the end is no delay that the budget is about.
            self.guests[index].begun = self.clock;
            return Admission::Wait;
        }
        let GuestWrite { range, begun, .. } = self.guests[index];
        let waited = self.clock.saturating_sub(begun);
        self.guests[index].waited = waited;
        if !self.is_blocking() {
            self.guests[index].stage = WriteStage::SourceOnly;
            return Admission::SourceOnly;
        }
        if self.is_others_turn(id, range) {
            if self.admission_timeout().is_some_and(|admission_timeout| waited >= admission_timeout) {
                // Left to the job after all: it is marked when it has finished.
                self.guests[index].stage = WriteStage::SourceOnly;
                self.pacing.guest_delayed(&self.config, waited);
                return Admission::SourceOnly;
            }
            if let Some(op) = self.in_flight.iter().find(|op| op.zeroes() > 0 && op.moves().overlaps(range)) {
                self.pacing.guest_waits_for_zeroing(op.zeroes());
            }
            return Admission::Wait;
        }
        self.guests[index].stage = WriteStage::SourceAndTarget;
        self.guests[index].at_target = self.clock;
        self.admit_to_target(range);
        Admission::SourceAndTarget
    }

    /// Whether a write to `range` that came now would have to wait.
    pub(crate) fn guest_would_wait(&self, range: ByteRange) -> bool {
        !self.is_concluded()
            && (self.quiesced || self.is_blocking() && self.is_others_turn(self.next_id, range))
    }

    /// Whether the write `id` to `range` comes after an operation under way, an earlier write, or what the
    /// job takes next.
    fn is_others_turn(&self, id: u64, range: ByteRange) -> bool {
        let earlier = |other: &GuestWrite| {
            other.id < id && other.stage != WriteStage::SourceOnly && other.range.overlaps(range)
        };
        self.reservation.is_some_and(|reservation| reservation.precedes(id, range))
            || self.guests.iter().any(earlier)
            || self.in_flight.iter().any(|op| op.moves().overlaps(range))
    }

    /// The write `id` has finished at the source and goes to the target now.
    pub(crate) fn guest_at_target(&mut self, id: u64) {
        if let Some(guest) = self.guests.iter_mut().find(|guest| guest.id == id) {
            guest.at_target = self.clock;
        }
    }

    /// How long the write that waits longest for the target has done so.
    pub(super) fn longest_wait_for_target(&self) -> Duration {
        let waiting = self.guests.iter().filter(|guest| guest.stage == WriteStage::SourceAndTarget);
        waiting.map(|guest| self.clock.saturating_sub(guest.at_target)).max().unwrap_or_default()
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
        let Some(index) = self.guests.iter().position(|guest| guest.id == id) else { return };
        let GuestWrite { range, stage, begun, waited, at_target, .. } = self.guests.swap_remove(index);
        self.pacing.guest_ended(
            &self.config,
            self.clock,
            begun + waited,
            stage == WriteStage::SourceAndTarget,
        );
        if stage == WriteStage::SourceAndTarget {
            let delay = waited + self.clock.saturating_sub(at_target);
            self.pacing.guest_delayed(&self.config, delay);
        }
        match target {
            Some(Ok(())) if source_ok && stage == WriteStage::SourceAndTarget => {
                self.counters.mirrored(range.len());
                self.failed_ranges.remove(range);
            }
            Some(Err(error)) => {
                self.mark_dirty(range);
                if matches!(self.phase, Phase::Running) {
                    self.guest_write_failed(range, Failure::at_target(error));
                }
            }
            _ => self.mark_dirty(range),
        }
        self.conclude_if_idle();
    }

    /// `count` writes are under way that began before the job was attached; each is reported to
    /// [`pre_attach_write_finished`](Self::pre_attach_write_finished).
    pub(crate) fn expect_pre_attach_writes(&mut self, count: usize) {
        self.pre_attach_writes = count;
    }

    /// A write that began before the job has finished.
    pub(crate) fn pre_attach_write_finished(&mut self, range: ByteRange) {
        self.pre_attach_writes = self.pre_attach_writes.saturating_sub(1);
        self.mark_dirty(range);
    }

    /// Whether the target gets the guest's writes at once. Not while the job is paused: then the target is
    /// left alone.
    pub(super) fn is_blocking(&self) -> bool {
        self.pacing.is_through(self.config.copy_mode)
            && !self.is_paused()
            && matches!(self.phase, Phase::Running)
    }

    /// Whether a write of the guest may wait for operations under way.
    pub(crate) fn writes_through(&self) -> bool {
        self.is_blocking()
    }

    /// Whether no write of the guest is under way. Those that wait for admission are not.
    pub(super) fn is_drained(&self) -> bool {
        self.pre_attach_writes == 0 && self.guests.iter().all(|guest| guest.stage == WriteStage::Queued)
    }

    /// Nothing can be begun, and something is left that writers are in the way of: it is the job's turn there
    /// next.
    pub(super) fn reserve_what_is_left(&mut self) {
        if self.reservation.is_some() {
            return;
        }
        let dirty = self.dirty.next_dirty(0, u64::MAX).map(|run| ByteRange::new(run.start, run.end));
        let left = self.scans.front().map(|scan| scan.range).or(dirty);
        let range = left.and_then(|left| Some(self.guest_in_the_way(left)?.intersect(left)));
        self.reservation =
            range.map(|range| Reservation { range: self.whole_units(range), first_after: self.next_id });
    }

    /// What writers wait for.
    pub(super) fn reserved_range(&self) -> Option<ByteRange> {
        self.reservation.map(|reservation| reservation.range)
    }

    /// Lets writers go on where the job has had its turn.
    pub(super) fn release_reservation(&mut self) {
        let done = |range: ByteRange| {
            self.dirty.dirty_bytes_in(range.start()..range.end()) == 0
                && self.in_progress.first_overlap(range).is_none()
        };
        if self.reservation.is_some_and(|reservation| done(reservation.range)) {
            self.reservation = None;
        }
    }

    /// What the guest is writing to the target is not durable, whatever is flushed meanwhile.
    pub(super) fn guests_stay_unflushed(&mut self) {
        for guest in self.guests.iter().filter(|guest| guest.stage == WriteStage::SourceAndTarget) {
            self.durability.wrote(guest.range);
        }
    }

    /// Whether the guest itself is writing to the target.
    pub(super) fn guests_at_target(&self) -> bool {
        self.guests.iter().any(|guest| guest.stage == WriteStage::SourceAndTarget)
    }

    /// The first writer in the way of an operation on `range`, in whole units of the dirty bitmap.
    pub(super) fn guest_in_the_way(&self, range: ByteRange) -> Option<ByteRange> {
        let waiting_counts = self.is_blocking() && !self.quiesced;
        self.guests
            .iter()
            .filter(|guest| match guest.stage {
                WriteStage::SourceAndTarget => true,
                WriteStage::Queued => {
                    let after = self
                        .reservation
                        .is_some_and(|reservation| reservation.precedes(guest.id, guest.range));
                    waiting_counts && !after
                }
                WriteStage::SourceOnly => false,
            })
            .map(|guest| self.whole_units(guest.range))
            .filter(|units| units.overlaps(range))
            .min_by_key(|units| units.start())
    }
}

#[cfg(test)]
mod tests;
