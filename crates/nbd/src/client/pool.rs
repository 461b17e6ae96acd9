//! The connections of one client: how many, which one a request takes, and what happens when they are lost.
//!
//! All connections live and die together, in *epochs*: when one is lost, it is unknown whether the server is
//! still the one that the others speak to, or whether a flush on them would cover writes on it. There is no
//! reconnection in the background: the first request that finds no connection makes one, and those that come
//! meanwhile wait for it. Further connections are made by a thread of their own while the first is used,
//! because a server that wants no more may just let them hang.
//!
//! Locks: `state`, never held during I/O.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex, MutexGuard};

use super::backoff::backoff;
use super::connect::{Connector, Patron};
use super::connection::{Connection, Op, Sink};
use super::error::ClientError;
use super::handshake::Negotiated;
use super::ledger::Ledger;
use super::socket::Socket;
use crate::proto::{Command, CommandFlags, TransmissionFlags};

#[derive(Debug)]
pub(crate) struct Pool {
    connector: Connector,
    /// What the export was when it was opened.
    first: Negotiated,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    epoch: u64,
    /// Empty while there is no connection.
    connections: Vec<Arc<Connection>>,
    /// Whether a connection of this epoch beyond the first was tried.
    widened: bool,
    /// A caller is making a connection, with these sockets so far.
    connecting: bool,
    sockets: Vec<Weak<Socket>>,
    /// Since when there is no connection that has proved itself, and how many were made or tried since.
    down_since: Option<Instant>,
    attempts: u32,
    /// How many attempts have failed ever, and the last reason.
    failures: u64,
    last_failure: Option<ClientError>,
    /// Goes up when everybody is to give up.
    cancelled: u64,
    /// Requests do not wait for the server to come back until it has.
    impatient: bool,
    closed: bool,
    ledger: Ledger,
}

/// One request's patience.
#[derive(Debug)]
struct Wait {
    cancelled: u64,
    /// When it first lost a connection.
    lost_at: Option<Instant>,
}

