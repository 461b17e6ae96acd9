//! Positional reads and writes of any length, until all is done or the kernel says no.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use blockmirror_block::{Error, ErrorKind, Result};

/// File offsets are signed in the kernel: nothing lies at or past this.
pub(crate) const MAX_OFFSET: u64 = i64::MAX as u64;

/// Fills `buf` from `offset`; what lies past the end of the file is zero.
pub(crate) fn read(file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset.saturating_add(done as u64);
        if at >= MAX_OFFSET {
            break;
        }
        match file.read_at(&mut buf[done..], at) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", e).at(at)),
        }
    }
    buf[done..].fill(0);
    Ok(())
}

/// Writes all of `buf` at `offset`. The caller has checked that it ends below [`MAX_OFFSET`].
pub(crate) fn write(file: &File, buf: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        match file.write_at(&buf[done..], at) {
            Ok(0) => return Err(Error::new(ErrorKind::NoSpace, "write").at(at)),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("write", e).at(at)),
        }
    }
    Ok(())
}

/// Repeats a system call that a signal interrupted.
pub(crate) fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}
