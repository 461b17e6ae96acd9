//! Which request lost the connection: a server may hang up instead of answering that a read has failed.
//!
//! All requests that were in flight with it fail, and nothing shows which of them the server did not like. So
//! each of them that changes nothing at the server is performed once more while no other request is in
//! flight. One that is answered then has not failed; one that loses the connection again is the cause.
//! Called by the pool when it would report a loss; without this a copy that leaves out failed ranges also
//! leaves out good ranges that were read beside them.
//!
//! A request whose caller has given it up may be the cause as well, until the server has answered it. No
//! caller waits for that, and it may take long, so a repetition does not either: if its connection is lost
//! with such a request, it is performed once more.
//!
//! Must hold: at most one request is repeated alone; the others wait for it, however it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::cancel;

use super::{ConnectionPool, RetryState, State};
use crate::client::connection::Sink;
use crate::client::error::ClientError;
use crate::client::requests::Op;
use crate::proto::Command;

/// How long the others may take to end before one is repeated alone: as long as a disk has that is slow. They
/// began after the loss, or beside it (`retire`), and wait for a server that answers.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// No other request of the pool gets a connection while this lives.
struct Alone<'a>(&'a ConnectionPool);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.state.lock().is_one_alone = false;
        self.0.changed.notify_all();
    }
}

impl ConnectionPool {
    /// Performs a request once more that was lost with a connection, unless it caused the loss. `lost` is why
    /// it failed.
    pub(super) fn repeat_alone(
        self: &Arc<Self>,
        op: Op,
        mut sink: Sink<'_>,
        mut retry: RetryState,
        lost: ClientError,
    ) -> Result<(), ClientError> {
        let changes_nothing = matches!(op.command, Command::Read | Command::BlockStatus);
        // A server that gives no answer in time would cost each of them that time.
        if !changes_nothing || !matches!(lost, ClientError::Lost(_)) {
            return Err(lost);
        }
        let Some(_alone) = self.begin_alone(&mut retry) else { return Err(lost) };
        loop {
            let connection = match self.acquire(&mut retry) {
                Ok(connection) => connection,
                Err(ClientError::Cancelled) => return Err(ClientError::Cancelled),
                Err(_) => return Err(lost),
            };
            let error = match connection.call(op, &[], sink.again()) {
                Ok(()) => {
                    self.succeeded(&connection, op);
                    return Ok(());
                }
                Err(error) if error.is_answer() => return Err(error),
                Err(error) => self.lost(&connection, error.clone(), &mut retry).err().unwrap_or(error),
            };
            // Requests that were given up go with their connections, and no other has one: a second loss is
            // this one's.
            let may_be_others = matches!(error, ClientError::Lost(_)) && !self.was_alone(connection.epoch);
            if !may_be_others {
                return Err(error);
            }
        }
    }

    /// Whether one request was in flight when `epoch` was lost.
    fn was_alone(&self, epoch: u64) -> bool {
        self.state.lock().last_loss.is_some_and(|loss| loss.epoch == epoch && loss.in_flight == 1)
    }

    /// Waits until no other request is in flight, and keeps it so; `None` if that makes no sense (any more).
    fn begin_alone(&self, retry: &mut RetryState) -> Option<Alone<'_>> {
        let (epoch, failures) = retry.lost_epoch?;
        let is_of_use = |state: &State, retry: &RetryState| {
            // Where the server is not there, one attempt for each request would take long.
            let is_down = state.failures > failures && state.connections.is_empty();
            let is_cancelled = state.cancelled != retry.cancelled || cancel::is_cancelled();
            !(is_down || state.closed || state.fail_fast || is_cancelled)
        };
        let mut state = self.state.lock();
        if state.last_loss.is_some_and(|loss| loss.epoch == epoch && loss.in_flight == 1) {
            // It was alone.
            return None;
        }
        while state.is_one_alone {
            if cancel::is_cancelled() {
                return None;
            }
            state = cancel::wait(&self.changed, state, None);
        }
        state.is_one_alone = true;
        state = self.drain_retired(state, &|state| !is_of_use(state, retry));
        let until = Instant::now() + DRAIN_LIMIT;
        while is_of_use(&state, retry) && state.in_flight > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = cancel::wait(&self.changed, state, Some(left));
        }
        if is_of_use(&state, retry) && state.in_flight == 0 {
            retry.is_alone = true;
            return Some(Alone(self));
        }
        state.is_one_alone = false;
        self.changed.notify_all();
        None
    }
}
