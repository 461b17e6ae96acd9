//! Whether a file holds nothing but zeros, so that nothing is lost with it.
//!
//! Called where a data file that is there already would become that of a new image.

use blockmirror_block::zero::is_zero;
use blockmirror_block::{ByteRange, Storage, Visit};

use crate::error::Result;

/// The most bytes that are read. Holes are not.
pub(crate) const MOST: u64 = 1 << 30;

/// Read at once.
const PIECE: u64 = 1 << 20;

/// Whether `storage` holds nothing but zeros. One with more than [`MOST`] bytes of data counts as one that
/// holds something.
pub(crate) fn is_blank(storage: &dyn Storage) -> Result<bool> {
    let len = storage.len()?;
    // At most 1 MiB.
    let mut buf = vec![0; len.min(PIECE) as usize];
    let (mut at, mut read) = (0, 0);
    while at < len {
        let mut data = None;
        storage.extents(ByteRange::new(at, len), &mut |extent| {
            if extent.hole {
                return Visit::Continue(());
            }
            data = Some(extent.range);
            Visit::Break(())
        })?;
        let Some(run) = data else { return Ok(true) };
        for piece in run.pieces(PIECE) {
            read += piece.len();
            let part = &mut buf[..piece.len() as usize];
            storage.read_at(part, piece.start())?;
            if read > MOST || !is_zero(part) {
                return Ok(false);
            }
        }
        at = run.end();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use blockmirror_block::testing::MemoryStorage;

    use super::*;

    #[test]
    fn a_single_byte_is_found() {
        let storage = MemoryStorage::new();
        assert!(is_blank(&storage).unwrap());
        storage.set_len(5 << 20).unwrap();
        storage.write_at(&[0; 4096], 1 << 20).unwrap();
        assert!(is_blank(&storage).unwrap());
        storage.write_at(&[1], (5 << 20) - 1).unwrap();
        assert!(!is_blank(&storage).unwrap());
    }
}
