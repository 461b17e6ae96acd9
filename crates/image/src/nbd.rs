//! How exports of NBD servers are opened, where a path is a URI.

use std::time::Duration;

use blockmirror_nbd::{ClientOptions, NbdAddress, NbdUri};

/// Where sockets lie that have no name but that of a descriptor of this process.
const DESCRIPTORS: &str = "/proc/self/fd";

/// How a connection to an NBD server is made, and how long a lost one is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NbdOptions {
    /// Most connections to one export; `None` leaves it to the client.
    pub connections: Option<u16>,
    /// How long requests wait for a server that has gone, before they fail.
    pub reconnect_delay: Duration,
    /// How long opening waits for a server that is not there yet.
    pub open_timeout: Duration,
    /// How long a server at `/proc/self/fd/N` may take until it answers; by default 60 seconds. This process
    /// has started it, and it may have to fetch what it serves. Nothing else listens there later: once it has
    /// gone, neither `open_timeout` nor `reconnect_delay` waits.
    pub started_server_timeout: Duration,
    /// How long a request waits for a server that does not answer, before the connection counts as lost;
    /// `None` as long as its host acknowledges.
    pub io_timeout: Option<Duration>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl NbdOptions {
    /// One attempt to open, as many connections as the client likes, and no waiting.
    pub const fn new() -> Self {
        Self {
            connections: None,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            started_server_timeout: Duration::from_secs(60),
            io_timeout: None,
        }
    }

    /// The client for the export `uri`.
    pub(crate) fn client(self, uri: NbdUri) -> ClientOptions {
        let is_started = matches!(&uri.address, NbdAddress::Unix(path) if path.starts_with(DESCRIPTORS));
        let mut options = ClientOptions::new(uri).io_timeout(self.io_timeout);
        if let Some(connections) = self.connections {
            options = options.connections(connections);
        }
        match is_started {
            true => options.handshake_timeout(self.started_server_timeout),
            false => options.reconnect_delay(self.reconnect_delay).open_timeout(self.open_timeout),
        }
    }
}