impl Pool {
    /// Connects for the first time, trying as long as the options say.
    pub(crate) fn open(connector: Connector) -> Result<Arc<Self>, ClientError> {
        struct NeverCancelled;
        impl Patron for NeverCancelled {
            fn given_up(&self) -> bool {
                false
            }
            fn connected(&self, _: &Arc<Socket>) {}
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
        Ok(Arc::new(Self {
            connector,
            first: *connection.negotiated(),
            state: Mutex::new(State {
                epoch: 0,
                connections: vec![Arc::new(connection)],
                widened: false,
                connecting: false,
                sockets: Vec::new(),
                down_since: None,
                attempts: 0,
                failures: 0,
                last_failure: None,
                cancelled: 0,
                impatient: false,
                closed: false,
                ledger: Ledger::default(),
            }),
            changed: Condvar::new(),
        }))
    }

    /// What the export was when it was opened; it is the same ever after.
    pub(crate) fn export(&self) -> &Negotiated {
        &self.first
    }

    /// Which life it is in: goes up with each reconnection.
    pub(crate) fn epoch(&self) -> u64 {
        self.state.lock().epoch
    }

    /// Does one request, again on a new connection where the old one was lost and the options bear with that.
    ///
    /// Reads, and writes of the same bytes, may be done twice. A flush is not done this way.
    pub(crate) fn call(
        self: &Arc<Self>,
        op: Op,
        payload: &[u8],
        mut sink: Sink<'_>,
    ) -> Result<(), ClientError> {
        let mut wait = self.wait();
        loop {
            let connection = self.acquire(&mut wait)?;
            let again = match &mut sink {
                Sink::Nothing => Sink::Nothing,
                Sink::Bytes(buf) => Sink::Bytes(buf),
                Sink::Status(status) => {
                    **status = Default::default();
                    Sink::Status(status)
                }
            };
            match connection.call(op, payload, again) {
                Ok(()) => {
                    self.succeeded(&connection, op);
                    return Ok(());
                }
                Err(error) if error.is_answer() => return Err(error),
                Err(error) => self.lost(&connection, error, &mut wait)?,
            }
        }
    }

    /// A flush: durable is what was completed before the call.
    pub(crate) fn flush(self: &Arc<Self>) -> Result<(), ClientError> {
        let ticket = self.state.lock().ledger.begin();
        let mut wait = self.wait();
        loop {
            let connection = self.acquire(&mut wait)?;
            let op = Op { command: Command::Flush, flags: CommandFlags::NONE, range: Default::default() };
            let result = if connection.negotiated().flags.contains(TransmissionFlags::SEND_FLUSH) {
                connection.call(op, &[], Sink::Nothing)
            } else {
                // The server says that it has nothing to flush.
                Ok(())
            };
            match result {
                Ok(()) => {
                    self.succeeded(&connection, op);
                    // Reported only now: the flush itself may have found a loss.
                    let ledger = &mut self.state.lock().ledger;
                    ledger.flushed(ticket, connection.epoch);
                    return if ledger.verdict(ticket) { Err(ClientError::UnflushedLost) } else { Ok(()) };
                }
                Err(error) if error.is_answer() => return Err(error),
                Err(error) => self.lost(&connection, error, &mut wait)?,
            }
        }
    }

    fn wait(&self) -> Wait {
        Wait { cancelled: self.state.lock().cancelled, lost_at: None }
    }

    /// A connection to use now, making one if there is none.
    fn acquire(self: &Arc<Self>, wait: &mut Wait) -> Result<Arc<Connection>, ClientError> {
        let mut state = self.state.lock();
        let failures = state.failures;
        loop {
            if state.closed || state.cancelled != wait.cancelled {
                return Err(ClientError::Cancelled);
            }
            if !state.connections.is_empty() {
                return Ok(self.choose(&mut state));
            }
            if state.failures > failures && self.patience(&state, wait).is_none() {
                return Err(state.last_failure.clone().unwrap_or(ClientError::Cancelled));
            }
            if state.connecting {
                state = self.changed.wait(state);
                continue;
            }
            state = self.reconnect(state, wait);
        }
    }

    /// How long a request may still wait for the server; `None` if no longer.
    fn patience(&self, state: &State, wait: &Wait) -> Option<Duration> {
        if state.impatient || state.last_failure.as_ref().is_some_and(|e| !e.is_passing()) {
            return None;
        }
        let since = match (wait.lost_at, state.down_since) {
            (Some(mine), Some(all)) => mine.min(all),
            (mine, all) => mine.or(all)?,
        };
        let deadline = since.checked_add(self.connector.options().reconnect_delay)?;
        deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Makes one attempt, after waiting for its time to come. What came of it stands in the state.
    fn reconnect<'a>(
        self: &'a Arc<Self>,
        mut state: MutexGuard<'a, State>,
        wait: &Wait,
    ) -> MutexGuard<'a, State> {
        state.connecting = true;
        let mine = state.cancelled;
        if let Some(patience) = self.patience(&state, wait) {
            let pause = backoff(state.attempts, random()).min(patience);
            let end = Instant::now() + pause;
            while state.cancelled == mine && !state.closed {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self.changed.wait_timeout(state, left).0;
            }
        }
        state.attempts = state.attempts.saturating_add(1);
        let epoch = state.epoch + 1;
        drop(state);
        let patron = Attempt { pool: Arc::downgrade(self), cancelled: mine };
        let made = self.connector.connect(&patron, epoch).and_then(|connection| {
            self.same_export(connection.negotiated())?;
            Ok(connection)
        });
        let mut state = self.state.lock();
        state.connecting = false;
        match made {
            Ok(connection) if state.cancelled == mine && !state.closed => {
                state.epoch = epoch;
                state.ledger.lost(epoch);
                state.connections = vec![Arc::new(connection)];
                state.widened = false;
                state.last_failure = None;
            }
            Ok(connection) => connection.close(),
            Err(error) => {
                state.failures += 1;
                state.last_failure = Some(error);
            }
        }
        self.changed.notify_all();
        state
    }

    /// That a new connection leads to what was opened.
    fn same_export(&self, now: &Negotiated) -> Result<(), ClientError> {
        let first = &self.first;
        let read_only = |n: &Negotiated| n.flags.contains(TransmissionFlags::READ_ONLY);
        // What requests are made of is decided by what the first connection could.
        let used = [
            TransmissionFlags::SEND_FLUSH,
            TransmissionFlags::SEND_FUA,
            TransmissionFlags::SEND_TRIM,
            TransmissionFlags::SEND_WRITE_ZEROES,
            TransmissionFlags::SEND_FAST_ZERO,
        ];
        let missing = used.into_iter().find(|f| first.flags.contains(*f) && !now.flags.contains(*f));
        let changed = if now.size != first.size {
            format!("has {} bytes and no longer {}", now.size, first.size)
        } else if read_only(now) && !read_only(first) {
            "is read-only".to_owned()
        } else if now.min_block > first.min_block {
            format!("has blocks of {} bytes and no longer {}", now.min_block, first.min_block)
        } else if now.max_payload < first.max_payload {
            format!("takes payloads of {} bytes and no longer {}", now.max_payload, first.max_payload)
        } else if let Some(flag) = missing {
            format!("can no longer do {flag:?}")
        } else if now.headers < first.headers || (first.base.is_some() && now.base.is_none()) {
            "is served with a smaller protocol".to_owned()
        } else {
            return Ok(());
        };
        Err(ClientError::Changed(changed))
    }

