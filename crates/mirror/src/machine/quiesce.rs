//! Quiescing the guest for the final convergence: when, and for how long.
//!
//! While the guest is quiesced, what is left is copied and flushed. That has no bound, and the guest may even
//! be what is waited for: a thread that has one write open cannot finish it while it waits to begin another.
//! So each hold has a limit, and a writer that waits longer makes the core resume the guest. The guest then
//! runs for as long as it was held, and the next hold may take twice as long.
//!
//! What must hold: the guest is not resumed between the final check and the end.

use std::time::Duration;

use super::Core;

/// The first hold takes no longer than this while a writer waits.
const FIRST_LIMIT: Duration = Duration::from_secs(1);
/// No hold does.
const LAST_LIMIT: Duration = Duration::from_secs(300);

/// Between two holds writers get in, however short the first was.
const SHORTEST_REST: Duration = Duration::from_millis(5);

/// The limits of holding.
#[derive(Debug)]
pub(super) struct Quiesce {
    /// When the present hold began.
    since: Duration,
    limit: Duration,
    /// The guest is not held again before this.
    backoff_until: Duration,
    /// The flush under way was begun in the present hold, when no write was under way.
    flush_counts: bool,
    /// Such a flush has succeeded.
    flushed: bool,
}

impl Default for Quiesce {
    fn default() -> Self {
        let never = Duration::ZERO;
        Self { since: never, limit: FIRST_LIMIT, backoff_until: never, flush_counts: false, flushed: false }
    }
}

impl Core {
    /// Lets the guest write again.
    pub(super) fn resume_guest(&mut self) {
        self.quiesced = false;
        self.quiesce.flush_counts = false;
        self.quiesce.flushed = false;
    }

    /// Holds the guest.
    pub(super) fn quiesce(&mut self) {
        self.quiesced = true;
        self.quiesce.since = self.clock;
    }

    /// Quiesces the guest when the end was asked for and little is left; resumes it when it turned out to be
    /// much.
    pub(super) fn quiesce_or_resume(&mut self) {
        if self.quiesced {
            let news = self.quiesce.flushed && !self.dirty.is_clean();
            if news || (self.guests.are_drained() && self.left() > self.config.buffer) {
                self.resume_guest();
            }
        } else if !self.is_grouped() && self.may_end() && self.is_near() {
            self.quiesce();
        }
    }

    /// Nothing but what is left to copy keeps the end waiting.
    pub(super) fn may_end(&self) -> bool {
        self.ending.is_some() && (self.config.auto_finalize || self.finalizing)
    }

    /// Little is left, and nothing forbids to hold the guest now.
    pub(super) fn is_near(&self) -> bool {
        self.left() <= self.config.operation
            && self.retries.bytes() == 0
            && self.clock >= self.durability.not_before()
            && self.clock >= self.quiesce.backoff_until
    }

    /// The guest is not held before this, if that lies ahead.
    pub(super) fn backoff_until(&self) -> Option<Duration> {
        Some(self.quiesce.backoff_until).filter(|until| *until > self.clock)
    }

    /// When writers who wait need not wait any longer.
    pub(crate) fn overdue_at(&self) -> Option<Duration> {
        (self.quiesced && !self.is_ending()).then(|| self.quiesce.since.saturating_add(self.quiesce.limit))
    }

    /// Lets writers go who have waited too long by `now`; whether there was cause to.
    pub(crate) fn resume_if_overdue(&mut self, now: Duration) -> bool {
        if self.overdue_at().is_none_or(|at| now < at) {
            return false;
        }
        self.clock = self.clock.max(now);
        self.quiesce.limit = self.quiesce.limit.saturating_mul(2).min(LAST_LIMIT);
        self.resume_with_backoff();
        true
    }

    /// Lets the guest go, for at least as long as it was held.
    pub(super) fn resume_with_backoff(&mut self) {
        let quiesced = self.clock.saturating_sub(self.quiesce.since).max(SHORTEST_REST);
        self.quiesce.backoff_until = self.clock.saturating_add(quiesced);
        self.resume_guest();
    }

    /// A flush begins while nothing is dirty.
    pub(super) fn flush_begins(&mut self) {
        self.quiesce.flush_counts = self.quiesced && self.guests.are_drained();
    }

    /// A flush has succeeded, and nothing is dirty. One that began before the guest was held says nothing
    /// about what the guest wrote to the target meanwhile.
    pub(super) fn flush_ended(&mut self) {
        self.quiesce.flushed |= std::mem::take(&mut self.quiesce.flush_counts);
    }

    /// The target was flushed since the guest is held and nothing was under way.
    pub(super) fn is_flushed(&self) -> bool {
        self.quiesced && self.quiesce.flushed
    }
}
