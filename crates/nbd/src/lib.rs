//! The NBD protocol, a server of block devices, and a client that is one.
//!
//! | module | what it is |
//! |---|---|
//! | [`proto`] | the wire format: pure bytes in, typed values out |
//! | [`server`] | devices served to clients |
//! | [`NbdUri`] | how an export is named |
//! | [`client`] | an export as a [`BlockDevice`](blockmirror_block::BlockDevice) |
//!
//! ```
//! use std::sync::Arc;
//! use blockmirror_block::{BlockDevice, WriteFlags, testing::MemoryDisk};
//! use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
//! use blockmirror_nbd::{ClientOptions, NbdUri};
//!
//! # let dir = tempfile::tempdir()?;
//! # let socket = dir.path().join("nbd.sock");
//! let disk = Arc::new(MemoryDisk::new(1 << 20));
//! let server = Server::new(ServerOptions::default())?;
//! server.add(Export::new("disk", Arc::clone(&disk) as _).writable(true))?;
//! server.listen(Listener::unix(&socket)?)?;
//!
//! let uri: NbdUri = format!("nbd+unix:///disk?socket={}", socket.display()).parse()?;
//! let client = ClientOptions::new(uri).writable(true).open()?;
//! client.write_at(b"boot", 4096, WriteFlags::NONE)?;
//! assert_eq!(&disk.contents()?[4096..][..4], b"boot");
//! drop(client);
//! server.stop()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod client;
pub mod proto;
pub mod server;
#[cfg(feature = "tls")]
mod tls_error;
mod uri;

#[cfg(feature = "tls")]
pub use client::TlsOptions;
pub use client::{Client, ClientError, ClientOptions, ClientStorage, MAX_CONNECTIONS};

pub use uri::{DEFAULT_PORT, MAX_EXPORT_NAME, NbdAddress, NbdUri, UriError};
