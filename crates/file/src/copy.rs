//! Copies between two files inside the kernel (`copy_file_range`): a reflink where the filesystem has them.

use std::fs::File;
use std::os::fd::BorrowedFd;

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::copy_file_range;
use rustix::io::Errno;

use crate::io::retry;

/// One call moves at most this much, so that a caller's cancel or a short copy is noticed in between.
const PIECE: u64 = 64 * 1024 * 1024;

/// Copies up to `len` bytes; answers how many, fewer when the source ends or the kernel stops halfway.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if the kernel refuses before anything was copied.
pub(crate) fn copy(from: BorrowedFd<'_>, from_at: u64, to: &File, to_at: u64, len: u64) -> Result<u64> {
    let mut done = 0;
    while done < len {
        let (mut source, mut target) = (from_at.saturating_add(done), to_at.saturating_add(done));
        let piece = (len - done).min(PIECE);
        let moved = retry(|| copy_file_range(from, Some(&mut source), to, Some(&mut target), piece as usize));
        match moved {
            Ok(0) if done == 0 => {
                return Err(Error::new(ErrorKind::Unsupported, "copy in the kernel").at(to_at));
            }
            Ok(0) => break,
            Ok(n) => done += n as u64,
            // Other filesystem, same overlapping file, unaligned for O_DIRECT, a file without the operation.
            Err(
                e @ (Errno::XDEV
                | Errno::INVAL
                | Errno::OPNOTSUPP
                | Errno::NOSYS
                | Errno::BADF
                | Errno::PERM
                | Errno::ACCESS
                | Errno::TXTBSY
                | Errno::OVERFLOW),
            ) => {
                if done > 0 {
                    break;
                }
                return Err(Error::new(ErrorKind::Unsupported, "copy in the kernel").at(to_at).caused_by(e));
            }
            Err(e) => return Err(Error::io("copy in the kernel", e.into()).at(to_at + done)),
        }
    }
    Ok(done)
}
