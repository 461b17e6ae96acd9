//! Copy-on-read: what is read from the layers below stays in the top image, so that the next read finds it
//! there.
//!
//! The work is the device's own ([`BlockDevice::copy_up`]), which takes turns with writes by itself; this
//! filter only says when. Before a read it looks whether anything in the range lies deeper than the top.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, CloneUnits, Extent, Geometry, HostRun, Result, Storage, Visit, WriteFlags,
    ZeroFlags,
};

/// Populates the device below it with what is read through it.
#[derive(Debug)]
pub struct CopyOnRead {
    child: Arc<dyn BlockDevice>,
    max_depth: u32,
}

impl CopyOnRead {
    /// Copies what any layer below `child`'s top image holds.
    pub fn new(child: Arc<dyn BlockDevice>) -> Self {
        Self { child, max_depth: u32::MAX }
    }

    /// The same for the layers 1 to `max_depth` below the top only; what lies deeper is read and left there.
    /// (QEMU names the last of them `bottom`.)
    #[must_use]
    pub fn max_depth(mut self, max_depth: u32) -> Self {
        self.max_depth = max_depth;
        self
    }

    /// The device below.
    pub fn child(&self) -> &Arc<dyn BlockDevice> {
        &self.child
    }

    fn is_below(&self, extent: &Extent) -> bool {
        !extent.kind.is_unallocated() && (1..=self.max_depth).contains(&extent.depth)
    }
}

impl BlockDevice for CopyOnRead {
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
        // A range out of bounds is the child's to refuse.
        if let Some(range) = ByteRange::checked(offset, buf.len()).filter(|r| r.end() <= self.child.len()) {
            let mut below = false;
            self.child.extents(range, &mut |extent| {
                below = self.is_below(&extent);
                if below { Visit::Break(()) } else { Visit::Continue(()) }
            })?;
            if below {
                self.child.copy_up(range, self.max_depth)?;
            }
        }
        self.child.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.child.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.child.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.child.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.child.flush()
    }

    /// What lies below is not located: who reads it past the filter would not bring it up.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.child.extents(range, &mut |mut extent| {
            if self.is_below(&extent) {
                extent.host = None;
            }
            visit(extent)
        })
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.child.clone_units(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        self.child.clone_range(offset, run, len)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.child.resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.child.copy_up(range, max_depth)
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

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::MemoryDisk;

    use super::*;

    fn chain() -> (Arc<MemoryDisk>, CopyOnRead) {
        let base = MemoryDisk::with_contents(&[1; 8192]).named("base");
        let mid = MemoryDisk::new(8192).with_cluster_size(1024).with_backing(Arc::new(base)).named("mid");
        mid.write_at(&[2; 1024], 4096, WriteFlags::NONE).unwrap();
        let top =
            Arc::new(MemoryDisk::new(16384).with_cluster_size(1024).with_backing(Arc::new(mid)).named("top"));
        let filter = CopyOnRead::new(Arc::clone(&top) as _);
        (top, filter)
    }

    #[test]
    fn a_read_brings_whole_clusters_up_and_no_more() {
        let (top, filter) = chain();
        let before = top.contents().unwrap();
        let mut buf = [0; 10];
        filter.read_at(&mut buf, 1020).unwrap();
        assert_eq!(buf, [1; 10]);
        assert_eq!(top.allocated_bytes(), 2048);
        // Nothing holds anything there.
        filter.read_at(&mut buf, 12_000).unwrap();
        assert_eq!(top.allocated_bytes(), 2048);
        assert_eq!(top.contents().unwrap(), before);
    }

    #[test]
    fn what_lies_below_the_bottom_stays_there() {
        let (top, filter) = chain();
        let filter = filter.max_depth(1);
        let mut buf = [0; 8192];
        filter.read_at(&mut buf, 0).unwrap();
        assert_eq!(top.allocated_bytes(), 1024, "only what the middle holds itself");
        assert_eq!(buf[4096], 2);
    }

    #[test]
    fn what_was_written_is_read_and_what_is_read_past_the_end_is_refused() {
        let (top, filter) = chain();
        filter.write_at(&[9; 100], 500, WriteFlags::NONE).unwrap();
        let mut buf = [0; 1024];
        filter.read_at(&mut buf, 0).unwrap();
        assert_eq!((buf[499], buf[500], buf[599], buf[600]), (1, 9, 9, 1));
        assert!(filter.read_at(&mut buf, 16384).is_err());
        assert_eq!(top.allocated_bytes(), 1024);
    }
}
