//! A wake-up: how the members of a group wake its thread.

use std::time::Duration;

use blockmirror_block::sync::{Condvar, Mutex};

/// Latched wake-up: `wait` returns at once if `notify` was called since the last `wait`. Leaf lock.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    notified: Mutex<bool>,
    changed: Condvar,
}

impl Notify {
    pub(crate) fn notify(&self) {
        *self.notified.lock() = true;
        self.changed.notify_one();
    }

    /// Waits for `notify`, for at most `timeout` if there is one.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let mut notified = self.notified.lock();
        match timeout {
            None => {
                while !*notified {
                    notified = self.changed.wait(notified);
                }
            }
            Some(timeout) if !*notified => notified = self.changed.wait_timeout(notified, timeout).0,
            Some(_) => {}
        }
        *notified = false;
    }
}
