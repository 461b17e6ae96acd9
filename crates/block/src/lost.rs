//! What a file that was cut short has lost, as a guest sees it: zeros.
//!
//! Used where a guest is served: by the NBD server for its clients' reads, and by formats for the rest of a
//! cluster of which a guest writes a part. Jobs do not use it: they fail with [`ErrorKind::CutShort`].

use crate::error::{Error, ErrorKind, Result};

/// A request that meets a lost range is divided down to this: files lack whole sectors.
const SECTOR: u64 = 512;

/// Fills `buf`, which begins at `offset`, by `read`. Where that fails with [`ErrorKind::CutShort`], what is
/// lost becomes zeros; the first such error is handed back.
///
/// # Errors
/// Any other error of `read`.
pub fn read_lost_as_zeros(
    read: &dyn Fn(&mut [u8], u64) -> Result<()>,
    buf: &mut [u8],
    offset: u64,
) -> Result<Option<Error>> {
    let error = match read(buf, offset) {
        Err(error) if error.kind() == ErrorKind::CutShort => error,
        other => return other.map(|()| None),
    };
    // A border of sectors near the middle.
    let middle = offset + buf.len() as u64 / 2;
    let below = middle / SECTOR * SECTOR;
    let border = if below > offset { below } else { (offset + 1).next_multiple_of(SECTOR) };
    match usize::try_from(border - offset) {
        Ok(at) if at < buf.len() => {
            let (front, back) = buf.split_at_mut(at);
            read_lost_as_zeros(read, front, offset)?;
            read_lost_as_zeros(read, back, border)?;
        }
        // It lies in one sector.
        _ => buf.fill(0),
    }
    Ok(Some(error))
}
