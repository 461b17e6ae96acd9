//! The limit on connections of a server: a counting semaphore whose permits are held from the end of the
//! handshake to the close.

use std::sync::Arc;
use std::time::Instant;

use blockmirror_block::sync::{Condvar, Mutex};

/// Permits for the connections of one server.
pub(crate) struct ConnectionLimit {
    state: Mutex<State>,
    limit: usize,
    room: Condvar,
    /// Called when a permit is released.
    on_release: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    taken: usize,
    /// The server stops: nothing waits for a permit any more.
    closed: bool,
}

impl ConnectionLimit {
    /// `limit` permits; 0 is no limit.
    pub(crate) fn new(limit: usize, on_release: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        Arc::new(Self { state: Mutex::default(), limit, room: Condvar::new(), on_release })
    }

    /// Whether a permit is free.
    pub(crate) fn has_room(&self) -> bool {
        self.taken() < self.limit
    }

    pub(crate) fn taken(&self) -> usize {
        self.state.lock().taken
    }

    /// Waits for a permit until `deadline`; `None` if there is none by then, or the server stops.
    pub(crate) fn acquire(self: &Arc<Self>, deadline: Instant) -> Option<ConnectionPermit> {
        let mut state = self.state.lock();
        while state.taken >= self.limit {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                return None;
            }
            (state, _) = self.room.wait_timeout(state, left);
        }
        state.taken += 1;
        Some(ConnectionPermit(Arc::clone(self)))
    }

    /// Ends all waiting for permits.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.room.notify_all();
    }
}

/// The permit of one connection; released when dropped.
pub(crate) struct ConnectionPermit(Arc<ConnectionLimit>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.state.lock().taken -= 1;
        self.0.room.notify_one();
        (self.0.on_release)();
    }
}