    /// The connection with the least to do. Sees to it that there will be more where all are busy.
    fn choose(self: &Arc<Self>, state: &mut State) -> Arc<Connection> {
        let mut best = &state.connections[0];
        for other in &state.connections[1..] {
            if other.in_flight() < best.in_flight() {
                best = other;
            }
        }
        let best = Arc::clone(best);
        if !state.widened && best.in_flight() > 0 {
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

    /// A request was done, so the connection is a good one.
    fn succeeded(&self, connection: &Connection, op: Op) {
        let changes = matches!(op.command, Command::Write | Command::WriteZeroes | Command::Trim)
            && !op.flags.contains(CommandFlags::FUA);
        let mut state = self.state.lock();
        if changes {
            state.ledger.wrote(connection.epoch);
        }
        if connection.epoch == state.epoch && !state.connections.is_empty() {
            state.down_since = None;
            state.attempts = 0;
            state.impatient = false;
        }
    }

    /// `connection` is dead. Succeeds if the request may be tried again.
    fn lost(&self, connection: &Connection, error: ClientError, wait: &mut Wait) -> Result<(), ClientError> {
        let mut state = self.state.lock();
        if connection.epoch == state.epoch && !state.connections.is_empty() {
            for other in std::mem::take(&mut state.connections) {
                other.die(error.clone());
            }
            state.down_since.get_or_insert_with(Instant::now);
            // A request must not find the reason of an earlier outage.
            state.last_failure = None;
            self.changed.notify_all();
        }
        if state.cancelled != wait.cancelled {
            return Err(ClientError::Cancelled);
        }
        let now = Instant::now();
        let lost_at = *wait.lost_at.get_or_insert(now);
        let over = now.saturating_duration_since(lost_at) >= self.connector.options().reconnect_delay;
        if error.is_passing() && !over && !state.impatient { Ok(()) } else { Err(error) }
    }

    /// Ends all calls; until the server has proved to be there again, later ones do not wait for it.
    pub(crate) fn cancel(&self) {
        let mut state = self.state.lock();
        state.cancelled += 1;
        state.impatient = true;
        self.abandon(&mut state);
    }

    fn abandon(&self, state: &mut State) {
        for connection in std::mem::take(&mut state.connections) {
            connection.die(ClientError::Cancelled);
        }
        for socket in std::mem::take(&mut state.sockets) {
            if let Some(socket) = socket.upgrade() {
                socket.shut_down();
            }
        }
        state.down_since.get_or_insert_with(Instant::now);
        self.changed.notify_all();
    }

    /// Takes leave of the server.
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

    /// Whether connections of `epoch` are still wanted by who began when `cancelled` was what it is.
    fn is_wanted(&self, epoch: u64, cancelled: u64) -> bool {
        let state = self.state.lock();
        !state.closed && state.cancelled == cancelled && state.epoch == epoch && !state.connections.is_empty()
    }
}

/// A caller that makes a connection, until it is cancelled.
struct Attempt {
    pool: Weak<Pool>,
    cancelled: u64,
}

impl Patron for Attempt {
    fn given_up(&self) -> bool {
        self.pool.upgrade().is_none_or(|pool| {
            let state = pool.state.lock();
            state.closed || state.cancelled != self.cancelled
        })
    }

    fn connected(&self, socket: &Arc<Socket>) {
        let Some(pool) = self.pool.upgrade() else { return socket.shut_down() };
        let mut state = pool.state.lock();
        if state.closed || state.cancelled != self.cancelled {
            return socket.shut_down();
        }
        state.sockets.retain(|socket| socket.strong_count() > 0);
        state.sockets.push(Arc::downgrade(socket));
    }
}

/// Makes `more` further connections of `epoch`, as far as the server goes along.
fn widen(pool: &Weak<Pool>, epoch: u64, cancelled: u64, more: u16) {
    for _ in 0..more {
        let Some(pool) = pool.upgrade().filter(|pool| pool.is_wanted(epoch, cancelled)) else { return };
        let patron = Attempt { pool: Arc::downgrade(&pool), cancelled };
        let Ok(connection) = pool.connector.connect(&patron, epoch) else { return };
        let same = pool.same_export(connection.negotiated()).is_ok();
        let mut state = pool.state.lock();
        let wanted = state.epoch == epoch && !state.connections.is_empty() && !state.closed;
        if same && wanted {
            state.connections.push(Arc::new(connection));
        } else {
            drop(state);
            connection.close();
            return;
        }
    }
}

/// Any number; only for spreading clients out in time.
fn random() -> u32 {
    let bits = RandomState::new().build_hasher().finish();
    (bits >> 32) as u32
}
