//! Guest writes that have begun and not finished: their stages, who waits for whom, and the job's
//! reservation.
//!
//! Must hold:
//! - A write waits for copies and zeroings in flight and for writes that came before it, never the other way
//!   round: no wait forms a cycle. Neither begins where a write waits (but for the reservation, and while the
//!   guest is quiesced), so none waits for long.
//! - Of two overlapping writes that go to the target, one does so only after the other has finished.
//!
//! Pure: time is an argument. Which operations are in flight is the caller's to know.

use std::time::Duration;

use blockmirror_block::ByteRange;

use super::refused_polls::RefusedPolls;

/// How long an aborting job waits for a ticket whose holder was given the target.
const TICKET_TIMEOUT: Duration = Duration::from_secs(5);

/// A guest write that has not finished.
#[derive(Clone, Copy, Debug)]
struct GuestWrite {
    id: u64,
    range: ByteRange,
    stage: WriteStage,
    /// When it asked for admission.
    begun: Duration,
    /// How long it waited for the job before it was admitted.
    waited: Duration,
    /// Since when it waits for the target: since its admission, until the source's write has completed.
    at_target: Duration,
    /// Who was given the target for it.
    writer: Option<TargetWriter>,
}

/// Who writes to the target on behalf of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TargetWriter {
    /// The tap: the call ends when the device ends it.
    Tap,
    /// The holder of a ticket, which may never be completed.
    TicketHolder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteStage {
    Queued,
    /// Admitted; the job copies it to the target later.
    SourceOnly,
    /// Admitted; source and target get it.
    SourceAndTarget,
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

/// Anti-starvation reservation: guest writes that arrive later and overlap it wait until the job has copied
/// it. Otherwise writers that alternate on one dirty granule would keep the job from it for ever.
///
/// Rounded to whole granules: a partial overlap could close the cycle write A -> write B -> job -> A.
#[derive(Clone, Copy, Debug)]
struct Reservation {
    range: ByteRange,
    /// Writes from this one on come after the job.
    first_after: u64,
}

impl Reservation {
    fn precedes(&self, id: u64, range: ByteRange) -> bool {
        id >= self.first_after && range.overlaps(self.range)
    }
}

/// A write that has finished.
#[derive(Clone, Copy, Debug)]
pub(super) struct FinishedWrite {
    pub(super) range: ByteRange,
    /// It was admitted to source and target.
    pub(super) both: bool,
    pub(super) admitted: Duration,
    /// What the job has added to it: the wait for admission and for the target.
    pub(super) delay: Duration,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct GuestWrites {
    writes: Vec<GuestWrite>,
    reservation: Option<Reservation>,
    /// Writes under way that began before the job was attached.
    pre_attach_writes: usize,
    /// Copies from the layers below into the source that are under way.
    copy_ups: usize,
    refused: RefusedPolls,
    /// How often a write that waits may have been released.
    releases: u64,
    /// When an aborting job stops waiting for tickets, once it has begun to.
    ticket_deadline: Option<Duration>,
}

impl GuestWrites {
    /// The write `id` to `range` asks for admission.
    pub(super) fn begin(&mut self, id: u64, range: ByteRange, now: Duration) {
        let stage = WriteStage::Queued;
        let (waited, writer) = (Duration::ZERO, None);
        self.writes.push(GuestWrite { id, range, stage, begun: now, waited, at_target: now, writer });
    }

    /// Writes that have begun and not finished.
    pub(super) fn count(&self) -> usize {
        self.writes.len()
    }

    fn get(&mut self, id: u64) -> Option<&mut GuestWrite> {
        self.writes.iter_mut().find(|write| write.id == id)
    }

    fn take(&mut self, id: u64) -> Option<GuestWrite> {
        let index = self.writes.iter().position(|write| write.id == id)?;
        Some(self.writes.swap_remove(index))
    }

    /// Forgets a write that was not admitted.
    pub(super) fn forget(&mut self, id: u64) {
        if self.take(id).is_some() {
            self.note_release();
        }
    }

    /// What writes may wait for has ended. A write that is refused and forgotten at once kept none waiting.
    pub(super) fn note_release(&mut self) {
        self.releases = self.releases.wrapping_add(1);
    }

    /// How often that was.
    pub(super) fn releases(&self) -> u64 {
        self.releases
    }

    /// The caller of the write `id` does not wait: what writes to its range were refused counts as its wait.
    pub(super) fn continue_poll(&mut self, id: u64, now: Duration) {
        let Some(write) = self.writes.iter_mut().find(|write| write.id == id) else { return };
        if let Some(since) = self.refused.take(write.range, now) {
            write.begun = since;
        }
    }

    /// Forgets the write `id`, whose caller does not wait, but for how long it has been refused.
    pub(super) fn refuse_poll(&mut self, id: u64, now: Duration) {
        if let Some(write) = self.take(id) {
            self.refused.refuse(write.range, write.begun, now);
        }
    }

    /// Since when writes to `range` have been refused.
    pub(super) fn refused_since(&self, range: ByteRange) -> Option<Duration> {
        self.refused.since(range)
    }

    /// The wait of `id` counts from now on: waiting for the end is no delay that the latency budget is about.
    pub(super) fn restart_wait(&mut self, id: u64, now: Duration) {
        if let Some(write) = self.get(id) {
            write.begun = now;
        }
    }

    /// The range of a write that asks for admission, and how long it has waited.
    pub(super) fn wait_until_now(&mut self, id: u64, now: Duration) -> Option<(ByteRange, Duration)> {
        let write = self.get(id)?;
        write.waited = now.saturating_sub(write.begun);
        Some((write.range, write.waited))
    }

    /// How long the write `id` has waited for admission by `now`.
    pub(super) fn waited(&self, id: u64, now: Duration) -> Option<Duration> {
        let write = self.writes.iter().find(|write| write.id == id)?;
        Some(now.saturating_sub(write.begun))
    }

    /// Admits the write to the source alone, or to `both`.
    pub(super) fn admit(&mut self, id: u64, both: bool, now: Duration) {
        let Some(write) = self.get(id) else { return };
        write.stage = if both { WriteStage::SourceAndTarget } else { WriteStage::SourceOnly };
        if both {
            write.at_target = now;
        }
    }

    /// Whether the write `id` to `range` comes after the reservation or an earlier write.
    pub(super) fn is_after_others(&self, id: u64, range: ByteRange) -> bool {
        let earlier = |other: &GuestWrite| {
            other.id < id && other.stage != WriteStage::SourceOnly && other.range.overlaps(range)
        };
        self.is_after_job(id, range) || self.writes.iter().any(earlier)
    }

    fn is_after_job(&self, id: u64, range: ByteRange) -> bool {
        self.reservation.is_some_and(|reservation| reservation.precedes(id, range))
    }

    /// The write has finished at the source, and `writer` is given the target for it.
    pub(super) fn reaches_target(&mut self, id: u64, writer: TargetWriter, now: Duration) {
        if let Some(write) = self.get(id) {
            write.at_target = now;
            write.writer = Some(writer);
        }
    }

    /// Whether `writer` was given the target for a write that has not finished.
    pub(super) fn has_target(&self, writer: TargetWriter) -> bool {
        self.through().any(|write| write.writer == Some(writer))
    }

    /// When an aborting job that waits for nothing but tickets stops waiting.
    pub(super) fn ticket_deadline(&mut self, now: Duration) -> Duration {
        *self.ticket_deadline.get_or_insert(now.saturating_add(TICKET_TIMEOUT))
    }

    /// From now on the target does not get the writes that were admitted to both sides: their ranges.
    pub(super) fn leave_to_source(&mut self) -> Vec<ByteRange> {
        self.note_release();
        let through = self.writes.iter_mut().filter(|write| write.stage == WriteStage::SourceAndTarget);
        through
            .map(|write| {
                write.stage = WriteStage::SourceOnly;
                write.range
            })
            .collect()
    }

    /// Removes a write that has finished.
    pub(super) fn finish(&mut self, id: u64, now: Duration) -> Option<FinishedWrite> {
        let write = self.take(id)?;
        self.note_release();
        Some(FinishedWrite {
            range: write.range,
            both: write.stage == WriteStage::SourceAndTarget,
            admitted: write.begun + write.waited,
            delay: write.waited + now.saturating_sub(write.at_target),
        })
    }

    /// How long the write that waits longest for the target has done so.
    pub(super) fn longest_target_wait(&self, now: Duration) -> Duration {
        let waits = self.through().map(|write| now.saturating_sub(write.at_target));
        waits.max().unwrap_or_default()
    }

    /// The ranges that the guest is writing to the target.
    pub(super) fn ranges_at_target(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.through().map(|write| write.range)
    }

    fn through(&self) -> impl Iterator<Item = &GuestWrite> {
        self.writes.iter().filter(|write| write.stage == WriteStage::SourceAndTarget)
    }

    /// Whether the target has each write as soon as it has finished, or the write was not admitted.
    pub(super) fn all_reach_target(&self) -> bool {
        self.writes.iter().all(|write| write.stage != WriteStage::SourceOnly)
    }

    /// `count` writes are under way that began before the job was attached.
    pub(super) fn expect_pre_attach_writes(&mut self, count: usize) {
        self.pre_attach_writes = count;
    }

    pub(super) fn pre_attach_write_finished(&mut self) {
        self.pre_attach_writes = self.pre_attach_writes.saturating_sub(1);
    }

    pub(super) fn copy_up_begins(&mut self) {
        self.copy_ups += 1;
    }

    pub(super) fn copy_up_finished(&mut self) {
        self.copy_ups = self.copy_ups.saturating_sub(1);
    }

    /// Whether no write or copy-up is under way. Writes that wait for admission are not.
    pub(super) fn are_drained(&self) -> bool {
        let unadmitted = self.pre_attach_writes + self.copy_ups;
        unadmitted == 0 && self.writes.iter().all(|write| write.stage == WriteStage::Queued)
    }

    /// Reserves `range`, whole granules, for the job; writes from `first_after` on come after it.
    pub(super) fn reserve(&mut self, range: ByteRange, first_after: u64) {
        self.reservation = Some(Reservation { range, first_after });
    }

    pub(super) fn reserved_range(&self) -> Option<ByteRange> {
        self.reservation.map(|reservation| reservation.range)
    }

    pub(super) fn release_reservation(&mut self) {
        if self.reservation.take().is_some() {
            self.note_release();
        }
    }

    /// The first write that keeps an operation on `range` from beginning, in whole granules (`granules`
    /// rounds). `queued_too`: those that wait for admission and come before the job count.
    pub(super) fn first_in_the_way(
        &self,
        range: ByteRange,
        queued_too: bool,
        granules: impl Fn(ByteRange) -> ByteRange,
    ) -> Option<ByteRange> {
        self.writes
            .iter()
            .filter(|write| match write.stage {
                WriteStage::SourceAndTarget => true,
                WriteStage::Queued => queued_too && !self.is_after_job(write.id, write.range),
                WriteStage::SourceOnly => false,
            })
            .map(|write| granules(write.range))
            .filter(|granules| granules.overlaps(range))
            .min_by_key(|granules| granules.start())
    }
}
