//! Quiescing the guest for the final convergence, and the limits of it.
//!
//! While the guest is quiesced, what is left is copied and flushed. That takes any time, and the guest itself
//! may be what is waited for: a thread that has one write open cannot finish it while it waits to begin
//! another. So the guest is quiesced for at most 1 s while a write waits, then resumed for as long; the limit
//! doubles up to 5 min.
//!
//! Must hold: the guest is not resumed between the final check and the end (the caller's to see to).

use std::time::Duration;

/// The first limit.
const FIRST_LIMIT: Duration = Duration::from_secs(1);
/// The last.
const LAST_LIMIT: Duration = Duration::from_secs(300);
/// The guest is resumed for at least this long, however short it was quiesced.
const MIN_BACKOFF: Duration = Duration::from_millis(5);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Quiesce {
    active: bool,
    /// When it last began.
    since: Duration,
    limit: Duration,
    /// It does not begin again before this.
    backoff_until: Duration,
    /// The flush in flight began while the guest was quiesced and no write was under way.
    flush_counts: bool,
    /// Such a flush has succeeded.
    flushed: bool,
}

impl Default for Quiesce {
    fn default() -> Self {
        Self {
            active: false,
            since: Duration::ZERO,
            limit: FIRST_LIMIT,
            backoff_until: Duration::ZERO,
            flush_counts: false,
            flushed: false,
        }
    }
}

impl Quiesce {
    pub(super) fn is_active(&self) -> bool {
        self.active
    }

    pub(super) fn begin(&mut self, now: Duration) {
        self.active = true;
        self.since = now;
    }

    pub(super) fn end(&mut self) {
        self.active = false;
        self.flush_counts = false;
        self.flushed = false;
    }

    /// Ends it for at least as long as it was.
    pub(super) fn end_with_backoff(&mut self, now: Duration) {
        let quiesced = now.saturating_sub(self.since).max(MIN_BACKOFF);
        self.backoff_until = now.saturating_add(quiesced);
        self.end();
    }

    /// The same because its limit was reached.
    pub(super) fn end_overdue(&mut self, now: Duration) {
        self.limit = self.limit.saturating_mul(2).min(LAST_LIMIT);
        self.end_with_backoff(now);
    }

    /// When its limit is reached.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.active.then(|| self.since.saturating_add(self.limit))
    }

    pub(super) fn backoff_until(&self) -> Duration {
        self.backoff_until
    }

    /// A flush begins while nothing is dirty; `drained`: no guest write is under way.
    pub(super) fn flush_begins(&mut self, drained: bool) {
        self.flush_counts = self.active && drained;
    }

    /// A flush has succeeded, and nothing is dirty. One that began before the guest was quiesced says nothing
    /// about what the guest wrote to the target meanwhile.
    pub(super) fn flush_succeeded(&mut self) {
        self.flushed |= std::mem::take(&mut self.flush_counts);
    }

    /// The target was flushed since it began, while no write was under way.
    pub(super) fn is_flushed(&self) -> bool {
        self.active && self.flushed
    }
}
