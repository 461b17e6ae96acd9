//! What can be wrong with bytes from a peer.
//!
//! Made by every decoder of this module; server and client give it on as the cause of their own errors.

use thiserror::Error;

/// Bytes that are not what the protocol says.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProtoError {
    /// A magic number is not the one that belongs there.
    #[error("{what}: magic is {found:#x}, not {expected:#x}")]
    Magic {
        /// What was to be decoded.
        what: &'static str,
        /// The number that belongs there.
        expected: u64,
        /// The number that was found.
        found: u64,
    },
    /// The bytes end before the value does.
    #[error("{what}: {len} bytes are too few")]
    Short {
        /// What was to be decoded.
        what: &'static str,
        /// How many bytes there were.
        len: usize,
    },
    /// Bytes are left over after the value, or a length does not fit the kind.
    #[error("{what}: {len} bytes are more than belong there")]
    Long {
        /// What was to be decoded.
        what: &'static str,
        /// How many bytes there were.
        len: u64,
    },
    /// A string is longer than [`MAX_STRING`](super::MAX_STRING).
    #[error("{what}: a string of {len} bytes is too long")]
    StringTooLong {
        /// What was to be decoded.
        what: &'static str,
        /// The length said.
        len: u64,
    },
    /// A string is not UTF-8.
    #[error("{what}: a string is not UTF-8")]
    NotUtf8 {
        /// What was to be decoded.
        what: &'static str,
    },
    /// A number is outside what is allowed there.
    #[error("{what}: {found} is not allowed")]
    Value {
        /// What was to be decoded.
        what: &'static str,
        /// The number that was found.
        found: u64,
    },
}
