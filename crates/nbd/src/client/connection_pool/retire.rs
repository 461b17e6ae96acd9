//! Connections beside a lost one: they get no new requests, and those in flight on them are still answered.
//!
//! A request is performed again on a new connection when its own was lost. Were the others cut off with it,
//! their requests would be repeated as well, though a server that is alive still performs them: a write that
//! it performs late lands on what a later write of the same bytes, on the new connection, has put there. So
//! the pool reconnects only once all that is in flight beside the lost connection is answered, or its time is
//! over. Called by the pool.
//!
//! Must hold: there is no new connection while a request is in flight on a retired one that is alive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::cancel;
use blockmirror_block::sync::MutexGuard;

use super::{ConnectionPool, State};
use crate::client::connection::ClientConnection;
use crate::client::error::ClientError;

/// How long retired connections may take. A server whose host or network is gone answers nothing, and the
/// requests on them are performed again; one that is there has had the time of a slow disk.
const RETIRE_LIMIT: Duration = Duration::from_secs(5);

/// How often replies are looked for that no caller waits for.
const TICK: Duration = Duration::from_millis(20);

impl ConnectionPool {
    /// Whether `connection` gets new requests: none beside it was lost.
    pub(super) fn is_in_use(&self, connection: &Arc<ClientConnection>) -> bool {
        self.state.lock().connections.iter().any(|other| Arc::ptr_eq(other, connection))
    }

    /// Waits until what is in flight on retired connections is answered, and closes them. Ends early if
    /// `is_over`; they are kept then.
    pub(super) fn drain_retired<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        is_over: &dyn Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let until = Instant::now() + RETIRE_LIMIT;
        while state.retired.iter().any(|retired| is_busy(retired)) {
            if is_over(&state) {
                return state;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = cancel::wait(&self.changed, state, Some(left.min(TICK)));
        }
        let silent = std::io::ErrorKind::TimedOut;
        for retired in std::mem::take(&mut state.retired) {
            retired.fail(ClientError::lost(silent.into()));
        }
        state
    }
}

fn is_busy(connection: &ClientConnection) -> bool {
    connection.is_alive() && (connection.in_flight() > 0 || connection.given_up() > 0)
}
