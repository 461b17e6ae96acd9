//! Connections beside a lost one: they get no new requests, and those in flight on them are still answered.
//!
//! A request is performed again on a new connection when its own was lost. Were the others cut off with it,
//! their requests would be repeated as well, though a server that is alive still performs them: a write that
//! it performs late lands on what a later write of the same bytes, on the new connection, has put there. So
//! the pool reconnects only once all that is in flight beside the lost connection is answered, or its time is
//! over. Called by the pool.
//!
//! Must hold: there is no new connection while there are retired ones.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::cancel;
use blockmirror_block::sync::MutexGuard;

use super::{ConnectionPool, State};
use crate::client::connection::ClientConnection;
use crate::client::error::ClientError;

/// How long requests on retired connections may take: as long as a disk has that is slow. A server whose host
/// or network is gone answers nothing.
const LIMIT: Duration = Duration::from_secs(30);

/// How often replies are looked for that no caller waits for.
const TICK: Duration = Duration::from_millis(20);

impl State {
    /// Closes the retired connections if nothing is in flight on them. Whether it did.
    pub(super) fn release_retired(&mut self) -> bool {
        // While there are retired ones, every request in flight is on one of them, or on the lost one.
        let is_quiet = |retired: &Arc<ClientConnection>| !retired.is_alive() || retired.given_up() == 0;
        if self.retired.is_empty() || self.in_flight > 0 || !self.retired.iter().all(is_quiet) {
            return false;
        }
        self.close_retired();
        true
    }

    fn close_retired(&mut self) {
        for retired in std::mem::take(&mut self.retired) {
            retired.fail(ClientError::lost(io::ErrorKind::TimedOut.into()));
        }
    }
}

impl ConnectionPool {
    /// How long retired connections have, so that half of the reconnect delay is left.
    pub(super) fn retire_limit(&self) -> Duration {
        match self.connector.options().reconnect_delay {
            Duration::ZERO => LIMIT,
            delay => LIMIT.min(delay / 2),
        }
    }

    /// Whether `connection` gets new requests: none beside it was lost.
    pub(super) fn is_in_use(&self, connection: &Arc<ClientConnection>) -> bool {
        self.state.lock().connections.iter().any(|other| Arc::ptr_eq(other, connection))
    }

    /// Waits until there are no retired connections: all that is in flight on them is answered, or their time
    /// is over. Ends early if `is_over`. The caller has no request in flight.
    pub(super) fn drain_retired<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        is_over: &dyn Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while !state.release_retired() && !state.retired.is_empty() && !is_over(&state) {
            let left = state.retired_until.map(|until| until.saturating_duration_since(Instant::now()));
            match left {
                Some(left) if !left.is_zero() => {
                    state = cancel::wait(&self.changed, state, Some(left.min(TICK)));
                }
                _ => state.close_retired(),
            }
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::Ordering;
    use std::thread;

    use blockmirror_block::ByteRange;
    use blockmirror_block::cancel::CancelSource;

    use super::super::tests::{connected, connection};
    use super::*;
    use crate::client::connection::Sink;
    use crate::client::requests::Op;
    use crate::proto::{Command, CommandFlags};

    const WRITE: Op =
        Op { command: Command::Write, flags: CommandFlags::NONE, range: ByteRange::new(0, 512) };

    /// Has `pool` lose a second connection once the server of the first has a write in hand.
    fn lose_beside_a_write(pool: &Arc<ConnectionPool>, server: &mut UnixStream) {
        server.read_exact(&mut [0; 28 + 512]).unwrap();
        let (second, _) = connection();
        let second = Arc::new(second);
        pool.state.lock().connections.push(Arc::clone(&second));
        let lost = ClientError::lost(io::ErrorKind::ConnectionReset.into());
        let _ = pool.lost(&second, lost, &mut pool.retry_state());
        assert_eq!(pool.state.lock().retired.len(), 1);
    }

    #[test]
    fn a_silent_server_has_a_limit() {
        let (pool, mut server) = connected();
        thread::scope(|scope| {
            let write = scope.spawn(|| pool.call(WRITE, &[1; 512], Sink::Nothing));
            lose_beside_a_write(&pool, &mut server);
            // A drain that ends early leaves them.
            drop(pool.drain_retired(pool.state.lock(), &|_| true));
            assert_eq!(pool.state.lock().retired.len(), 1);
            pool.state.lock().retired_until = Some(Instant::now());
            // There is no server to connect to.
            assert!(pool.call(WRITE, &[1; 512], Sink::Nothing).is_err());
            assert!(matches!(write.join().unwrap(), Err(ClientError::Lost(_))));
            assert!(pool.state.lock().retired.is_empty());
        });
    }

    #[test]
    fn they_are_closed_with_the_pool_and_when_nothing_is_in_flight() {
        for close in [true, false] {
            let (pool, mut server) = connected();
            thread::scope(|scope| {
                let write = scope.spawn(|| pool.call(WRITE, &[1; 512], Sink::Nothing));
                lose_beside_a_write(&pool, &mut server);
                if close {
                    pool.close();
                } else {
                    drop(server);
                }
                assert!(write.join().unwrap().is_err());
                assert!(pool.state.lock().retired.is_empty(), "{close}");
            });
        }
    }

    /// A write that was given up was forgotten with the lost connection, and a later one overtook it.
    #[test]
    fn what_was_given_up_is_waited_for_there() {
        let (pool, mut server) = connected();
        let source = CancelSource::new();
        thread::scope(|scope| {
            let write = scope.spawn(|| {
                let _calls = source.enter();
                pool.call(WRITE, &[1; 512], Sink::Nothing)
            });
            lose_beside_a_write(&pool, &mut server);
            source.cancel();
            assert!(matches!(write.join().unwrap(), Err(ClientError::Cancelled)));
        });
        assert!(pool.await_given_up(ByteRange::new(4096, 8192)).is_ok());
        assert!(pool.given_up.load(Ordering::SeqCst));
        assert_eq!(pool.state.lock().retired.len(), 1);
        pool.close();
    }
}
