//! A storage that gives up when it is asked to, while a new image is laid out in it.
//!
//! Used by [`crate::PreparedImage::write_until`]; the trials of [`crate::Target`] put the same question.
//! Preallocation takes minutes on large disks: what it asks of
//! the storage is done in pieces, and before each the caller's question is put.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::{
    ByteRange, Error, ErrorKind, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags,
};

/// What is asked of the storage at once.
pub(crate) const PIECE: u64 = 64 << 20;

/// `inner`, until `stop` says so: then each change fails with [`ErrorKind::Cancelled`].
pub(crate) struct Stoppable<'a> {
    pub(crate) inner: &'a dyn Storage,
    pub(crate) stop: &'a (dyn Fn() -> bool + Sync),
    /// Set before the first change.
    pub(crate) changed: &'a AtomicBool,
}

/// Fails with [`ErrorKind::Cancelled`], about the file `name`, if `stop` says so.
pub(crate) fn go_on(stop: &(dyn Fn() -> bool + Sync), name: &str) -> Result<()> {
    if !stop() {
        return Ok(());
    }
    let stopped = Error::new(ErrorKind::Cancelled, "create").because("interrupted");
    Err(stopped.or_in_file(&name.into()))
}

impl Stoppable<'_> {
    fn go_on(&self) -> Result<()> {
        go_on(self.stop, self.inner.name())?;
        self.changed.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn in_pieces(&self, range: ByteRange, each: impl Fn(ByteRange) -> Result<()>) -> Result<()> {
        for piece in range.pieces(PIECE) {
            self.go_on()?;
            each(piece)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Stoppable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stoppable").field(&self.inner).finish()
    }
}

impl Storage for Stoppable<'_> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn info(&self) -> StorageInfo {
        self.inner.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.go_on()?;
        self.inner.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.in_pieces(range, |piece| self.inner.write_zeroes(piece, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.in_pieces(range, |piece| self.inner.discard(piece))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.in_pieces(range, |piece| self.inner.allocate(piece))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.go_on()?;
        self.inner.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.inner.extents(range, visit)
    }
}
