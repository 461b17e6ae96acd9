//! The connections of one client: how many there are, which one a request uses, and what follows their loss.
//!
//! All connections belong to one *epoch* and are given up together: when one is lost, it is unknown whether
//! the others still lead to the same run of the server, and whether a flush on them would cover its writes.
//! What is in flight on the others is still answered there, before there is a new connection ([`retire`]).
//! For the same reason a further connection is used only once the first has answered a request that was sent
//! after the further one was there. There is no reconnection in the background: the first request that finds
//! no connection makes one, and those that come meanwhile wait for it. Further connections are made by a
//! thread of their own while the first is in use, because a server that accepts no more may leave them
//! hanging.

mod reconnect;
mod repeat_alone;
mod retire;

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Instant;

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{ByteRange, cancel};

use self::reconnect::{random, widen};
use super::backoff::backoff;
use super::connect::{CancelToken, Connector};
use super::connection::{ClientConnection, Sink};
use super::durability::DurabilityTracker;
use super::error::ClientError;
use super::handshake::NegotiatedExport;
use super::requests::Op;
use super::socket::ClientSocket;
use crate::proto::{Command, CommandFlags, TransmissionFlags};

#[derive(Debug)]
pub(crate) struct ConnectionPool {
    connector: Connector,
    /// The export as it was when it was opened.
    first: NegotiatedExport,
    /// *Guards* the connections, the epoch and what is known of lost writes. *Order*: before the locks of a
    /// connection. *Not under it*: I/O; but lost connections are aborted under it, which does not wait, so
    /// that nothing of theirs is delivered once there is a new one.
    state: Mutex<State>,
    changed: Condvar,
    /// A caller has given a request up. Changes under `state`.
    given_up: AtomicBool,
}

#[derive(Debug)]
struct State {
    epoch: u64,
    /// Empty while there is no connection.
    connections: Vec<Arc<ClientConnection>>,
    /// Those that were beside a lost one, for the answers to what is in flight on them.
    retired: Vec<Arc<ClientConnection>>,
    /// How long those may take.
    retired_until: Option<Instant>,
    /// Whether a connection of this epoch beyond the first was tried.
    widened: bool,
    /// A request makes a connection, with these sockets so far.
    connecting: bool,
    sockets: Vec<Weak<ClientSocket>>,
    /// Since when no request has succeeded after a loss, and how many connections were tried since.
    down_since: Option<Instant>,
    attempts: u32,
    /// How many attempts have ever failed, and why the last one did.
    failures: u64,
    last_failure: Option<ClientError>,
    /// Goes up when all requests are cancelled.
    cancelled: u64,
    /// Requests do not wait for a reconnection until one has succeeded.
    fail_fast: bool,
    closed: bool,
    durability: DurabilityTracker,
    /// Requests that use a connection.
    in_flight: usize,
    /// A request is repeated alone: no other gets a connection.
    is_one_alone: bool,
    last_loss: Option<Loss>,
}

/// The loss of an epoch.
#[derive(Clone, Copy, Debug)]
struct Loss {
    epoch: u64,
    /// How many requests were in flight, those that their callers had given up included.
    in_flight: usize,
}

/// Until when one request is retried.
#[derive(Debug)]
struct RetryState {
    cancelled: u64,
    /// When it first lost a connection.
    lost_at: Option<Instant>,
    /// The epoch of the last connection that it lost, and how many attempts had failed by then.
    lost_epoch: Option<(u64, u64)>,
    /// It is repeated alone.
    is_alone: bool,
}

/// A connection that one request uses.
#[derive(Debug)]
struct InUse<'a> {
    pool: &'a ConnectionPool,
    connection: Arc<ClientConnection>,
}

impl Deref for InUse<'_> {
    type Target = Arc<ClientConnection>;

    fn deref(&self) -> &Arc<ClientConnection> {
        &self.connection
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        state.in_flight -= 1;
        let is_drained = state.release_retired();
        if state.is_one_alone && state.in_flight == 0 || is_drained {
            self.pool.changed.notify_all();
        }
    }
}

