//! Options and limits of a server.
//!
//! Every limit on what a client can make the server hold stands here with its reason.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Requests of one connection that may run or wait for a thread at the same time.
pub(crate) const MAX_RUNNING: usize = 128;
/// Bytes that the requests and unsent replies of one connection may hold: two of the longest requests.
pub(crate) const MAX_CONNECTION_BYTES: u64 = 64 << 20;
/// Bytes of short replies, which are in no pooled buffer, that one connection may leave unread before nothing
/// more is read.
pub(crate) const MAX_LOOSE: usize = 512 << 10;
/// Minimum rate, in bytes per second, at which a client that holds memory must receive its replies or send
/// what it announced, while a client that holds none waits for memory.
pub(crate) const MIN_RATE: u64 = 64 << 10;
/// Handshakes at the same time, each a thread. The oldest ends when one more comes.
pub(crate) const MAX_HANDSHAKES: usize = 512;
/// Extents that one context of a block status request visits at most; the answer ends there.
pub(crate) const MAX_VISITS: usize = 64 << 10;
/// Most descriptors in one answer to a block status request, all contexts together unless they are very many:
/// 128 KiB. Clients ask again from where an answer ends, so longer ones would only be harder to hold.
pub(crate) const MAX_DESCRIPTORS: usize = 8 << 10;
/// Longest payload of an option that is parsed: 16 strings of the longest kind.
pub(crate) const MAX_OPTION: u32 = 64 << 10;
/// Longest payload of an option that is skipped to answer that it is too long.
pub(crate) const MAX_SKIPPED_OPTION: u32 = 32 << 20;
/// Contexts that one connection may select.
pub(crate) const MAX_CONTEXTS: usize = 1024;

/// How a server treats all its clients.
#[derive(Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Clients at the same time; further ones wait in the listeners' queues. 0: no limit. Handshakes do not
    /// count; one that ends when there is no room waits for it as long as its time lasts.
    pub max_connections: usize,
    /// How long a client may take from connecting to the transmission phase.
    pub handshake_limit: Duration,
    /// How long a client may leave a request half sent, or its replies unread, without a byte moving.
    pub stall_limit: Duration,
    /// Threads that one export may use. They are started when needed and end with the export's last client.
    pub workers: usize,
    /// Bytes that the buffers of requests and unsent replies of all connections may hold. 2 MiB of it are set
    /// aside for each of `max_connections`, at least half of it is not.
    pub memory: u64,
    /// Whether and how TLS is spoken.
    #[cfg(feature = "tls")]
    pub tls: super::tls::TlsPolicy,
    /// The observer of clients.
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_connections: 100,
            handshake_limit: Duration::from_secs(10),
            stall_limit: Duration::from_secs(60),
            workers: 32,
            memory: 512 << 20,
            #[cfg(feature = "tls")]
            tls: super::tls::TlsPolicy::Off,
            observer: None,
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("max_connections", &self.max_connections)
            .field("handshake_limit", &self.handshake_limit)
            .field("stall_limit", &self.stall_limit)
            .field("workers", &self.workers)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

/// Notified when clients come to and go from exports, for each export in the order in which they do.
///
/// Called from the server's threads. Must neither block nor remove exports or stop the server: both wait for
/// it to return.
pub trait Observer: Send + Sync {
    /// A client has connected to `export`, which now has `clients` of them.
    fn connected(&self, export: &str, clients: usize) {
        let _ = (export, clients);
    }

    /// A client of `export` has gone and left `clients` others. Its requests have all ended.
    fn disconnected(&self, export: &str, clients: usize) {
        let _ = (export, clients);
    }
}
