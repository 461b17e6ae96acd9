//! How many clients a server has, and room for one more.

use std::sync::Arc;
use std::time::Instant;

use blockmirror_block::sync::{Condvar, Mutex};

/// Counts the clients of a server against its limit, from the end of the handshake to closing.
pub(crate) struct Slots {
    state: Mutex<State>,
    limit: usize,
    room: Condvar,
    /// Called when one is given back.
    freed: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    taken: usize,
    /// The server stops: waiting for room is over.
    closed: bool,
}

impl Slots {
    /// `limit` of them; 0 is no limit.
    pub(crate) fn new(limit: usize, freed: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        Arc::new(Self { state: Mutex::default(), limit, room: Condvar::new(), freed })
    }

    /// Whether one more may come.
    pub(crate) fn has_room(&self) -> bool {
        self.taken() < self.limit
    }

    pub(crate) fn taken(&self) -> usize {
        self.state.lock().taken
    }

    /// Takes one, as soon as there is room; `None` if there is none until `deadline`, or the server stops.
    pub(crate) fn take(self: &Arc<Self>, deadline: Instant) -> Option<Slot> {
        let mut state = self.state.lock();
        while state.taken >= self.limit {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                return None;
            }
            (state, _) = self.room.wait_timeout(state, left);
        }
        state.taken += 1;
        Some(Slot(Arc::clone(self)))
    }

    /// Ends all waiting for room.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.room.notify_all();
    }
}

/// One client's place; given back when dropped.
pub(crate) struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.state.lock().taken -= 1;
        self.0.room.notify_one();
        (self.0.freed)();
    }
}
