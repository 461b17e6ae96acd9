//! Hashes as text.

use std::fmt;

use thiserror::Error;

/// The text is no hash of this kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[error("not a hash: {text:?} is not {expected}")]
pub struct ParseHashError {
    /// What was read.
    pub text: String,
    /// What it should look like.
    pub expected: &'static str,
}

/// Writes `bytes` as hexadecimal digits.
pub(crate) fn write_hex(bytes: &[u8; 32], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Reads 64 hexadecimal digits.
pub(crate) fn read_hex(digits: &str) -> Option<[u8; 32]> {
    blake3::Hash::from_hex(digits).ok().map(Into::into)
}
