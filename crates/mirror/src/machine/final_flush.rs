//! The one flush of an aborted job whose bitmap keeps what the target does not have ([`BitmapMode::Always`]).
//!
//! Without it everything written since the last good flush counts as missing, and a job that was cancelled
//! before it was ready never flushed: its bitmap would keep all of it. The flush begins when nothing else is
//! in flight. Until its deadline the engine does not cancel blocked calls; after it, a flush of a dead peer
//! is cancelled like any other call. If the flush fails or is cancelled, what it should have covered stays
//! missing.
//!
//! [`BitmapMode::Always`]: crate::BitmapMode::Always

use std::time::Duration;

use super::{Core, Next, Work};

/// How far the final flush has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum FinalFlush {
    #[default]
    NotBegun,
    /// It may take until then.
    Until(Duration),
    Over,
}

impl Core {
    /// Begins the final flush if the target holds anything that no flush covers, once for each job.
    pub(super) fn begin_final_flush(&mut self) -> Option<Next> {
        if self.final_flush != FinalFlush::NotBegun
            || self.config.final_flush_timeout.is_zero()
            || (self.unflushed.is_clean() && self.flushing.is_clean())
        {
            return None;
        }
        self.final_flush = FinalFlush::Until(self.clock.saturating_add(self.config.final_flush_timeout));
        Some(self.begin(Work::Flush, 0))
    }

    /// The final flush is over. Only a good one covers what was written; after another,
    /// [`missing`](Self::missing) counts it.
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
    pub(crate) fn may_cancel_calls(&self, now: Duration) -> bool {
        !matches!(self.final_flush, FinalFlush::Until(deadline) if now < deadline)
    }
}
