//! BLAKE3 of all bytes of a disk, in order, on the caller's thread.

use std::fmt;
use std::str::FromStr;

use blake3::Hasher;
use blockmirror_block::{BlockDevice, Error, Visit};

use crate::text::{ParseHashError, read_hex, write_hex};
use crate::walk::{BLOCK, Run, Walk};

/// BLAKE3 of all bytes of a disk: what `b3sum` prints of a raw image of it.
///
/// Zeros are hashed too, though not read: a large disk takes its time, however sparse it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Hashes what `device` holds. `progress` gets the bytes that are done after each block, and says whether
    /// to go on; `None` if it stopped.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of(
        device: &dyn BlockDevice,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<Self>, Error> {
        let (mut walk, mut hasher) = (Walk::new(device), Hasher::new());
        let mut buffer = vec![0; BLOCK as usize];
        while let Some(run) = walk.next()? {
            let (range, is_zero) = match run {
                Run::Zero(range) => (range, true),
                Run::Block(range) => (range, false),
            };
            if is_zero {
                buffer.fill(0);
            }
            for piece in range.pieces(BLOCK) {
                let bytes = &mut buffer[..piece.len() as usize];
                if !is_zero {
                    device.read_at(bytes, piece.start())?;
                }
                hasher.update(bytes);
                if progress(piece.end()).is_break() {
                    return Ok(None);
                }
            }
        }
        Ok(Some(Self(*hasher.finalize().as_bytes())))
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ContentHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        let bytes = read_hex(text);
        bytes
            .map(Self)
            .ok_or_else(|| ParseHashError { text: text.to_owned(), expected: "64 hexadecimal digits" })
    }
}
