//! The NBD protocol, a server of block devices, and a client that is one.
//!
//! | module | what it is |
//! |---|---|
//! | [`proto`] | the wire format: pure bytes in, typed values out |
//! | [`NbdUri`] | how an export is named |

pub mod proto;
mod uri;

pub use uri::{DEFAULT_PORT, MAX_EXPORT_NAME, NbdAddress, NbdUri, UriError};
