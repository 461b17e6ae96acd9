//! A client: an export of an NBD server as a `BlockDevice`.
//!
//! ```no_run
//! use blockmirror_block::BlockDevice;
//! use blockmirror_nbd::{ClientOptions, NbdUri};
//!
//! let uri: NbdUri = "nbd+unix:///disk?socket=/run/nbd.sock".parse()?;
//! let disk = ClientOptions::new(uri).writable(true).open()?;
//! println!("{} bytes", disk.len());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | file | its part |
//! |---|---|
//! | `options` | what the caller wants |
//! | `device` | the device: bounds, alignment, splitting, extents |
//! | `storage` | the same as a storage of fixed length, for formats |
//! | `connection_pool` | several connections as one; losing them and reconnecting |
//! | `durability`, `backoff` | pure parts of that: which writes may be lost, how long to wait |
//! | `connect`, `handshake` | making a connection |
//! | `connection` | requests and replies of one connection, for many threads |
//! | `coverage`, `status` | what replies to reads and to block status bring |
//! | `link`, `socket`, `tls` | bytes |

mod backoff;
mod connect;
mod connection;
mod connection_pool;
mod coverage;
mod device;
mod durability;
mod error;
mod handshake;
mod link;
mod options;
mod refusal;
mod requests;
mod send_turn;
mod socket;
mod status;
mod storage;
#[cfg(feature = "tls")]
mod tls;

pub use device::Client;
pub use error::ClientError;
pub use options::{ClientOptions, MAX_CONNECTIONS};
pub use storage::ClientStorage;
#[cfg(feature = "tls")]
pub use tls::TlsOptions;
