//! The wish to end, which clients, signals and a startup that fails late express. Leaf.

use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex};

/// Whether the daemon is to end. *Guards*: that. *Order*: leaf. *Not under it*: anything else.
#[derive(Debug, Default)]
pub(crate) struct Quit {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Quit {
    /// Makes [`wait`](Self::wait) return. Never waits.
    pub(crate) fn ask(&self) {
        *self.asked.lock() = true;
        self.changed.notify_all();
    }

    /// Waits until the daemon is to end, for at most `limit`; whether it is.
    pub(crate) fn wait_for(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut asked = self.asked.lock();
        while !*asked {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            asked = self.changed.wait_timeout(asked, left).0;
        }
        true
    }

    /// Waits until the daemon is to end.
    pub(crate) fn wait(&self) {
        let mut asked = self.asked.lock();
        while !*asked {
            asked = self.changed.wait(asked);
        }
    }
}
