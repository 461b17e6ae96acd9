//! A server of block devices.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
//! # fn f(disk: Arc<dyn blockmirror_block::BlockDevice>) -> Result<(), blockmirror_nbd::server::ServerError> {
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
//!   (`pace` decides).
//!
//! An idle client costs a socket and a few hundred bytes. Nothing blocks on a client: replies that it does
//! not read wait in a queue, and when that is long, its requests are not read either. What all clients
//! together can make the server hold is limited ([`ServerOptions`]).
//!
//! A flush covers the writes of all connections, because they share one device; so every export says that it
//! can be used by several connections at once.

mod activation;
mod connection;
mod doorman;
mod error;
mod execute;
mod export;
mod handshake;
mod handshakes;
mod input;
mod listener;
mod memory;
mod options;
mod pace;
mod pool;
mod reply;
mod served;
#[expect(clippy::module_inception, reason = "the type that the module is named after")]
mod server;
mod slots;
mod socket;
mod status;
mod terms;
#[cfg(feature = "tls")]
mod tls;
mod transport;

pub use error::ServerError;
pub use export::{Export, ExportInfo, MetaContext, RemoveMode};
pub use listener::Listener;
pub use options::{Observer, ServerOptions};
pub use server::Server;
#[cfg(feature = "tls")]
pub use tls::{TlsPolicy, x509_credentials};
