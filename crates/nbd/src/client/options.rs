//! Options of a client: how it connects, and how long it waits for a server that is away.

use std::time::Duration;

#[cfg(feature = "tls")]
use super::tls::TlsOptions;
use crate::NbdUri;

/// Most connections of one client.
pub const MAX_CONNECTIONS: u16 = 16;

/// How to connect to an export.
///
/// By default: for reading, up to four connections where the server allows it, ten seconds for a handshake,
/// and nothing is waited for when the connection is lost.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    pub(crate) uri: NbdUri,
    pub(crate) writable: bool,
    pub(crate) connections: u16,
    pub(crate) reconnect_delay: Duration,
    pub(crate) open_timeout: Duration,
    pub(crate) handshake_timeout: Duration,
    pub(crate) peer_timeout: Option<Duration>,
    pub(crate) io_timeout: Option<Duration>,
    pub(crate) allocation_depth: bool,
    pub(crate) context: Option<String>,
    #[cfg(feature = "tls")]
    pub(crate) tls: TlsOptions,
}

impl ClientOptions {
    /// The export that `uri` names. TLS is used where the URI says so, with the credentials that it names.
    pub fn new(uri: NbdUri) -> Self {
        Self {
            #[cfg(feature = "tls")]
            tls: TlsOptions {
                directory: uri.tls_certificates.clone(),
                server_name: uri.tls_hostname.clone(),
                accept_any_server: uri.tls_verify_peer == Some(false),
            },
            uri,
            writable: false,
            connections: 4,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            handshake_timeout: Duration::from_secs(10),
            peer_timeout: Some(Duration::from_secs(30)),
            io_timeout: None,
            allocation_depth: false,
            context: None,
        }
    }

    /// Whether it will be written to. Opening fails if the export is read-only.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable;
        self
    }

    /// Most connections, from 1 to [`MAX_CONNECTIONS`]. More than one are used only where the server says
    /// that a flush on one covers writes on all; they are made when there is work for them.
    #[must_use]
    pub fn connections(mut self, connections: u16) -> Self {
        self.connections = connections.clamp(1, MAX_CONNECTIONS);
        self
    }

    /// How long requests wait for a lost server to come back before they fail; then they are done again.
    /// Zero: what was under way fails at once, and each later request makes one attempt to reconnect.
    #[must_use]
    pub fn reconnect_delay(mut self, delay: Duration) -> Self {
        self.reconnect_delay = delay;
        self
    }

    /// How long opening tries again and again. Zero: it tries once.
    #[must_use]
    pub fn open_timeout(mut self, limit: Duration) -> Self {
        self.open_timeout = limit;
        self
    }

    /// How long connecting and the handshake may take, each time.
    #[must_use]
    pub fn handshake_timeout(mut self, limit: Duration) -> Self {
        self.handshake_timeout = limit;
        self
    }

    /// How long a TCP peer may leave what was sent to it unacknowledged before the connection counts as lost;
    /// `None` leaves that to the system. (30 seconds by default.) A slow server is none that keeps silent:
    /// its host acknowledges.
    #[must_use]
    pub fn peer_timeout(mut self, limit: Option<Duration>) -> Self {
        self.peer_timeout = limit;
        self
    }

    /// How long the server may take for one request, from sending it to the end of its reply, before the
    /// connection counts as lost: a request that waited for it fails, or is done again as
    /// [`reconnect_delay`](Self::reconnect_delay) says. `None`, as by default, or zero: as long as it likes.
    /// It is noticed within twice that time.
    #[must_use]
    pub fn io_timeout(mut self, limit: Option<Duration>) -> Self {
        self.io_timeout = limit.filter(|limit| !limit.is_zero());
        self
    }

    /// Whether to ask in which layer of the server's backing chain bytes lie, if it can tell
    /// (`qemu:allocation-depth`); extents then have that depth. Without it the export is one layer.
    #[must_use]
    pub fn allocation_depth(mut self, ask: bool) -> Self {
        self.allocation_depth = ask;
        self
    }

    /// Asks for this meta context in place of `base:allocation`: extents show its flags, and say nothing of
    /// what reads as zeros. Flag 1 makes an extent [`ExtentKind::Unknown`](blockmirror_block::ExtentKind),
    /// flag 2 alone one that is mapped to a hole, no flag data. A bit that is set in a bitmap
    /// (`qemu:dirty-bitmap:NAME`) is flag 1; so is a depth (`qemu:allocation-depth`) of 1, and more are
    /// flag 2. For looking at a context, not for copying.
    #[must_use]
    pub fn context(mut self, name: impl Into<String>) -> Self {
        self.context = Some(name.into());
        self
    }

    /// Credentials for TLS, in place of those that the URI names.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: TlsOptions) -> Self {
        self.tls = tls;
        self
    }
}
