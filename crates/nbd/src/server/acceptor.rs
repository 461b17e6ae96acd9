//! The acceptor: one thread of a server accepts connections at its listeners. While there are connections it
//! also checks them periodically, and aborts those that have stalled or are too slow while others starve.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::warn;

use super::ServerError;
use super::acceptor_state::Acceptor;
use super::connection::Connection;
use super::listener::Listener;
use super::memory::RESERVE;
use super::options::MIN_RATE;
use super::state::ServerState;

/// Longest interval between two checks for stalled connections; shorter if `stall_limit` is.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// How long nothing is accepted after the system had no descriptor or memory for a connection.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Most connections that are accepted at a listener before the acceptor does what else it has to.
const ACCEPTS_PER_TURN: usize = 64;

impl Acceptor {
    /// Accepts at `listener` too.
    pub(crate) fn add(&self, server: &Arc<ServerState>, listener: Listener) -> Result<(), ServerError> {
        self.start(server)?;
        let mut state = self.state.lock();
        if state.closed {
            return Err(ServerError::Stopped);
        }
        state.listeners.push(Arc::new(listener));
        drop(state);
        self.waker.wake();
        Ok(())
    }

    /// Starts the thread if it does not run.
    pub(crate) fn start(&self, server: &Arc<ServerState>) -> Result<(), ServerError> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(ServerError::Stopped);
        }
        if state.thread.is_none() {
            let server = Arc::clone(server);
            let thread = thread::Builder::new()
                .name("nbd-acceptor".into())
                .spawn(move || server.acceptor().work(&server))
                .map_err(|cause| ServerError::System { what: "start a thread", cause })?;
            state.thread = Some(thread);
        }
        Ok(())
    }

    fn work(&self, server: &Arc<ServerState>) {
        let mut stalls = StallCheck::default();
        let mut backoff_until: Option<Instant> = None;
        let mut refusing = false;
        loop {
            let listeners = {
                let state = self.state.lock();
                if state.closed {
                    return;
                }
                state.listeners.clone()
            };
            let now = Instant::now();
            if backoff_until.is_some_and(|until| until <= now) {
                backoff_until = None;
            }
            let open = server.connection_limit.has_room() && backoff_until.is_none();
            let mut fds = vec![PollFd::new(&*self.waker.0, PollFlags::IN)];
            if open {
                fds.extend(listeners.iter().map(|listener| PollFd::new(&**listener, PollFlags::IN)));
            }
            let timeout = match backoff_until {
                Some(until) => Some(until.saturating_duration_since(now)),
                None => (server.connections() > 0).then_some(check_interval(server)),
            };
            let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
            // After an interrupted wait nothing is ready.
            let _ = poll(&mut fds, timeout.as_ref());
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready.first() == Some(&true) {
                self.waker.clear();
            }
            for (listener, _) in listeners.iter().zip(ready.iter().skip(1)).filter(|(_, ready)| **ready) {
                let accepted = accept_waiting(server, listener);
                if let Err(error) = &accepted {
                    server.handshakes.end_oldest();
                    backoff_until = Some(Instant::now() + ACCEPT_BACKOFF);
                    if !refusing {
                        warn!(%error, "clients wait until the system can take them");
                    }
                }
                refusing = accepted.is_err();
            }
            stalls.check(server);
            if server.connections() == 0 {
                server.memory.trim();
            }
        }
    }
}

/// Accepts what waits at `listener`, up to the connection limit, and no more than [`ACCEPTS_PER_TURN`]:
/// clients may connect as fast as they are accepted. Fails if the system has no descriptor, thread or memory
/// left.
fn accept_waiting(server: &Arc<ServerState>, listener: &Listener) -> Result<(), ServerError> {
    for _ in 0..ACCEPTS_PER_TURN {
        if !server.connection_limit.has_room() {
            break;
        }
        match listener.accept() {
            Ok(fd) => match server.serve(fd) {
                Err(error @ ServerError::System { .. }) => return Err(error),
                Err(ServerError::Stopped) => return Ok(()),
                _ => {}
            },
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // This client has gone again.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
            Err(cause) => return Err(ServerError::System { what: "accept a client", cause }),
        }
    }
    Ok(())
}

