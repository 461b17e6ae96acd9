//! Whose turn it is to send: one request is sent at a time, as a whole.

use std::sync::Arc;

use blockmirror_block::cancel;
use blockmirror_block::sync::{Condvar, Mutex};

/// *Guards* the sending side of a connection. *Order*: before its `shared`. *Not under it*: waiting for a
/// reply.
#[derive(Debug, Default)]
pub(crate) struct SendTurn {
    taken: Mutex<bool>,
    free: Condvar,
}

/// The turn, given back when dropped.
#[derive(Debug)]
pub(crate) struct Sending(Arc<SendTurn>);

impl SendTurn {
    /// Waits for the turn; `None` if the call is cancelled meanwhile.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Sending> {
        let mut taken = self.taken.lock();
        while *taken {
            if cancel::is_cancelled() {
                // It may have been woken to send.
                self.free.notify_one();
                return None;
            }
            taken = cancel::wait(&self.free, taken, None);
        }
        *taken = true;
        Some(Sending(Arc::clone(self)))
    }

    /// Takes the turn if no other thread has it.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Sending> {
        let mut taken = self.taken.lock();
        let free = !std::mem::replace(&mut *taken, true);
        free.then(|| Sending(Arc::clone(self)))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        *self.0.taken.lock() = false;
        self.0.free.notify_one();
    }
}
