//! Write-through: what is written is durable when the write returns, as with QEMU's cache modes
//! `writethrough` and `directsync`.
//!
//! Put in front of a target by `image`. A discard is a hint and stays one: a flush makes it durable.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, CloneUnits, Extent, Geometry, HostRun, Result, Storage, Visit, WriteFlags,
    ZeroFlags,
};

/// Makes each write to the device below it durable before the write returns.
#[derive(Debug)]
pub struct WriteThrough {
    child: Arc<dyn BlockDevice>,
}

impl WriteThrough {
    /// Writes through to `child`.
    pub fn new(child: Arc<dyn BlockDevice>) -> Self {
        Self { child }
    }
}

impl BlockDevice for WriteThrough {
    fn len(&self) -> u64 {
        self.child.len()
    }

    fn name(&self) -> &str {
        self.child.name()
    }

    fn geometry(&self) -> Geometry {
        self.child.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.child.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.child.write_at(buf, offset, flags | WriteFlags::FUA)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.child.write_zeroes(range, flags | ZeroFlags::FUA)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.child.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.child.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.child.extents(range, visit)
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.child.clone_units(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let calls = self.child.clone_range(offset, run, len)?;
        self.child.flush()?;
        Ok(calls)
    }

    fn preallocate(&self, range: ByteRange) -> Result<()> {
        self.child.preallocate(range)?;
        self.child.flush()
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.child.resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        let copied = self.child.copy_up(range, max_depth)?;
        if copied > 0 {
            self.child.flush()?;
        }
        Ok(copied)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.child))
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.child.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.child.cancel_in_flight();
    }
}
