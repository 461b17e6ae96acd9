//! Admission of a guest write: counted, marked in the log, admitted by the job; or refused.
//!
//! Called for every write that has an observer; [`write_unobserved`](Tap::write_unobserved) is the short way
//! of the others. Must hold: a write that is refused is counted nowhere.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use super::Tap;
use super::drain::given_up;
use super::log::Entered;
use super::ticket::{Begin, Change, EnteredWrite, OpenWrite, Route, WriteTicket};
use crate::machine::Admission;

/// The answer to a write that asks.
enum Answer {
    Go(EnteredWrite),
    /// It would have to wait. It is to ask again after this time, if nothing wakes its caller before.
    Wait(Option<Duration>),
}

impl Tap {
    /// Announces a guest write to `range`; waits for its admission. The caller writes to the ticket's
    /// [`source`](WriteTicket::source) and [`target`](WriteTicket::target), then completes it.
    ///
    /// A thread that begins a write while it has others open may wait for another that waits for those: it
    /// completes them first, or asks from another thread.
    ///
    /// # Errors
    /// [`OutOfBounds`](block::ErrorKind::OutOfBounds) if `range` reaches past the end of the disk.
    pub fn begin_write(&self, range: ByteRange) -> block::Result<WriteTicket> {
        self.begin_change(Change::Data, range)
    }

    /// The same for any change of the range.
    ///
    /// # Errors
    /// As [`begin_write`](Self::begin_write).
    pub fn begin_change(&self, change: Change, range: ByteRange) -> block::Result<WriteTicket> {
        let entered = self.enter_waiting(change.operation(), range)?;
        Ok(self.ticket(change, range, entered))
    }

    /// The same without waiting: [`Begin::Wait`] if the write would have to. Who wants to be woken then asks
    /// by a [`queue`](Self::queue).
    ///
    /// # Errors
    /// As [`begin_write`](Self::begin_write).
    pub fn try_begin_write(&self, range: ByteRange) -> block::Result<Begin> {
        self.try_begin_change(Change::Data, range)
    }

    /// The same for any change of the range.
    ///
    /// # Errors
    /// As [`begin_write`](Self::begin_write).
    pub fn try_begin_change(&self, change: Change, range: ByteRange) -> block::Result<Begin> {
        Ok(match self.enter(change.operation(), range, false)? {
            Answer::Go(entered) => Begin::Go(self.ticket(change, range, entered)),
            Answer::Wait(within) => Begin::Wait { within },
        })
    }

    /// Announces a write that waits for its admission.
    pub(super) fn begin_open(&self, change: Change, range: ByteRange) -> block::Result<OpenWrite<&Self>> {
        Ok(OpenWrite::new(self, range, self.enter_waiting(change.operation(), range)?))
    }

    fn enter_waiting(&self, operation: &'static str, range: ByteRange) -> block::Result<EnteredWrite> {
        loop {
            if let Answer::Go(entered) = self.enter(operation, range, true)? {
                return Ok(entered);
            }
        }
    }

    /// Counts a write and has it admitted. If it would have to wait: waits if it `may_wait`.
    fn enter(&self, operation: &'static str, range: ByteRange, may_wait: bool) -> block::Result<Answer> {
        loop {
            if let Some(shard) = self.in_flight.begin() {
                // While the write is counted the device below stays.
                let below = self.below.load();
                if let Err(error) = below.check_bounds(operation, range) {
                    self.end_unobserved(shard, ByteRange::default());
                    return Err(error);
                }
                return Ok(Answer::Go(EnteredWrite { below, route: Route::Unobserved(shard), pin: None }));
            }
            let (below, session, log) = {
                let state = self.state.lock();
                if state.drains > 0 && !may_wait {
                    return Ok(Answer::Wait(None));
                }
                let mut state = self.wait_for_resume(state, operation, range)?;
                if state.is_idle() {
                    // There is no observer any more.
                    continue;
                }
                let below = self.below.load();
                below.check_bounds(operation, range)?;
                state.writes += 1;
                let session = state.session.as_ref();
                let session = session.map(|session| (session.id, Arc::clone(&session.observer)));
                (below, session, state.log.clone())
            };
            let job = session.as_ref().map(|(_, observer)| &**observer);
            let pin = match self.enter_log(log, (operation, range), may_wait, job) {
                Ok(Entered::Go(pin)) => pin,
                refused => {
                    self.end_write(ByteRange::default(), session.map(|(session, _)| session), |_| {});
                    let Entered::Wait(within) = refused? else { continue };
                    return Ok(Answer::Wait(within));
                }
            };
            let Some((session, observer)) = session else {
                return Ok(Answer::Go(EnteredWrite { below, route: Route::Observed, pin }));
            };
            let (id, admission, within) = match may_wait {
                true => observer.begin_write(range),
                false => observer.try_begin_write(range),
            };
            let both = match admission {
                Admission::SourceOnly => None,
                Admission::SourceAndTarget => Some(observer),
                Admission::Wait | Admission::JobEnded => {
                    self.end_write(ByteRange::default(), Some(session), |_| {});
                    if admission == Admission::Wait {
                        return if may_wait {
                            Err(given_up(operation, range))
                        } else {
                            Ok(Answer::Wait(within))
                        };
                    }
                    self.detach(session);
                    continue;
                }
            };
            return Ok(Answer::Go(EnteredWrite { below, route: Route::Admitted { session, id, both }, pin }));
        }
    }

    fn ticket(&self, change: Change, range: ByteRange, entered: EnteredWrite) -> WriteTicket {
        #[expect(clippy::expect_used, reason = "a tap is only ever made inside an Arc, and `self` is alive")]
        let tap = self.this.upgrade().expect("the tap is alive");
        WriteTicket::new(change, OpenWrite::new(tap, range, entered))
    }
}
