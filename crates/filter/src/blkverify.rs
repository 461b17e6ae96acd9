//! `blkverify`: two disks that have to hold the same bytes, shown as one. For trials of a format: the disk
//! under test, and a raw one to compare with.
//!
//! Made by the daemon's driver of that name. Must hold: each write has been done to both before a read of the
//! same bytes compares them.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, DiscardEffect, Error, ErrorKind, Extent, Geometry, RangeLock, Result, Visit,
    WriteFlags, ZeroFlags,
};

/// Bytes that are compared at a time.
const PIECE: u64 = 1 << 20;

/// Writes to two disks, and compares what they hold when it is read.
#[derive(Debug)]
pub struct Blkverify {
    test: Arc<dyn BlockDevice>,
    raw: Arc<dyn BlockDevice>,
    /// Reads between the two writes of one range would find a difference.
    order: RangeLock,
}

impl Blkverify {
    /// `test` is what is shown; `raw` is what it is compared with.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if they differ in length.
    pub fn new(test: Arc<dyn BlockDevice>, raw: Arc<dyn BlockDevice>) -> Result<Self> {
        if test.len() != raw.len() {
            return Err(Error::new(ErrorKind::InvalidInput, "compare")
                .in_file(test.name())
                .because(format!("it has {} bytes, and {} has {}", test.len(), raw.name(), raw.len())));
        }
        Ok(Self { test, raw, order: RangeLock::new() })
    }

    /// Fails at the first byte at which `bytes`, read from the disk under test at `offset`, differs from the
    /// other disk.
    fn compare(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, bytes.len() as u64);
        // At most a piece.
        let mut other = vec![0; range.len().min(PIECE) as usize];
        for (piece, seen) in range.pieces(PIECE).zip(bytes.chunks(PIECE as usize)) {
            let expected = &mut other[..seen.len()];
            self.raw.read_at(expected, piece.start())?;
            if let Some(at) = seen.iter().zip(&*expected).position(|(seen, expected)| seen != expected) {
                return Err(Error::new(ErrorKind::Io, "verify")
                    .in_file(self.test.name())
                    .at(piece.start() + at as u64)
                    .because(format!("contents differ from those of {}", self.raw.name())));
            }
        }
        Ok(())
    }

    fn range(&self, offset: u64, len: usize, operation: &'static str) -> Result<ByteRange> {
        ByteRange::checked(offset, len)
            .filter(|range| range.end() <= self.len())
            .ok_or_else(|| Error::out_of_bounds(operation, offset, len as u64, self.len()))
    }
}

impl BlockDevice for Blkverify {
    fn len(&self) -> u64 {
        self.test.len()
    }

    fn name(&self) -> &str {
        self.test.name()
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.test.geometry();
        geometry.writable &= self.raw.geometry().writable;
        // The two might read differently afterwards.
        geometry.discard = DiscardEffect::Ignored;
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = self.range(offset, buf.len(), "read")?;
        let _no_write = self.order.lock_shared(range)?;
        self.test.read_at(buf, offset)?;
        self.compare(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let range = self.range(offset, buf.len(), "write")?;
        let _alone = self.order.lock_exclusive(range)?;
        self.test.write_at(buf, offset, flags)?;
        self.raw.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let _alone = self.order.lock_exclusive(range)?;
        self.test.write_zeroes(range, flags)?;
        // How quickly it is done is what the disk under test says.
        self.raw.write_zeroes(range, flags.difference(ZeroFlags::NO_FALLBACK))
    }

    fn discard(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.test.flush()?;
        self.raw.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.test.extents(range, &mut |mut extent| {
            // What is shared with the file below was compared with nothing.
            extent.host = None;
            visit(extent)
        })
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.raw))
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.test.write_would_wait(range) || self.raw.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.test.cancel_in_flight();
        self.raw.cancel_in_flight();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use blockmirror_block::testing::MemoryDisk;

    use super::*;

    fn two(len: u64) -> (Arc<MemoryDisk>, Arc<MemoryDisk>) {
        (Arc::new(MemoryDisk::new(len)), Arc::new(MemoryDisk::new(len)))
    }

    #[test]
    fn a_difference_is_found_where_it_is() {
        let (test, raw) = two(4 << 20);
        let disk = Blkverify::new(Arc::clone(&test) as _, Arc::clone(&raw) as _).unwrap();
        disk.write_at(&[7; 65_536], 100, WriteFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(200, 1000), ZeroFlags::MAY_UNMAP).unwrap();
        disk.discard(ByteRange::new(0, 4 << 20)).unwrap();
        let mut seen = vec![0; 4 << 20];
        disk.read_at(&mut seen, 0).unwrap();
        assert_eq!((seen[199], seen[200], seen[1200]), (7, 0, 7));
        raw.write_at(&[1], (2 << 20) + 5, WriteFlags::NONE).unwrap();
        let error = disk.read_at(&mut seen[1..], 1).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some((2 << 20) + 5)), "{error}");
        disk.read_at(&mut seen[..100], 0).unwrap();
        assert_eq!(disk.read_at(&mut seen, 1 << 20).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }

    #[test]
    fn disks_of_different_lengths_are_refused() {
        let refused = Blkverify::new(Arc::new(MemoryDisk::new(512)), Arc::new(MemoryDisk::new(1024)));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn reads_find_no_difference_while_others_write() {
        let (test, raw) = two(1 << 16);
        let disk = &Blkverify::new(test, raw).unwrap();
        thread::scope(|scope| {
            for value in 1..4 {
                scope.spawn(move || {
                    for _ in 0..200 {
                        disk.write_at(&[value; 4096], 2048, WriteFlags::NONE).unwrap();
                        disk.read_at(&mut [0; 8192], 0).unwrap();
                    }
                });
            }
        });
    }
}
