//! Requests that their callers have given up: who receives the replies, and who waits for them.
//!
//! Called by the connection when a caller was cancelled, and by the pool before a request. Must hold: as long
//! as a request is given up and the connection is alive, a thread receives replies.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use blockmirror_block::ByteRange;

use super::{ClientConnection, Sink};
use crate::client::error::ClientError;
use crate::client::requests::Op;
use crate::proto::{Command, CommandFlags};

impl ClientConnection {
    /// Has a thread receive the replies to requests that were given up, until there are none. Without a
    /// reader they fill the socket, and a server cuts off a client that does not read.
    pub(super) fn receive_given_up(self: &Arc<Self>) {
        {
            let mut shared = self.shared.lock();
            if shared.receiving || shared.dead.is_some() || shared.requests.given_up() == 0 {
                return;
            }
            shared.receiving = true;
        }
        let connection = Arc::clone(self);
        let receive = move || while connection.await_all_given_up() {};
        if thread::Builder::new().name("nbd-receive".into()).spawn(receive).is_err() {
            // The next caller receives them.
            self.shared.lock().receiving = false;
        }
    }

    /// Waits for the replies to all requests that are given up now; false if there are none, or if the
    /// connection is dead.
    fn await_all_given_up(&self) -> bool {
        let barrier = {
            let mut shared = self.shared.lock();
            let alive = shared.dead.is_none();
            let barrier = alive.then(|| shared.requests.add_barrier(|_| true, None)).flatten();
            shared.receiving = barrier.is_some();
            barrier
        };
        barrier.is_some_and(|barrier| self.await_barrier(barrier, None).is_ok())
    }

    /// Waits for the replies to changes of bytes of `range` that were given up: the server may make them
    /// until then.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub(crate) fn await_given_up(&self, range: ByteRange) -> Result<(), ClientError> {
        let deadline = self.deadline();
        let is_before = |op: &Op| op.changes() && op.range.overlaps(range);
        let barrier = self.shared.lock().requests.add_barrier(is_before, deadline);
        barrier.map_or(Ok(()), |barrier| self.await_barrier(barrier, deadline))
    }

    fn await_barrier(&self, barrier: u64, deadline: Option<Instant>) -> Result<(), ClientError> {
        let op = Op { command: Command::Flush, flags: CommandFlags::NONE, range: ByteRange::default() };
        self.await_reply(barrier, op, Sink::Nothing, deadline)
    }
}
