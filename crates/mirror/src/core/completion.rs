//! What comes of an operation: progress, or the error policy.

use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::retry::{MAX_GIVEN_UP, MAX_TRIES, pace};
use super::{Core, Done, InFlight, Moved, Phase, Queued, Walk, Work};
use crate::error::Error;
use crate::options::OnError;
use crate::progress::{ErrorAction, Event, IoStatus, Operation};
use crate::survey::{Failure, Need, Segment};

/// Flushes tried under the `ignore` policy. Few: each try copies everything again, because a failed flush may have lost any
/// of it.
const MAX_FLUSH_TRIES: u32 = 3;

impl Core {
    /// Reports what came of the action `id`. Reports of unknown actions are ignored.
    pub(crate) fn finished(&mut self, now: Duration, id: u64, result: Result<Done, Failure>) {
        let Some(index) = self.in_flight.iter().position(|op| op.id == id) else { return };
        let op = self.in_flight.swap_remove(index);
        if !matches!(self.phase, Phase::Running) {
            self.conclude_if_idle();
            return;
        }
        match (result, op.work) {
            (Ok(Done::Surveyed(segments)), Work::Survey { range, first_pass }) => {
                self.surveyed(Walk { range, tries: op.tries, first_pass }, segments);
            }
            (Ok(Done::Copied(moved)), Work::Copy { range, .. }) => self.completed(range, moved),
            (Ok(Done::Zeroed), Work::Zero { range, .. }) => {
                self.completed(range, Moved { zeroed: range.len(), ..Moved::default() });
            }
            (Ok(Done::ZeroUnsupported), Work::Zero { range, .. }) => {
                self.zero_by_data = true;
                self.queue.push_front(Queued { range, need: Need::Zero, tries: op.tries });
            }
            (Ok(_), Work::Flush) => self.flushed(),
            (Ok(_), Work::Survey { range, .. } | Work::Copy { range, .. } | Work::Zero { range, .. }) => {
                // The report does not fit the action, which cannot be; the range is simply not done.
                self.claimed.remove(range);
                self.dirty.set(range.start()..range.end());
            }
            (Err(failure), _) => self.failed(now, op, failure),
        }
        self.conclude_if_idle();
    }

    fn surveyed(&mut self, walk: Walk, segments: Vec<Segment>) {
        let end = segments.last().map_or(walk.range.start(), |last| last.range.end());
        let rest = ByteRange::new(end, walk.range.end());
        if !rest.is_empty() {
            self.walks.push_front(Walk { range: rest, ..walk });
        }
        for segment in segments {
            if segment.below {
                self.enqueue_below(segment, walk.tries);
            } else {
                self.enqueue(segment.range, segment.need, walk.tries);
            }
        }
    }

    /// A segment that the top image does not decide is left to the target's backing file, except where the guest has
    /// written since the start (and discarded again): there the target may hold something else by now.
    fn enqueue_below(&mut self, segment: Segment, tries: u32) {
        let mut at = segment.range.start();
        let end = segment.range.end();
        while at < end {
            let written = self.guest_written.as_ref().and_then(|map| map.next_dirty(at, end - at));
            let written = written.map_or(ByteRange::new(end, end), |run| ByteRange::new(run.start, run.end));
            let written = written.intersect(segment.range);
            let untouched = ByteRange::new(at, if written.is_empty() { end } else { written.start() });
            self.enqueue(untouched, Need::Nothing, tries);
            self.enqueue(written, segment.need, tries);
            at = untouched.end().max(written.end());
        }
    }

    fn enqueue(&mut self, range: ByteRange, need: Need, tries: u32) {
        if range.is_empty() {
            return;
        }
        match need {
            Need::Nothing => {
                let moved = Moved { skipped: range.len(), ..Moved::default() };
                return self.completed(range, moved);
            }
            Need::Copy { .. } => self.queued_copy += range.len(),
            Need::Zero => {}
        }
        self.queue.push_back(Queued { range, need, tries });
    }

    fn completed(&mut self, range: ByteRange, moved: Moved) {
        self.claimed.remove(range);
        self.given_up.remove(range);
        self.offset += range.len();
        self.done.copied += moved.copied;
        self.done.zeroed += moved.zeroed;
        self.done.skipped += moved.skipped;
    }

    fn flushed(&mut self) {
        if self.dirty.is_clean() {
            self.phase = Phase::Concluded(Ok(()));
        }
    }

    fn failed(&mut self, now: Duration, op: InFlight, failure: Failure) {
        let range = match op.work {
            Work::Survey { range, .. } | Work::Copy { range, .. } | Work::Zero { range, .. } => range,
            Work::Flush => ByteRange::default(),
        };
        // First of all the range is dirty again, whatever the policy says. Bits that were set already are news from
        // the guest that arrived meanwhile.
        let units = self.whole_units(range);
        let news = self.dirty.dirty_bytes_in(units.start()..units.end()) > 0;
        self.claimed.remove(range);
        if op.work == Work::Flush {
            // Anything written since the last good flush may be lost, and in this job there was none.
            self.dirty.set_all();
            self.retries.clear();
        } else {
            self.dirty.set(units.start()..units.end());
        }

        let Failure { operation, error } = failure;
        let no_space = error.kind() == block::ErrorKind::NoSpace;
        let policy = match operation {
            Operation::Read => self.config.on_source_error,
            Operation::Write => self.config.on_target_error,
        };
        let action = match policy {
            OnError::Report => ErrorAction::Report,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if no_space => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
            OnError::Ignore if op.work == Work::Flush => {
                self.flush_tries += 1;
                if self.flush_tries < MAX_FLUSH_TRIES { ErrorAction::Ignore } else { ErrorAction::Report }
            }
            // What the guest has written anew gets new tries.
            OnError::Ignore if op.tries + 1 < MAX_TRIES || news => ErrorAction::Ignore,
            OnError::Ignore => ErrorAction::GiveUp,
        };
        let message = error.to_string();
        self.push_event(Event::Error { operation, action, range, message: message.clone() });
        match action {
            ErrorAction::Report => self.fail(operation, error),
            ErrorAction::Stop => {
                if !self.stopped_by_error {
                    self.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
                }
                self.stopped_by_error = true;
            }
            ErrorAction::Ignore if op.work == Work::Flush => {
                self.flush_not_before = now.saturating_add(pace(self.flush_tries));
            }
            ErrorAction::Ignore => {
                // A survey over a long range says nothing about where the fault is: looking closer is no try.
                let narrowing = range.len() > self.config.operation.max(self.config.detail);
                let tries = if narrowing || news { 1 } else { op.tries + 1 };
                self.retries.put(units, tries, self.config.detail, now);
            }
            ErrorAction::GiveUp if self.given_up.is_full() => {
                self.phase = Phase::Aborting(Error::TooManyGivenUp { limit: MAX_GIVEN_UP, cause: error });
            }
            ErrorAction::GiveUp => {
                self.dirty.clear(units.start()..units.end());
                self.given_up.insert(range, message);
                self.offset += range.len();
            }
        }
    }

    fn fail(&mut self, operation: Operation, error: block::Error) {
        self.phase = Phase::Aborting(match operation {
            Operation::Read => Error::Source(error),
            Operation::Write => Error::Target(error),
        });
    }
}
