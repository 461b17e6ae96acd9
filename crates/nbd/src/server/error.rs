//! What a server refuses, and why.
//!
//! Returned to the caller that runs the server; a client's errors are answered to the client and logged.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A call on a [`Server`](super::Server) or a [`Listener`](super::Listener) that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An export of this name is there already.
    #[error("export `{name}` exists already")]
    ExportExists {
        /// The name.
        name: String,
    },
    /// No export has this name.
    #[error("no export `{name}`")]
    NoSuchExport {
        /// The name.
        name: String,
    },
    /// The export has clients and was to be removed only without.
    #[error("export `{name}` still in use by {clients} client(s)")]
    ExportInUse {
        /// The name.
        name: String,
        /// How many connections it has.
        clients: usize,
    },
    /// A name, description or meta context name is longer than the protocol allows.
    #[error("{what} is {len} bytes long; the protocol allows 4096")]
    NameTooLong {
        /// What is too long.
        what: &'static str,
        /// How long it is.
        len: usize,
    },
    /// The export was asked to be writable and its device is not.
    #[error("export `{name}` cannot be writable: {device} is read-only")]
    ReadOnlyDevice {
        /// The export.
        name: String,
        /// The device.
        device: String,
    },
    /// The server is stopping or has stopped.
    #[error("the NBD server has been stopped")]
    Stopped,
    /// After all connections were aborted, the device still had not answered.
    #[error("{requests} request(s) on export `{name}` do not end")]
    RequestsHang {
        /// The export.
        name: String,
        /// How many.
        requests: usize,
    },
    /// Another server answers at the path.
    #[error("{}: another server listens there", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket is at the path.
    #[error("{}: exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// An address stands for nothing that can be listened on.
    #[error("{address}: {cause}")]
    Listen {
        /// Path, or host and port.
        address: String,
        /// Why.
        cause: io::Error,
    },
    /// The environment's `LISTEN_FDS` or an inherited descriptor is not what it should be.
    #[error("socket activation: {reason}")]
    Activation {
        /// What is wrong.
        reason: String,
    },
    /// Credentials for TLS cannot be used.
    #[cfg(feature = "tls")]
    #[error("TLS credentials: {reason}")]
    Credentials {
        /// What is wrong, with the file.
        reason: String,
    },
    /// The operating system gave no thread, descriptor or the like.
    #[error("{what}: {cause}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        cause: io::Error,
    },
}
