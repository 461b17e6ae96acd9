//! Which completed writes a flush still owes durability.
//!
//! A server that is killed forgets what it had not flushed, and the client, reconnected, cannot tell a killed
//! server from a cut wire. So writes that were completed and not flushed when a connection was lost count as
//! lost, and the next flush must say so. Pure; the pool holds it under its lock.

/// Counts of writes, flushes and losses.
///
/// An *epoch* is the life of one set of connections; the pool numbers them.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    epoch: u64,
    /// Writes completed in this epoch, and how many of those a flush has covered.
    completed: u64,
    flushed: u64,
    /// How often unflushed writes went with an epoch, and how many of those were reported to callers.
    losses: u64,
    reported: u64,
}

/// What a flush knows of its beginning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    epoch: u64,
    completed: u64,
    reported: u64,
}

impl Ledger {
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

    /// A flush begins; ask [`verdict`](Self::verdict) at its end.
    pub(crate) fn begin(&self) -> Ticket {
        Ticket { epoch: self.epoch, completed: self.completed, reported: self.reported }
    }

    /// Whether a flush that has `ticket` must fail because of losses. All flushes that began before a loss
    /// was reported fail; those that begin afterwards do not.
    pub(crate) fn verdict(&mut self, ticket: Ticket) -> bool {
        let lost = self.losses > ticket.reported;
        if lost {
            self.reported = self.losses;
        }
        lost
    }

    /// The server has done the flush of `ticket`, in `epoch`.
    pub(crate) fn flushed(&mut self, ticket: Ticket, epoch: u64) {
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
        let mut ledger = Ledger::default();
        ledger.wrote(0);
        ledger.lost(1);
        let ticket = ledger.begin();
        assert!(ledger.verdict(ticket));
        let ticket = ledger.begin();
        assert!(!ledger.verdict(ticket));
    }

    #[test]
    fn what_was_flushed_is_not_lost() {
        let mut ledger = Ledger::default();
        ledger.wrote(0);
        let ticket = ledger.begin();
        ledger.flushed(ticket, 0);
        ledger.lost(1);
        let ticket = ledger.begin();
        assert!(!ledger.verdict(ticket));
    }

    #[test]
    fn a_write_completed_while_the_flush_ran_is_not_covered() {
        let mut ledger = Ledger::default();
        ledger.wrote(0);
        let ticket = ledger.begin();
        ledger.wrote(0);
        ledger.flushed(ticket, 0);
        ledger.lost(1);
        let ticket = ledger.begin();
        assert!(ledger.verdict(ticket));
    }

    #[test]
    fn all_flushes_that_began_before_the_telling_fail() {
        let mut ledger = Ledger::default();
        ledger.wrote(0);
        let (a, b) = (ledger.begin(), ledger.begin());
        ledger.lost(1);
        assert!(ledger.verdict(a));
        assert!(ledger.verdict(b));
        let c = ledger.begin();
        assert!(!ledger.verdict(c));
    }

    /// A write was answered, its connection was lost, and only then did the writer come to count it: counted
    /// in the new epoch, a flush of that would have vouched for it.
    #[test]
    fn a_write_of_an_epoch_that_is_over_is_a_loss() {
        let mut ledger = Ledger::default();
        ledger.lost(1);
        ledger.wrote(0);
        let ticket = ledger.begin();
        assert!(ledger.verdict(ticket));
    }

    #[test]
    fn a_flush_answered_in_another_epoch_covers_nothing() {
        let mut ledger = Ledger::default();
        ledger.wrote(0);
        let ticket = ledger.begin();
        ledger.flushed(ticket, 1);
        ledger.lost(1);
        ledger.flushed(ticket, 1);
        let ticket = ledger.begin();
        assert!(ledger.verdict(ticket));
    }
}
