//! Connections in the handshake. They have a limit of their own, beyond which the newest evicts the oldest.
//!
//! A handshake takes some round trips; a silent client stays in it until its time is over. Silent clients
//! therefore hold no connection permit, and cannot keep others out. Used by the acceptor and by the threads
//! that do handshakes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use blockmirror_block::sync::{Condvar, Mutex};

use super::connection_limit::{ConnectionLimit, ConnectionPermit};
use super::options::MAX_HANDSHAKES;
use super::socket::Socket;

/// The handshakes of one server.
#[derive(Default)]
pub(crate) struct HandshakeSet {
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Default)]
struct State {
    /// Those that have not been ended, in the order in which they came.
    sockets: BTreeMap<u64, Entry>,
    next: u64,
    /// Threads that have not ended yet.
    running: usize,
    closed: bool,
}

struct Entry {
    socket: Arc<Socket>,
    /// It holds a connection permit and counts as a connection.
    is_client: bool,
}

impl State {
    fn take_oldest(&mut self) -> Option<Entry> {
        let (id, _) = self.sockets.iter().find(|(_, entry)| !entry.is_client)?;
        let id = *id;
        self.sockets.remove(&id)
    }
}

impl HandshakeSet {
    /// Begins one over `socket`; `None` after [`close`](Self::close).
    pub(crate) fn begin(self: &Arc<Self>, socket: &Arc<Socket>) -> Option<Handshaking> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        let id = state.next;
        state.next += 1;
        state.running += 1;
        state.sockets.insert(id, Entry { socket: Arc::clone(socket), is_client: false });
        let oldest = if state.sockets.len() > MAX_HANDSHAKES { state.take_oldest() } else { None };
        drop(state);
        if let Some(oldest) = oldest {
            oldest.socket.shutdown();
        }
        Some(Handshaking { all: Arc::clone(self), id })
    }

    /// Handshakes that have not ended and hold no connection permit.
    pub(crate) fn count(&self) -> usize {
        self.state.lock().sockets.values().filter(|entry| !entry.is_client).count()
    }

    /// Ends the oldest, because the system lacks descriptors or threads.
    pub(crate) fn end_oldest(&self) {
        let oldest = self.state.lock().take_oldest();
        if let Some(oldest) = oldest {
            oldest.socket.shutdown();
        }
    }

    /// Ends all; none begins any more.
    pub(crate) fn close(&self) {
        let sockets = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.sockets)
        };
        for entry in sockets.values() {
            entry.socket.shutdown();
        }
    }

    /// Waits for the last one, after [`close`](Self::close). They do nothing that takes time.
    pub(crate) fn wait(&self) {
        let mut state = self.state.lock();
        while state.running > 0 {
            state = self.over.wait(state);
        }
    }
}

/// One handshake, until dropped.
pub(crate) struct Handshaking {
    all: Arc<HandshakeSet>,
    id: u64,
}

impl Handshaking {
    /// Waits for a connection permit until `deadline`.
    pub(crate) fn become_client(
        &self,
        permits: &Arc<ConnectionLimit>,
        deadline: Instant,
    ) -> Option<ConnectionPermit> {
        let permit = permits.acquire(deadline)?;
        if let Some(entry) = self.all.state.lock().sockets.get_mut(&self.id) {
            entry.is_client = true;
        }
        Some(permit)
    }
}

impl Drop for Handshaking {
    fn drop(&mut self) {
        let mut state = self.all.state.lock();
        state.sockets.remove(&self.id);
        state.running -= 1;
        drop(state);
        self.all.over.notify_all();
    }
}
