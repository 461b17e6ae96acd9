//! Error policy: what becomes of a failed operation, or of a guest write that failed at the target.
//!
//! Must hold: a range is dirty again *before* the policy is asked.

use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::Core;
use super::work::{InFlight, MAX_GIVEN_UP, MAX_TRIES};
use crate::error::Error;
use crate::options::OnError;
use crate::progress::{ErrorAction, Event, Operation};
use crate::scan::Failure;

/// Flushes tried under the `ignore` policy. Few: each try copies everything again, because a failed flush may
/// have lost any of it.
const MAX_FLUSH_TRIES: u32 = 3;

impl Core {
    /// Whether a copy that has failed `tries` times is left out if it fails once more.
    pub(super) fn is_last_try(&self, tries: u32) -> bool {
        tries + 1 >= MAX_TRIES && self.config.on_source_error == OnError::Ignore && !self.config.live
    }

    pub(super) fn failed(&mut self, now: Duration, op: InFlight, failure: Failure) {
        let range = op.work.range();
        let is_flush = op.work.is_flush();
        let mut news = false;
        if is_flush {
            self.writes_lost();
            self.durability.flush_ended(now, op.begun);
        } else {
            news = self.work.failed(range);
            // It may have happened all the same; then the next scan finds nothing to do, and only a flush
            // makes it last.
            self.durability.wrote(self.work.granules().round(range));
        }
        // No guest write waits while it is tried again.
        self.lifecycle.resume_guest();
        self.guests.release_reservation();
        let Failure { operation, error } = failure;
        if is_flush && error.kind() == block::ErrorKind::WritesLost {
            // The target says that it works again: what it has lost is copied again, without asking the user.
            return;
        }
        let no_space = error.kind() == block::ErrorKind::NoSpace;
        let action = match self.policy(operation, no_space) {
            ErrorAction::Ignore if is_flush => {
                let tries = self.durability.count_failure();
                let again = tries < MAX_FLUSH_TRIES || self.config.live;
                if again { ErrorAction::Ignore } else { ErrorAction::Report }
            }
            // What the guest has written anew gets new tries. A job on a tap leaves nothing out: it would
            // never be equal.
            ErrorAction::Ignore if op.tries + 1 >= MAX_TRIES && !news && !self.config.live => {
                ErrorAction::GiveUp
            }
            action => action,
        };
        let message = error.to_string();
        self.outbox.push(Event::Error { operation, action, range, message });
        match action {
            ErrorAction::Stop => self.lifecycle.stop(no_space, &mut self.outbox),
            ErrorAction::Ignore if is_flush => self.durability.back_off(now),
            ErrorAction::Ignore => {
                // A scan over a long range says nothing about where the fault is: looking closer is no try.
                let narrowing = range.len() > self.config.operation.max(self.config.detail);
                let tries = if narrowing || news { 1 } else { op.tries + 1 };
                self.work.retry_later(range, tries, now);
            }
            ErrorAction::GiveUp if self.work.is_failed_list_full() => {
                self.fail_with(Error::TooManyGivenUp { limit: MAX_GIVEN_UP, cause: error });
            }
            ErrorAction::GiveUp => self.work.leave_failed(range, &error, &mut self.counters),
            _ => self.fail(operation, error),
        }
    }

    /// A guest write to `range`, which is dirty again, has failed at the target.
    pub(super) fn guest_write_failed(&mut self, range: ByteRange, failure: Failure) {
        let Failure { operation, error } = failure;
        let no_space = error.kind() == block::ErrorKind::NoSpace;
        let action = self.policy(operation, no_space);
        self.outbox.push(Event::Error { operation, action, range, message: error.to_string() });
        // No guest write waits while it is tried again, or for the job to be resumed.
        self.lifecycle.resume_guest();
        match action {
            ErrorAction::Stop => self.lifecycle.stop(no_space, &mut self.outbox),
            ErrorAction::Ignore | ErrorAction::GiveUp => {}
            _ => self.fail(operation, error),
        }
    }

    /// The user's policy for a failure on this side.
    fn policy(&self, operation: Operation, no_space: bool) -> ErrorAction {
        let policy = match operation {
            Operation::Read => self.config.on_source_error,
            Operation::Write => self.config.on_target_error,
        };
        match policy {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if no_space => ErrorAction::Stop,
            _ => ErrorAction::Report,
        }
    }

    pub(super) fn fail_with(&mut self, error: Error) {
        self.lifecycle.fail(error, &mut self.outbox);
    }

    fn fail(&mut self, operation: Operation, error: block::Error) {
        self.fail_with(match operation {
            Operation::Read => Error::Source(error),
            Operation::Write => Error::Target(error),
        });
    }
}