impl ConnectionPool {
    /// Connects for the first time, trying as long as the options say.
    pub(crate) fn open(connector: Connector) -> Result<Arc<Self>, ClientError> {
        struct NeverCancelled;
        impl CancelToken for NeverCancelled {
            fn is_cancelled(&self) -> bool {
                false
            }
            fn register(&self, _: &Arc<ClientSocket>) {}
        }
        let deadline = Instant::now() + connector.options().open_timeout;
        let mut failed = 0;
        let connection = loop {
            match connector.connect(&NeverCancelled, 0) {
                Ok(connection) => break connection,
                Err(error) if !error.is_passing() || Instant::now() >= deadline => return Err(error),
                Err(_) => {
                    failed += 1;
                    let left = deadline.saturating_duration_since(Instant::now());
                    thread::sleep(backoff(failed, random()).min(left));
                }
            }
        };
        Ok(Self::new(connector, connection))
    }

    fn new(connector: Connector, connection: ClientConnection) -> Arc<Self> {
        Arc::new(Self {
            connector,
            first: *connection.negotiated(),
            state: Mutex::new(State {
                epoch: 0,
                connections: vec![Arc::new(connection)],
                retired: Vec::new(),
                retired_until: None,
                widened: false,
                connecting: false,
                sockets: Vec::new(),
                down_since: None,
                attempts: 0,
                failures: 0,
                last_failure: None,
                cancelled: 0,
                fail_fast: false,
                closed: false,
                durability: DurabilityTracker::default(),
                in_flight: 0,
                is_one_alone: false,
                last_loss: None,
            }),
            changed: Condvar::new(),
            given_up: AtomicBool::new(false),
        })
    }

    /// What the export was when it was opened; it is the same ever after.
    pub(crate) fn export(&self) -> &NegotiatedExport {
        &self.first
    }

    /// The epoch: goes up with each reconnection.
    pub(crate) fn epoch(&self) -> u64 {
        self.state.lock().epoch
    }

    /// Performs one request, and again on a new connection if one is lost within the reconnect delay.
    ///
    /// Reads, and writes of the same bytes, may be performed twice. A request that changes nothing does not
    /// fail because another one lost the connection: see [`repeat_alone`]. Flushes go through
    /// [`flush`](Self::flush).
    pub(crate) fn call(
        self: &Arc<Self>,
        op: Op,
        payload: &[u8],
        mut sink: Sink<'_>,
    ) -> Result<(), ClientError> {
        let mut retry = self.retry_state();
        loop {
            let connection = self.acquire(&mut retry)?;
            if let Err((connection, error)) = self.await_given_up(op.range) {
                self.lost(&connection, error, &mut retry)?;
                continue;
            }
            match connection.call(op, payload, sink.again()) {
                Ok(()) => {
                    self.succeeded(&connection, op);
                    return Ok(());
                }
                Err(error) if error.is_answer() => return Err(error.with_repeated(retry.lost_at.is_some())),
                Err(error) => {
                    if let Err(error) = self.lost(&connection, error, &mut retry) {
                        drop(connection);
                        return self.repeat_alone(op, sink, retry, error);
                    }
                }
            }
        }
    }

    /// A flush: durable is what was completed before the call.
    pub(crate) fn flush(self: &Arc<Self>) -> Result<(), ClientError> {
        let ticket = self.state.lock().durability.begin();
        let mut retry = self.retry_state();
        loop {
            let connection = self.acquire(&mut retry)?;
            let op = Op { command: Command::Flush, flags: CommandFlags::NONE, range: Default::default() };
            let result = if connection.negotiated().flags.contains(TransmissionFlags::SEND_FLUSH) {
                connection.call(op, &[], Sink::Nothing)
            } else {
                // The server has announced that it needs no flush.
                Ok(())
            };
            match result {
                // It does not cover what the lost connection may have written.
                Ok(()) if !self.is_in_use(&connection) => {
                    let error = ClientError::lost(io::ErrorKind::ConnectionReset.into());
                    self.lost(&connection, error, &mut retry)?;
                }
                Ok(()) => {
                    self.succeeded(&connection, op);
                    // Reported only now: the flush itself may have met a loss.
                    let tracker = &mut self.state.lock().durability;
                    tracker.flushed(ticket, connection.epoch);
                    return if tracker.report_loss(ticket) {
                        Err(ClientError::UnflushedLost)
                    } else {
                        Ok(())
                    };
                }
                Err(error) if error.is_answer() => return Err(error),
                Err(error) => self.lost(&connection, error, &mut retry)?,
            }
        }
    }

