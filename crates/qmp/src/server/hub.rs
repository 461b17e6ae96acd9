//! All sessions together: which exist, what is broadcast to them, and how they end. Held by the daemon, by
//! listeners and by every session.

use std::collections::BTreeMap;
use std::io::{self, PipeWriter};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tracing::info;

use super::connection::Connection;
use super::threads::SessionThreads;
use crate::json;
use crate::protocol::Table;
use crate::schema::Event;
use crate::sync::{Condvar, Mutex};

#[derive(Debug)]
pub(super) struct Hub {
    table: Arc<Table>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<u64, Arc<SessionThreads>>,
    /// Closing one ends its listener.
    listeners: BTreeMap<u64, PipeWriter>,
    /// The number of the next session or listener.
    next: u64,
    stopping: bool,
}

impl Hub {
    /// A session's writer is gone, and with it the session.
    fn ended(&self, id: u64) {
        info!(session = id, "monitor disconnected");
        self.state.lock().sessions.remove(&id);
        self.changed.notify_all();
    }
}

/// A set of commands and the connections that may give them. Clones are the same set.
#[derive(Debug, Clone)]
pub struct Monitors(Arc<Hub>);

impl Monitors {
    /// Monitors for `table`, without sessions.
    pub fn new(table: Table) -> Self {
        let table = Arc::new(table);
        Self(Arc::new(Hub { table, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// The commands.
    pub fn table(&self) -> &Table {
        &self.0.table
    }

    /// Greets the client at `connection` and serves it on threads of its own, until it is gone or
    /// [`Monitors::stop`].
    ///
    /// When the client has sent its last byte, what it has sent is still run and answered.
    ///
    /// # Errors
    /// No threads left, or the monitors are stopping.
    pub fn serve(&self, connection: Connection) -> io::Result<u64> {
        // The lock is held until the session is in the map: its end must not come first.
        let mut state = self.0.state.lock();
        if state.stopping {
            (connection.close)();
            return Err(io::Error::other("the monitors are stopping"));
        }
        let id = state.next;
        state.next += 1;
        let hub = Arc::clone(&self.0);
        let session = SessionThreads::start(id, connection, Arc::clone(&hub.table), move || hub.ended(id))?;
        let peer = session.session().peer();
        state.sessions.insert(id, session);
        drop(state);
        let (pid, uid) = (peer.map(|peer| peer.pid), peer.map(|peer| peer.uid));
        info!(session = id, pid, uid, "monitor connected");
        Ok(id)
    }

    /// Number of sessions.
    pub fn sessions(&self) -> usize {
        self.0.state.lock().sessions.len()
    }

    /// Tells every client that has negotiated. Never waits for one.
    ///
    /// An event without members is sent without `data`.
    pub fn emit(&self, event: &'static Event, data: Map<String, Value>) {
        let (name, data) = self.0.table.checked_event(event, data);
        // Under the lock, so that all clients see events in the order of their times.
        let state = self.0.state.lock();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = json!({
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
            "event": name,
        });
        if let (false, Some(members)) = (data.is_empty(), message.as_object_mut()) {
            members.insert("data".into(), Value::Object(data));
        }
        let line: Arc<str> = (json::to_string(&message) + "\r\n").into();
        for session in state.sessions.values() {
            session.event(&line);
        }
    }

    /// Lets no new client in, begins no new command, lets what runs be answered and what is answered be
    /// written, for `grace` at most; then hangs up. Gives the number of sessions that had to be cut off.
    pub fn stop(&self, grace: Duration) -> usize {
        let mut state = self.0.state.lock();
        state.stopping = true;
        state.listeners.clear();
        for session in state.sessions.values() {
            session.stop();
        }
        let state = self.0.changed.wait_timeout_while(state, grace, |state| !state.sessions.is_empty());
        let rest: Vec<_> = state.sessions.values().cloned().collect();
        drop(state);
        for session in &rest {
            session.kill();
        }
        rest.len()
    }

    /// Keeps `wake` for a listener, which ends when it is closed: by [`Monitors::stop`] at the latest.
    pub(super) fn add_listener(&self, wake: PipeWriter) -> u64 {
        let mut state = self.0.state.lock();
        let id = state.next;
        state.next += 1;
        if !state.stopping {
            state.listeners.insert(id, wake);
        }
        id
    }

    pub(super) fn end_listener(&self, id: u64) {
        self.0.state.lock().listeners.remove(&id);
    }
}
