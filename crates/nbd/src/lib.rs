//! The NBD protocol, a server of block devices, and a client that is one.

#![forbid(unsafe_code)]

mod uri;

pub use uri::{DEFAULT_PORT, MAX_EXPORT_NAME, NbdAddress, NbdUri, UriError};
