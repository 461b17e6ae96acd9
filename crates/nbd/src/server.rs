//! A server of block devices.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
//! # use blockmirror_nbd::server::ServerError;
//! # fn f(disk: Arc<dyn blockmirror_block::BlockDevice>) -> Result<(), ServerError> {
//! let server = Server::new(ServerOptions::default())?;
//! server.add(Export::new("disk", disk).writable(true))?;
//! server.listen(Listener::unix("/run/disk.sock")?)?;
//! // ...
//! server.stop()?;
//! # Ok(())
//! # }
//! ```
//!
//! Threads, no runtime. One thread waits at the listeners. Each client has one for its handshake, which ends
//! with it. From then on its socket is waited for by the workers of its export: whichever is woken takes the
//! client's requests in, and
//!
//! - does them itself, one after the other, and sends their replies together, while the device answers at
//!   once;
//! - leaves them to other workers, so that they run at the same time, when the device has callers wait
//!   (`dispatch_policy` decides).
//!
//! An idle client costs a socket and a few hundred bytes. Nothing blocks on a client: replies that it does
//! not read wait in a queue, and when that is long, its requests are not read either. What all clients
//! together can make the server hold is limited ([`ServerOptions`]).
//!
//! A flush covers the writes of all connections, because they share one device; so every export says that it
//! can be used by several connections at once.

mod acceptor;
mod acceptor_state;
mod activation;
mod connection;
mod connection_limit;
mod dispatch_policy;
mod error;
mod execute;
mod export;
mod export_runtime;
mod handshake;
mod handshake_set;
mod listener;
mod memory;
mod negotiated_params;
mod options;
mod reply;
mod request_decoder;
mod socket;
mod state;
mod status;
#[cfg(feature = "tls")]
mod tls;
mod transport;
mod worker_pool;

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use error::ServerError;
pub use export::{Export, ExportInfo, MetaContext, RemoveMode};
pub use listener::Listener;
pub use options::{Observer, ServerOptions};
#[cfg(feature = "tls")]
pub use tls::{TlsPolicy, x509_credentials};

use export_runtime::ExportRuntime;
use state::ServerState;

/// An NBD server: exports under their names, listeners, and clients. See the [module](super).
///
/// Dropping it aborts all connections without waiting; [`stop`](Self::stop) is the orderly end.
#[derive(Debug)]
pub struct Server {
    state: Arc<ServerState>,
}

impl Server {
    /// A server without exports and listeners.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(options: ServerOptions) -> Result<Arc<Self>, ServerError> {
        Ok(Arc::new(Self { state: ServerState::new(options)? }))
    }

    /// Serves `export` from now on.
    ///
    /// # Errors
    /// The name is taken or too long, the export is to be writable and its device is not, or the server has
    /// been stopped.
    pub fn add(&self, export: Export) -> Result<(), ServerError> {
        self.state.add(export)
    }

    /// Stops serving `name`. With [`RemoveMode::Hard`] its connections are aborted and their running requests
    /// waited for, some seconds at most.
    ///
    /// # Errors
    /// There is no such export; it has clients and the mode is [`RemoveMode::Safe`]; or its device does not
    /// answer running requests: then it is removed all the same.
    pub fn remove(&self, name: &str, mode: RemoveMode) -> Result<(), ServerError> {
        match self.state.remove(name, mode)? {
            Some(export) if mode == RemoveMode::Hard => {
                export.abort();
                ExportRuntime::wait_drained(&[export], true)
            }
            _ => Ok(()),
        }
    }

    /// What is served, by name.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.state.exports().iter().map(|export| export.info()).collect()
    }

    /// Connections at present, those in the handshake included.
    pub fn connections(&self) -> usize {
        self.state.connections()
    }

    /// Bytes that requests and unsent replies hold at present.
    pub fn memory_in_use(&self) -> u64 {
        self.state.memory.used()
    }

    /// Accepts connections at `listener` until the server stops.
    ///
    /// # Errors
    /// The server has been stopped, or no thread can be started.
    pub fn listen(&self, listener: Listener) -> Result<(), ServerError> {
        self.state.check_running()?;
        self.state.acceptor().add(&self.state, listener)
    }

    /// Serves a client that is connected already.
    ///
    /// # Errors
    /// The server has been stopped, or no thread can be started.
    pub fn serve(&self, stream: impl Into<OwnedFd>) -> Result<(), ServerError> {
        self.state.check_running()?;
        self.state.acceptor().start(&self.state)?;
        self.state.serve(stream.into())
    }

    /// Stops: no client connects any more, running requests are answered, clients are disconnected, listeners
    /// are closed. Takes seconds at most, with clients that do not read and devices that do not answer, too.
    /// All exports are gone afterwards.
    ///
    /// # Errors
    /// A device did not answer requests even when its blocked calls were ended.
    pub fn stop(&self) -> Result<(), ServerError> {
        let exports = self.state.close();
        for export in &exports {
            export.drain();
        }
        let result = ExportRuntime::wait_drained(&exports, false);
        self.state.acceptor().join();
        self.state.handshakes.wait();
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for export in self.state.close() {
            export.abort();
        }
    }
}
