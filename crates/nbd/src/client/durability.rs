//! Durability tracking: which completed writes no flush has covered yet.
//!
//! A server that is killed loses what it had not flushed, and a client that reconnects cannot distinguish a
//! killed server from a broken network. So writes that were completed and not flushed when a connection was
//! lost count as lost, and the next flush fails. Pure; the pool holds it under its lock.

/// Counts writes, flushes and losses.
///
/// An *epoch* is the life of one set of connections; the pool numbers them.
#[derive(Debug, Default)]
pub(crate) struct DurabilityTracker {
    epoch: u64,
    /// Writes completed in this epoch, and how many of those a flush has covered.
    completed: u64,
    flushed: u64,
    /// How often unflushed writes went with an epoch, and how many of those were reported to callers.
    losses: u64,
    reported: u64,
}

/// The counts when a flush began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlushTicket {
    epoch: u64,
    completed: u64,
    reported: u64,
}

impl DurabilityTracker {
    /// A write that is not durable by itself was completed in `epoch`.
    pub(crate) fn wrote(&mut self, epoch: u64) {
        if epoch == self.epoch {
            self.completed += 1;
        } else {
            // Its connection was lost between the server's answer and now.
            self.losses += 1;
        }
    }

    /// The connections of the present epoch are lost; `epoch` is the next one.
    pub(crate) fn lost(&mut self, epoch: u64) {
        if self.completed > self.flushed {
            self.losses += 1;
        }
        self.epoch = epoch;
        (self.completed, self.flushed) = (0, 0);
    }

    /// A flush begins; [`report_loss`](Self::report_loss) at its end says whether it fails.
    pub(crate) fn begin(&self) -> FlushTicket {
        FlushTicket { epoch: self.epoch, completed: self.completed, reported: self.reported }
    }

    /// Whether a flush that has `ticket` must fail because of losses. All flushes that began before a loss
    /// was reported fail; those that begin afterwards do not.
    pub(crate) fn report_loss(&mut self, ticket: FlushTicket) -> bool {
        let lost = self.losses > ticket.reported;
        if lost {
            self.reported = self.losses;
        }
        lost
    }

    /// The server has completed the flush of `ticket`, in `epoch`.
    pub(crate) fn flushed(&mut self, ticket: FlushTicket, epoch: u64) {
        if ticket.epoch == self.epoch && epoch == self.epoch {
            self.flushed = self.flushed.max(ticket.completed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flush_fails_after_unflushed_writes_went_with_a_connection() {
        let mut tracker = DurabilityTracker::default();
        tracker.wrote(0);
        tracker.lost(1);
        let ticket = tracker.begin();
        assert!(tracker.report_loss(ticket));
        let ticket = tracker.begin();
        assert!(!tracker.report_loss(ticket));
    }

    #[test]
    fn what_was_flushed_is_not_lost() {
        let mut tracker = DurabilityTracker::default();
        tracker.wrote(0);
        let ticket = tracker.begin();
        tracker.flushed(ticket, 0);
        tracker.lost(1);
        let ticket = tracker.begin();
        assert!(!tracker.report_loss(ticket));
    }

    #[test]
    fn a_write_completed_while_the_flush_ran_is_not_covered() {
        let mut tracker = DurabilityTracker::default();
        tracker.wrote(0);
        let ticket = tracker.begin();
        tracker.wrote(0);
        tracker.flushed(ticket, 0);
        tracker.lost(1);
        let ticket = tracker.begin();
        assert!(tracker.report_loss(ticket));
    }

    #[test]
    fn all_flushes_that_began_before_the_telling_fail() {
        let mut tracker = DurabilityTracker::default();
        tracker.wrote(0);
        let (a, b) = (tracker.begin(), tracker.begin());
        tracker.lost(1);
        assert!(tracker.report_loss(a));
        assert!(tracker.report_loss(b));
        let c = tracker.begin();
        assert!(!tracker.report_loss(c));
    }

    /// A write was answered, its connection was lost, and only then did the writer come to count it: counted
    /// in the new epoch, a flush of that epoch would have covered it.
    #[test]
    fn a_write_of_an_epoch_that_is_over_is_a_loss() {
        let mut tracker = DurabilityTracker::default();
        tracker.lost(1);
        tracker.wrote(0);
        let ticket = tracker.begin();
        assert!(tracker.report_loss(ticket));
    }

    #[test]
    fn a_flush_answered_in_another_epoch_covers_nothing() {
        let mut tracker = DurabilityTracker::default();
        tracker.wrote(0);
        let ticket = tracker.begin();
        tracker.flushed(ticket, 1);
        tracker.lost(1);
        tracker.flushed(ticket, 1);
        let ticket = tracker.begin();
        assert!(tracker.report_loss(ticket));
    }
}
