//! Durability of the target: what was written and is not covered by a good flush, and when to flush.
//!
//! A flush precedes READY. The *last* flush, while the guest is quiesced, precedes the end of a ready job.
//! The *periodic* flush makes durable, while other operations go on, what was written to a volatile target: a
//! server that is killed may come back without what was not flushed, and the job would have to copy all of it
//! again. The *final* flush is that of an aborted job whose bitmap keeps what the target does not have
//! ([`BitmapMode::Always`]): without it everything written since the last good flush counts as missing. It
//! begins when nothing else is in flight, has a deadline, and until then the engine does not cancel blocked
//! calls. A job with checkpoints or a log has periodic flushes by bytes ([`CheckpointClock`]), and with a log
//! when a guest write needs room there.
//!
//! Must hold: a range leaves this set only by a flush that succeeded and began after the range was written,
//! or by becoming dirty again.
//!
//! [`BitmapMode::Always`]: crate::BitmapMode::Always

use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::ByteRange;

use super::checkpoint_clock::CheckpointClock;
use super::work::retry_delay;

/// Periodic flushes take at most one part in so many of the time of one worker.
const MAX_SHARE: u32 = 4;

/// How far the final flush has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum FinalFlush {
    #[default]
    NotBegun,
    /// It may take until then.
    Until(Duration),
    Over,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Durability {
    /// Written since the last good flush, but for what the next field has.
    unflushed: DirtyBitmap,
    /// Written before the flush began that is in flight.
    flushing: DirtyBitmap,
    /// Failed flushes in a row.
    tries: u32,
    /// No flush begins before this.
    not_before: Duration,
    /// Time from one periodic flush to the next; `None` if the target is not volatile.
    interval: Option<Duration>,
    /// No periodic flush begins before this.
    periodic_not_before: Duration,
    final_flush: FinalFlush,
    checkpoints: CheckpointClock,
    /// A guest write waits for a flush that begins from now on, or will soon.
    demanded: bool,
    /// No flush begins before this because it is demanded.
    demand_not_before: Duration,
}

impl Durability {
    /// `empty` is an empty bitmap of the disk.
    pub(super) fn new(empty: DirtyBitmap, interval: Option<Duration>, checkpoints: Option<u64>) -> Self {
        Self {
            unflushed: empty.clone(),
            flushing: empty,
            tries: 0,
            not_before: Duration::ZERO,
            interval,
            periodic_not_before: interval.unwrap_or_default(),
            final_flush: FinalFlush::default(),
            checkpoints: CheckpointClock::new(checkpoints),
            demanded: false,
            demand_not_before: Duration::ZERO,
        }
    }

    /// `range` has been, or may have been, written to the target.
    pub(super) fn wrote(&mut self, range: ByteRange) {
        self.unflushed.set(range.start()..range.end());
    }

    /// A flush begins. Writes in flight at the target are [written](Self::wrote) anew by the caller: they may
    /// land after it has begun.
    pub(super) fn flush_begins(&mut self) {
        self.flushing.merge(&self.unflushed);
        self.unflushed.clear_all();
        self.checkpoints.flush_begins();
        self.demanded = false;
    }

    /// A guest write waits for a flush.
    pub(super) fn demand(&mut self) {
        self.demanded = true;
    }

    pub(super) fn flush_succeeded(&mut self) {
        self.flushing.clear_all();
        self.checkpoints.flush_succeeded();
        self.tries = 0;
    }

    /// The target may have lost everything that no good flush covers, which is handed to `lost`. As after
    /// [`flush_begins`](Self::flush_begins), writes in flight are written anew by the caller.
    pub(super) fn writes_lost(&mut self, mut lost: impl FnMut(&DirtyBitmap)) {
        lost(&self.unflushed);
        lost(&self.flushing);
        self.unflushed.clear_all();
        self.flushing.clear_all();
        self.checkpoints.writes_lost();
    }

    /// `bytes` of data were written to the target.
    pub(super) fn wrote_data(&mut self, bytes: u64) {
        self.checkpoints.wrote(bytes);
    }

    /// Whether a copy may begin when the copies in flight and it have `bytes`: as much as two checkpoints are
    /// apart is at risk, and no more.
    pub(super) fn may_copy(&self, bytes: u64) -> bool {
        self.checkpoints.may_copy(bytes)
    }

    /// A flush has failed and is tried again under the error policy; returns how often in a row.
    pub(super) fn count_failure(&mut self) -> u32 {
        self.tries += 1;
        self.tries
    }

    /// The next try comes after a delay that grows with each.
    pub(super) fn back_off(&mut self, now: Duration) {
        self.not_before = now.saturating_add(retry_delay(self.tries));
    }

    /// No flush begins before this.
    pub(super) fn not_before(&self) -> Duration {
        self.not_before
    }

    /// Whether it is time for a periodic flush.
    pub(super) fn is_periodic_flush_due(&self, now: Duration) -> bool {
        let due = self.interval.is_some() && now >= self.periodic_not_before && !self.unflushed.is_clean();
        let demanded = self.demanded && now >= self.demand_not_before;
        (due || demanded || self.checkpoints.is_due()) && now >= self.not_before
    }

    /// A flush that began at `begun` is over, whatever its result.
    pub(super) fn flush_ended(&mut self, now: Duration, begun: Duration) {
        let took = now.saturating_sub(begun);
        self.demand_not_before = now.saturating_add(took);
        let Some(interval) = self.interval else { return };
        self.periodic_not_before = now.saturating_add(interval.max(took.saturating_mul(MAX_SHARE - 1)));
    }

    /// When a job that has nothing to do checks for a periodic flush of what the guest writes to the target.
    pub(super) fn next_check(&self, now: Duration) -> Option<Duration> {
        self.interval.map(|interval| self.periodic_not_before.max(now.saturating_add(interval)))
    }

    /// Whether the final flush begins now, once for each job: anything is not covered, and `timeout` is not
    /// zero.
    pub(super) fn begin_final_flush(&mut self, now: Duration, timeout: Duration) -> bool {
        if self.final_flush != FinalFlush::NotBegun
            || timeout.is_zero()
            || (self.unflushed.is_clean() && self.flushing.is_clean())
        {
            return false;
        }
        self.final_flush = FinalFlush::Until(now.saturating_add(timeout));
        true
    }

    /// The final flush is over, if it was one. Only a good one covers what was written; after another,
    /// [`uncovered`](Self::uncovered) has it.
    pub(super) fn final_flush_ended(&mut self, succeeded: bool) {
        if matches!(self.final_flush, FinalFlush::Until(_)) {
            self.final_flush = FinalFlush::Over;
            if succeeded {
                self.flushing.clear_all();
            }
        }
    }

    /// Whether calls blocked at the devices may be cancelled at `now`: not while the final flush has time
    /// left.
    pub(super) fn may_cancel_calls(&self, now: Duration) -> bool {
        !matches!(self.final_flush, FinalFlush::Until(deadline) if now < deadline)
    }

    /// The ranges that a crash of the target may take, some twice. A flush that the end overtook counts as
    /// none.
    pub(super) fn uncovered(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let runs = self.unflushed.runs().chain(self.flushing.runs());
        runs.map(|run| ByteRange::new(run.start, run.end))
    }
}
