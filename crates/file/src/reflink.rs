//! Sharing of blocks between two files of one file system: `FICLONERANGE`, a reflink.
//!
//! Used by [`crate::FileStorage`]. The kernel clones whole blocks only, writes out what the page cache has of
//! both ranges first, and refuses without a change what it cannot do.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};

use blockmirror_block::{ByteRange, Error, ErrorKind, HostRun, Result, Storage};
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Setter, opcode};

use crate::io::retry;

/// One call clones at most this much: the kernel holds both files for as long as it takes.
const PIECE: u64 = 256 << 20;
/// How often the probe is repeated for a source that grows.
const TRIES: u32 = 16;

const FICLONERANGE: Opcode = opcode::write::<FileCloneRange>(0x94, 13);

/// The argument of the call, as the kernel has it. A length of 0 is all up to the end of the source.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

fn call(from: BorrowedFd<'_>, from_at: u64, to: &File, to_at: u64, len: u64) -> rustix::io::Result<()> {
    let argument = FileCloneRange {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: from_at,
        src_length: len,
        dest_offset: to_at,
    };
    #[expect(unsafe_code, reason = "no safe call clones a part of a file")]
    // SAFETY: the kernel reads this structure, which is what the opcode takes, and keeps nothing of it. Both
    // descriptors are open for as long as they are borrowed. The call changes a file and no memory.
    let cloned = retry(|| unsafe { ioctl::ioctl(to, Setter::<FICLONERANGE, _>::new(argument)) });
    cloned
}

/// The block in which `to` can share blocks with `from`, what `from` holds having been made durable.
pub(crate) fn block(to: &File, from: &dyn Storage) -> Option<u64> {
    let descriptor = from.host_fd()?;
    if !can_share(to, descriptor) {
        return None;
    }
    make_durable(from, descriptor).ok()?;
    let block = u64::try_from(rustix::fs::fstatfs(to).ok()?.f_bsize).ok()?;
    block.is_power_of_two().then_some(block)
}

/// Asks the kernel to clone nothing: the bytes from the end of the source on, to a place where no block
/// begins. All that depends on the two files is looked at before that, and should the source become longer
/// meanwhile the place is refused.
fn can_share(to: &File, from: BorrowedFd<'_>) -> bool {
    let end = || rustix::fs::fstat(from).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
    for _ in 0..TRIES {
        let Some(len) = end() else { return false };
        match call(from, len, to, 1, 0) {
            Ok(()) => return true,
            Err(Errno::INVAL) if end() != Some(len) => {}
            Err(_) => return false,
        }
    }
    false
}

/// A storage that is open for reading makes nothing durable by itself: others may have written the file.
fn make_durable(file: &dyn Storage, descriptor: BorrowedFd<'_>) -> Result<()> {
    if file.info().writable {
        // Not by the descriptor, on which the kernel reports a lost write once only.
        return file.flush();
    }
    retry(|| rustix::fs::fdatasync(descriptor)).map_err(|e| Error::io("flush", e.into()))
}

/// Clones `len` bytes of `run` to `offset`; answers how many calls it took.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if the kernel refuses.
pub(crate) fn clone(to: &File, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
    let refused = || Error::new(ErrorKind::Unsupported, "clone").refused(true);
    let Some(from) = run.storage.host_fd() else {
        return Err(refused().at(offset).because("the source is not a host file"));
    };
    let mut calls = 0;
    for piece in ByteRange::at(offset, len).pieces(PIECE) {
        let from_at = run.offset.saturating_add(piece.start() - offset);
        match call(from, from_at, to, piece.start(), piece.len()) {
            Ok(()) => calls += 1,
            // Another file system, one that does not share blocks, no whole blocks, past the source's end,
            // files with different checksums, swap, immutable.
            Err(
                e @ (Errno::XDEV
                | Errno::INVAL
                | Errno::OPNOTSUPP
                | Errno::NOTTY
                | Errno::NOSYS
                | Errno::BADF
                | Errno::PERM
                | Errno::ACCESS
                | Errno::TXTBSY),
            ) => return Err(refused().at(piece.start()).caused_by(e)),
            Err(e) => return Err(Error::io("clone", e.into()).at(piece.start())),
        }
    }
    Ok(calls)
}