/// Progress of the connections whose peers owe bytes: how many had moved at the last check, and since when it
/// has been that many.
#[derive(Default)]
struct StallCheck {
    seen: HashMap<(usize, u64), (u64, Instant)>,
    last: Option<Instant>,
}

impl StallCheck {
    fn check(&mut self, server: &Arc<ServerState>) {
        let now = Instant::now();
        let interval = check_interval(server);
        if self.last.is_some_and(|last| now < last + interval) {
            return;
        }
        // The minimum rate holds only while a client has been starved since the last check.
        let lacking = self.last.and_then(|last| server.memory.lacking(last));
        self.last = Some(now);
        let millis = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        let least = millis.saturating_mul(MIN_RATE) / 1000;
        let mut slow = Vec::new();
        let before = std::mem::take(&mut self.seen);
        for runtime in server.exports() {
            for connection in runtime.connections() {
                let Some(moved) = connection.awaited_progress() else { continue };
                let key = (Arc::as_ptr(&runtime).addr(), connection.id);
                let then = before.get(&key);
                let since = match then {
                    Some((then, since)) if *then == moved => *since,
                    _ => now,
                };
                if now.duration_since(since) >= server.options.stall_limit {
                    connection.log_abort("the client has stalled");
                    connection.abort();
                    continue;
                }
                self.seen.insert(key, (moved, since));
                let held = connection.account.held();
                if then.is_some_and(|(then, _)| moved - then < least) && held > RESERVE {
                    slow.push((held, connection));
                }
            }
        }
        if let Some(lacking) = lacking {
            abort_slow(slow, lacking);
        }
        server.memory.trim();
    }
}

/// Aborts those of `slow` that hold most, until `lacking` bytes will be freed.
fn abort_slow(mut slow: Vec<(u64, Arc<Connection>)>, mut lacking: u64) {
    slow.sort_by_key(|(held, _)| Reverse(*held));
    for (held, connection) in slow {
        if lacking == 0 {
            return;
        }
        connection.log_abort("the client is slow, and others lack the memory that it holds");
        connection.abort();
        lacking = lacking.saturating_sub(held);
    }
}

/// Time between two checks.
fn check_interval(server: &ServerState) -> Duration {
    CHECK_INTERVAL.min(server.options.stall_limit / 12)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::server::ServerOptions;

    /// Clients that connected as fast as they were accepted kept the acceptor from everything else, the end
    /// of the server included.
    #[test]
    fn one_turn_accepts_a_bounded_number_and_none_once_the_server_stops() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::unix(&path).unwrap();
        let server = ServerState::new(ServerOptions::default()).unwrap();
        let _clients: Vec<_> = (0..100).map(|_| UnixStream::connect(&path).unwrap()).collect();
        accept_waiting(&server, &listener).unwrap();
        assert_eq!(server.connections(), 64);
        server.close();
        accept_waiting(&server, &listener).unwrap();
        assert!(listener.accept().is_ok(), "36 waited, and at most one was taken");
    }

    /// Once the acceptor had started to wait, without a timeout, before the first client was counted: no
    /// client was ever checked then.
    #[test]
    fn a_client_that_the_acceptor_did_not_accept_wakes_it() {
        let server = ServerState::new(ServerOptions::default()).unwrap();
        let (_client, theirs) = UnixStream::pair().unwrap();
        // The acceptor's thread does not run, so nothing clears the waker.
        server.serve(theirs.into()).unwrap();
        let waker = server.acceptor().waker();
        let mut fds = [PollFd::new(&*waker.0, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::default())), Ok(1));
    }
}
