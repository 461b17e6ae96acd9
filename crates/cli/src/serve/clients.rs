//! How many clients a server has: `--once` ends it with the last one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use blockmirror_nbd::server::Observer;

/// Counts the clients of all exports.
#[derive(Debug)]
pub(super) struct Clients {
    connected: AtomicUsize,
    /// Gets a message each time the last client has gone.
    last_has_gone: mpsc::Sender<()>,
}

impl Clients {
    pub(super) fn new(last_has_gone: mpsc::Sender<()>) -> Self {
        Self { connected: AtomicUsize::new(0), last_has_gone }
    }

    /// How many there are now.
    pub(super) fn count(&self) -> usize {
        self.connected.load(Ordering::SeqCst)
    }

    /// Whether there are none now.
    pub(super) fn are_gone(&self) -> bool {
        self.count() == 0
    }
}

impl Observer for Clients {
    fn connected(&self, _: &str, _: usize) {
        self.connected.fetch_add(1, Ordering::SeqCst);
    }

    fn disconnected(&self, _: &str, _: usize) {
        if self.connected.fetch_sub(1, Ordering::SeqCst) == 1 {
            // At the end nothing waits for it any more.
            let _ = self.last_has_gone.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_client_of_all_exports_is_reported() {
        let (sender, receiver) = mpsc::channel();
        let clients = Clients::new(sender);
        clients.connected("a", 1);
        clients.connected("b", 1);
        clients.disconnected("a", 0);
        assert!(receiver.try_recv().is_err() && !clients.are_gone());
        clients.disconnected("b", 0);
        assert!(receiver.try_recv().is_ok() && clients.are_gone());
        clients.connected("a", 1);
        assert!(receiver.try_recv().is_err() && !clients.are_gone());
    }
}
