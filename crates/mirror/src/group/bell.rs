//! How the members of a group wake its thread.

use std::time::Duration;

use blockmirror_block::sync::{Condvar, Mutex};

/// Latched wake-up: `wait` returns at once if `ring` was called since the last `wait`. Leaf lock.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        *self.rung.lock() = true;
        self.heard.notify_one();
    }

    /// Waits until it is rung, for at most `timeout` if there is one.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let mut rung = self.rung.lock();
        match timeout {
            None => {
                while !*rung {
                    rung = self.heard.wait(rung);
                }
            }
            Some(timeout) if !*rung => rung = self.heard.wait_timeout(rung, timeout).0,
            Some(_) => {}
        }
        *rung = false;
    }
}