    /// Waits until no change of bytes of `range` is under way that its caller has given up. A read that the
    /// server answers before the change would be out of date unseen.
    fn await_given_up(&self, range: ByteRange) -> Result<(), (Arc<ClientConnection>, ClientError)> {
        if !self.given_up.load(Ordering::SeqCst) {
            return Ok(());
        }
        let connections = {
            let state = self.state.lock();
            let all = || state.connections.iter().chain(&state.retired);
            if all().all(|connection| connection.given_up() == 0) {
                self.given_up.store(false, Ordering::SeqCst);
                return Ok(());
            }
            all().map(Arc::clone).collect::<Vec<_>>()
        };
        connections
            .into_iter()
            .try_for_each(|connection| connection.await_given_up(range).map_err(|error| (connection, error)))
    }

    fn retry_state(&self) -> RetryState {
        RetryState {
            cancelled: self.state.lock().cancelled,
            lost_at: None,
            lost_epoch: None,
            is_alone: false,
        }
    }

    /// A connection to use now, making one if there is none.
    fn acquire(self: &Arc<Self>, retry: &mut RetryState) -> Result<InUse<'_>, ClientError> {
        let mut state = self.state.lock();
        let failures = state.failures;
        loop {
            if state.closed || state.cancelled != retry.cancelled || cancel::is_cancelled() {
                return Err(ClientError::Cancelled);
            }
            if state.is_one_alone && !retry.is_alone {
                state = cancel::wait(&self.changed, state, None);
                continue;
            }
            if !state.connections.is_empty() {
                let connection = self.choose(&mut state);
                state.in_flight += 1;
                return Ok(InUse { pool: self, connection });
            }
            if state.failures > failures && self.retry_time_left(&state, retry).is_none() {
                return Err(state.last_failure.clone().unwrap_or(ClientError::Cancelled));
            }
            if state.connecting {
                state = cancel::wait(&self.changed, state, None);
                continue;
            }
            state = self.reconnect(state, retry);
        }
    }

    /// The connection with the fewest requests in flight. Has further ones made if all are busy.
    fn choose(self: &Arc<Self>, state: &mut State) -> Arc<ClientConnection> {
        let mut best = &state.connections[0];
        for other in &state.connections[1..] {
            if other.in_flight() < best.in_flight() {
                best = other;
            }
        }
        let best = Arc::clone(best);
        if !state.widened && best.in_flight() > 0 && self.first.size > 0 {
            state.widened = true;
            let multi = best.negotiated().flags.contains(TransmissionFlags::CAN_MULTI_CONN);
            let more = self.connector.options().connections.saturating_sub(1);
            if multi && more > 0 {
                let (pool, epoch, cancelled) = (Arc::downgrade(self), state.epoch, state.cancelled);
                // Without the thread one connection does all the work.
                let _ = thread::Builder::new()
                    .name("nbd-connect".into())
                    .spawn(move || widen(&pool, epoch, cancelled, more));
            }
        }
        best
    }

    /// A request has succeeded, so the outage is over.
    fn succeeded(&self, connection: &ClientConnection, op: Op) {
        let changes = matches!(op.command, Command::Write | Command::WriteZeroes | Command::Trim)
            && !op.flags.contains(CommandFlags::FUA);
        let mut state = self.state.lock();
        if changes {
            state.durability.wrote(connection.epoch);
        }
        if connection.epoch == state.epoch && !state.connections.is_empty() {
            state.down_since = None;
            state.attempts = 0;
            state.fail_fast = false;
        }
    }

    /// A request on `connection` has failed without an answer. Succeeds if it may be retried.
    fn lost(
        &self,
        connection: &ClientConnection,
        error: ClientError,
        retry: &mut RetryState,
    ) -> Result<(), ClientError> {
        let mut state = self.state.lock();
        // The calls of others do not fail because this caller was cancelled: who finds the connection dead
        // says so.
        if matches!(error, ClientError::Cancelled) && (cancel::is_cancelled() || connection.is_alive()) {
            self.given_up.store(true, Ordering::SeqCst);
            return Err(error);
        }
        if connection.epoch == state.epoch && !state.connections.is_empty() {
            let mut in_flight = state.in_flight;
            for other in std::mem::take(&mut state.connections) {
                in_flight += other.given_up();
                if error.is_passing() && other.is_alive() && !std::ptr::eq(&*other, connection) {
                    state.retired.push(other);
                } else {
                    other.fail(error.clone());
                }
            }
            if !state.retired.is_empty() {
                state.retired_until = Some(Instant::now() + self.retire_limit());
            }
            state.last_loss = Some(Loss { epoch: connection.epoch, in_flight });
            state.down_since.get_or_insert_with(Instant::now);
            // The reason of an earlier outage must not be reported for this one.
            state.last_failure = None;
            self.changed.notify_all();
        }
        retry.lost_epoch = Some((connection.epoch, state.failures));
        if state.cancelled != retry.cancelled {
            return Err(ClientError::Cancelled);
        }
        let now = Instant::now();
        let lost_at = *retry.lost_at.get_or_insert(now);
        let over = now.saturating_duration_since(lost_at) >= self.connector.options().reconnect_delay;
        if error.is_passing() && !over && !state.fail_fast { Ok(()) } else { Err(error) }
    }

    /// Cancels all calls; later ones fail fast until a request has succeeded.
    pub(crate) fn cancel(&self) {
        let mut state = self.state.lock();
        state.cancelled += 1;
        state.fail_fast = true;
        self.abandon(&mut state);
    }

    fn abandon(&self, state: &mut State) {
        let retired = std::mem::take(&mut state.retired);
        for connection in std::mem::take(&mut state.connections).into_iter().chain(retired) {
            connection.fail(ClientError::Cancelled);
        }
        for socket in std::mem::take(&mut state.sockets) {
            if let Some(socket) = socket.upgrade() {
                socket.shut_down();
            }
        }
        state.down_since.get_or_insert_with(Instant::now);
        self.changed.notify_all();
    }

    /// Disconnects from the server.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let connections = std::mem::take(&mut state.connections);
        self.abandon(&mut state);
        drop(state);
        for connection in connections {
            connection.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use blockmirror_block::cancel::CancelSource;

    use super::*;
    use crate::client::link::Link;
    use crate::proto::{REPLY_SIMPLE_MAGIC, ReplyFormat};
    use crate::{ClientOptions, NbdUri};

    /// A connection, and the server's end of it.
    pub(super) fn connection() -> (ClientConnection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // As a connector sets it, so that a caller sees that it is cancelled.
        ours.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let socket = Arc::new(ClientSocket::Unix(ours));
        #[cfg(feature = "tls")]
        let link = Link::new(socket, None);
        #[cfg(not(feature = "tls"))]
        let link = Link::new(socket);
        let export = NegotiatedExport {
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
            min_block: 1,
            max_payload: 1 << 20,
            format: ReplyFormat::Simple,
            base: None,
            depth: None,
        };
        (ClientConnection::new(link, export, 0, None), theirs)
    }

    /// A pool with one connection, and the server's end of that.
    pub(super) fn connected() -> (Arc<ConnectionPool>, UnixStream) {
        let (connection, theirs) = connection();
        let connector = Connector::new(ClientOptions::new(NbdUri::unix("none", ""))).unwrap();
        (ConnectionPool::new(connector, connection), theirs)
    }

    /// The calls of others failed as cancelled because this one was.
    #[test]
    fn a_cancelled_caller_leaves_a_dead_connection_to_others() {
        let (pool, _server) = connected();
        let connection = Arc::clone(&pool.state.lock().connections[0]);
        connection.fail(ClientError::lost(io::ErrorKind::ConnectionReset.into()));
        {
            let source = CancelSource::new();
            let _calls = source.enter();
            source.cancel();
            let error = pool.lost(&connection, ClientError::Cancelled, &mut pool.retry_state()).unwrap_err();
            assert!(matches!(error, ClientError::Cancelled), "{error}");
        }
        assert!(pool.state.lock().last_loss.is_none());
        assert!(matches!(pool.flush(), Err(ClientError::Lost(_))));
        assert_eq!(pool.state.lock().last_loss.map(|loss| loss.epoch), Some(0));
    }
    /// The lost connection may have led to another run of the server, which had written.
    #[test]
    fn a_flush_that_is_answered_beside_a_lost_connection_covers_nothing() {
        let (pool, mut server) = connected();
        let (second, _theirs) = connection();
        let second = Arc::new(second);
        pool.state.lock().connections.push(Arc::clone(&second));
        thread::scope(|scope| {
            let flush = scope.spawn(|| pool.flush());
            // It is on the first of two that are idle.
            let mut request = [0; 28];
            server.read_exact(&mut request).unwrap();
            let lost = ClientError::lost(io::ErrorKind::ConnectionReset.into());
            let _ = pool.lost(&second, lost, &mut pool.retry_state());
            let reply = [&REPLY_SIMPLE_MAGIC.to_be_bytes(), &[0; 4][..], &request[8..16]].concat();
            server.write_all(&reply).unwrap();
            assert!(matches!(flush.join().unwrap(), Err(ClientError::Lost(_))));
        });
    }
}
