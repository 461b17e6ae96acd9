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
pub(super) struct Hold {
    /// When the present hold began.
    since: Duration,
    limit: Duration,
    /// The guest is not held again before this.
    rests_until: Duration,
    /// The flush under way was begun in the present hold, when no write was under way.
    flush_counts: bool,
    /// Such a flush has succeeded.
    flushed: bool,
}

impl Default for Hold {
    fn default() -> Self {
        let never = Duration::ZERO;
        Self { since: never, limit: FIRST_LIMIT, rests_until: never, flush_counts: false, flushed: false }
    }
}

impl Core {
    /// Lets the guest write again.
    pub(super) fn let_go(&mut self) {
        self.held = false;
        self.hold.flush_counts = false;
        self.hold.flushed = false;
    }

    /// Holds the guest.
    pub(super) fn hold(&mut self) {
        self.held = true;
        self.hold.since = self.clock;
    }

    /// Quiesces the guest when the end was asked for and little is left; resumes it when it turned out to be
    /// much.
    pub(super) fn hold_or_let_go(&mut self) {
        if self.held {
            let news = self.hold.flushed && !self.dirty.is_clean();
            if news || (self.is_drained() && self.left() > self.config.buffer) {
                self.let_go();
            }
        } else if !self.is_grouped() && self.may_end() && self.is_near() {
            self.hold();
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
            && self.clock >= self.flush_not_before
            && self.clock >= self.hold.rests_until
    }

    /// The guest is not held before this, if that lies ahead.
    pub(super) fn rests_until(&self) -> Option<Duration> {
        Some(self.hold.rests_until).filter(|until| *until > self.clock)
    }

    /// When writers who wait need not wait any longer.
    pub(crate) fn overdue_at(&self) -> Option<Duration> {
        (self.held && !self.is_ending()).then(|| self.hold.since.saturating_add(self.hold.limit))
    }

    /// Lets writers go who have waited too long by `now`; whether there was cause to.
    pub(crate) fn let_go_if_overdue(&mut self, now: Duration) -> bool {
        if self.overdue_at().is_none_or(|at| now < at) {
            return false;
        }
        self.clock = self.clock.max(now);
        self.hold.limit = self.hold.limit.saturating_mul(2).min(LAST_LIMIT);
        self.let_go_and_rest();
        true
    }

    /// Lets the guest go, for at least as long as it was held.
    pub(super) fn let_go_and_rest(&mut self) {
        let held = self.clock.saturating_sub(self.hold.since).max(SHORTEST_REST);
        self.hold.rests_until = self.clock.saturating_add(held);
        self.let_go();
    }

    /// A flush begins while nothing is dirty.
    pub(super) fn flush_begins(&mut self) {
        self.hold.flush_counts = self.held && self.is_drained();
    }

    /// A flush has succeeded, and nothing is dirty. One that began before the guest was held says nothing
    /// about what the guest wrote to the target meanwhile.
    pub(super) fn flush_ended(&mut self) {
        self.hold.flushed |= std::mem::take(&mut self.hold.flush_counts);
    }

    /// The target was flushed since the guest is held and nothing was under way.
    pub(super) fn is_flushed(&self) -> bool {
        self.held && self.hold.flushed
    }
}
