//! How exports of NBD servers are opened, where a path is a URI.

use std::time::Duration;

use blockmirror_nbd::ClientOptions;

/// How a connection to an NBD server is made, and how long a lost one is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NbdOptions {
    /// Most connections to one export; `None` leaves it to the client.
    pub connections: Option<u16>,
    /// How long requests wait for a server that has gone, before they fail.
    pub reconnect_delay: Duration,
    /// How long opening waits for a server that is not there yet.
    pub open_timeout: Duration,
    /// How long connecting and the handshake may take, each time; `None` leaves it to the client.
    pub handshake_timeout: Option<Duration>,
    /// How long a request waits for a server that does not answer, before the connection counts as lost;
    /// `None` as long as its host acknowledges.
    pub io_timeout: Option<Duration>,
}

impl NbdOptions {
    /// One attempt to open, as many connections as the client likes, and no waiting.
    pub const fn new() -> Self {
        Self {
            connections: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            handshake_timeout: None,
            io_timeout: None,
        }
    }

    pub(crate) fn apply(self, mut options: ClientOptions) -> ClientOptions {
        if let Some(connections) = self.connections {
            options = options.connections(connections);
        }
        if let Some(limit) = self.handshake_timeout {
            options = options.handshake_timeout(limit);
        }
        options
            .reconnect_delay(self.reconnect_delay)
            .open_timeout(self.open_timeout)
            .io_timeout(self.io_timeout)
    }
}
