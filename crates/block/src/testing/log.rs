//! The changes of a storage, in order: written by `recording`, read by `crash`.

use std::sync::Arc;

use super::sparse::SparseBytes;
use crate::ByteRange;

/// What a disk writes as a whole.
pub(crate) const SECTOR: u64 = 512;

/// A completed change of a storage.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Logged {
    /// Bytes were written: whole sectors of 512 bytes, but for the end of the storage.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// A range was made zero, by a write of zeros or a discard. Grows the storage if it reaches past the end.
    Zero(ByteRange),
    /// The length was set, or grew by a reservation.
    SetLen(u64),
    /// Everything before is durable.
    Flush,
}

impl Logged {
    /// Does it to `bytes`.
    pub(crate) fn apply(&self, bytes: &mut SparseBytes) {
        match self {
            Self::Write { offset, data } => bytes.write(data, *offset),
            Self::Zero(range) => {
                bytes.zero(*range);
                if bytes.len() < range.end() {
                    bytes.set_len(range.end());
                }
            }
            Self::SetLen(len) => bytes.set_len(*len),
            Self::Flush => {}
        }
    }
}
