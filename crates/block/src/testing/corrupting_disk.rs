//! A disk that changes a byte of what is written to it, and says nothing: what a verification has to see.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{BlockDevice, ByteRange, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags};

/// Passes everything on to another disk, but for one byte of the first write to it.
#[derive(Debug)]
pub struct CorruptingDisk {
    inner: Arc<dyn BlockDevice>,
    /// The byte that is stored wrongly.
    at: u64,
    done: AtomicBool,
}

impl CorruptingDisk {
    /// `inner`, whose byte at `at` is inverted by the first write, or zeroing, that covers it.
    pub fn new(inner: Arc<dyn BlockDevice>, at: u64) -> Self {
        Self { inner, at, done: AtomicBool::new(false) }
    }

    /// Whether the byte has been stored wrongly.
    pub fn has_corrupted(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    fn hits(&self, range: ByteRange) -> bool {
        range.contains(self.at) && !self.done.swap(true, Ordering::SeqCst)
    }
}

impl BlockDevice for CorruptingDisk {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        if !self.hits(ByteRange::at(offset, buf.len() as u64)) {
            return self.inner.write_at(buf, offset, flags);
        }
        let mut wrong = buf.to_vec();
        wrong[(self.at - offset) as usize] ^= 0xff;
        self.inner.write_at(&wrong, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.inner.write_zeroes(range, flags)?;
        if self.hits(range) { self.inner.write_at(&[0xff], self.at, WriteFlags::NONE) } else { Ok(()) }
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.inner.extents(range, visit)
    }

    fn cancel_in_flight(&self) {
        self.inner.cancel_in_flight();
    }
}
