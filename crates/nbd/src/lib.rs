//! The NBD protocol, a server of block devices, and a client that is one.
//!
//! | module | what it is |
//! |---|---|
//! | [`proto`] | the wire format: pure bytes in, typed values out |
//! | [`server`] | devices served to clients |
//! | [`NbdUri`] | how an export is named |
//! | [`client`] | an export as a [`BlockDevice`](blockmirror_block::BlockDevice) |

pub mod client;
pub mod proto;
pub mod server;
mod uri;

#[cfg(feature = "tls")]
pub use client::TlsOptions;
pub use client::{Client, ClientError, ClientOptions, ClientStorage, MAX_CONNECTIONS};

pub use uri::{DEFAULT_PORT, MAX_EXPORT_NAME, NbdAddress, NbdUri, UriError};
