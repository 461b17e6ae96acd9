//! The hash of a disk by its blocks.

use std::fmt;
use std::str::FromStr;

use blake3::Hasher;
use blockmirror_block::{BlockDevice, Error, Visit};

use crate::HashOptions;
use crate::parallel::{BlockDigest, Sink, hash_blocks};
use crate::text::{ParseHashError, read_hex, write_hex};
use crate::walk::blocks_of;

/// What [`DiskHash`] derives its key from.
pub const CONTEXT: &str = "blockmirror bm1 2026: length and digests of the 1 MiB blocks of a disk";
/// What a disk hash begins with as text.
const PREFIX: &str = "bm1:";

/// A hash over the length of a disk and the digests of its blocks; see [the crate](crate).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskHash([u8; 32]);

impl DiskHash {
    /// Hashes what `device` holds. `progress` gets the bytes that are done, some times a second on the
    /// caller's thread and at the end, and says whether to go on; `None` if it stopped.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of(
        device: &dyn BlockDevice,
        options: &HashOptions,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<Self>, Error> {
        let hasher = hash_blocks(device, options, &|_| None, length_hasher(device.len()), progress)?;
        Ok(hasher.map(Self::of_hasher))
    }

    /// The hash that `hasher` has, which has got the length and all digests.
    pub(crate) fn of_hasher(hasher: Hasher) -> Self {
        Self(*hasher.finalize().as_bytes())
    }

    /// The hash of a disk of `len` bytes, all of them zero. Hashes 32 bytes for each MiB of it.
    pub fn of_zeros(len: u64) -> Self {
        let mut hasher = length_hasher(len);
        hasher.zeros(blocks_of(len));
        Self::of_hasher(hasher)
    }
}

#[expect(clippy::little_endian_bytes, reason = "the hash begins with the length in this order")]
pub(crate) fn length_hasher(len: u64) -> Hasher {
    let mut hasher = Hasher::new_derive_key(CONTEXT);
    hasher.update(&len.to_le_bytes());
    hasher
}

impl Sink for Hasher {
    fn zeros(&mut self, count: u64) {
        static MANY: [u8; 32 << 11] = [0; 32 << 11];
        let mut left = count;
        while left > 0 {
            let some = left.min(MANY.len() as u64 / 32);
            self.update(&MANY[..32 * some as usize]);
            left -= some;
        }
    }

    fn block(&mut self, digest: BlockDigest) {
        self.update(&digest);
    }
}

impl fmt::Display for DiskHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for DiskHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DiskHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        let bytes = text.strip_prefix(PREFIX).and_then(read_hex);
        bytes.map(Self).ok_or_else(|| ParseHashError {
            text: text.to_owned(),
            expected: "`bm1:` and 64 hexadecimal digits",
        })
    }
}
