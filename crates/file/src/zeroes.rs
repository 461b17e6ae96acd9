//! Zeroing and giving back space with `fallocate`.
//!
//! Block devices accept the same calls as files since Linux 4.9, for whole logical blocks.

use std::fs::File;

use blockmirror_block::{ByteRange, Error, Result};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::io::retry;

/// Whether a `fallocate` did it, or the file cannot do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Unsupported,
}

fn call(file: &File, mode: FallocateFlags, range: ByteRange, operation: &'static str) -> Result<Outcome> {
    if range.is_empty() {
        return Ok(Outcome::Done);
    }
    match retry(|| fallocate(file, mode, range.start(), range.len())) {
        Ok(()) => Ok(Outcome::Done),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL | Errno::REMOTEIO) => {
            Ok(Outcome::Unsupported)
        }
        // A block device that another descriptor has claimed: the kernel would have to claim it for the call.
        Err(Errno::BUSY) => Ok(Outcome::Unsupported),
        Err(e) => Err(Error::io(operation, e.into()).at(range.start())),
    }
}

/// Makes a hole of `range`; the length of the file stays.
pub(crate) fn punch(file: &File, range: ByteRange, operation: &'static str) -> Result<Outcome> {
    call(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range, operation)
}

/// Makes `range` zero and keeps space reserved for it; the length of the file stays.
pub(crate) fn zero_range(file: &File, range: ByteRange) -> Result<Outcome> {
    call(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, range, "write zeroes")
}

/// Reserves space for `range`, growing the file if it ends before; contents stay.
pub(crate) fn allocate(file: &File, range: ByteRange) -> Result<Outcome> {
    call(file, FallocateFlags::empty(), range, "allocate")
}

/// Reserves space for `range`; the length of the file stays.
pub(crate) fn reserve(file: &File, range: ByteRange) -> Result<Outcome> {
    call(file, FallocateFlags::KEEP_SIZE, range, "allocate")
}

/// Whether holes can be punched, found out by punching one far past the end, where there is nothing.
pub(crate) fn can_punch(file: &File) -> bool {
    const PAST_THE_END: u64 = 1 << 30;
    const LEN: u64 = 1 << 16;
    let Ok(meta) = file.metadata() else { return false };
    let at = (meta.len() & !(LEN - 1)).saturating_add(PAST_THE_END);
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // FBIG: too near the largest possible file, but the call as such is known.
    matches!(retry(|| fallocate(file, mode, at, LEN)), Ok(()) | Err(Errno::FBIG))
}
