//! A part of a disk as a disk of its own: what `dd` copies of its input.
//!
//! It is read only, and as long as the part.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags,
};

/// The bytes of a disk from one offset to another, for reading.
#[derive(Debug)]
pub struct Window {
    device: Arc<dyn BlockDevice>,
    part: ByteRange,
}

impl Window {
    /// What `device` has of `part`; empty if that lies past its end. Its length does not change from now on.
    pub fn new(device: Arc<dyn BlockDevice>, part: ByteRange) -> Self {
        let part = part.intersect(ByteRange::new(0, device.len()));
        Self { device, part }
    }

    /// `len` bytes at `offset` of the part, where they lie in the disk.
    fn inside(&self, operation: &'static str, offset: u64, len: u64) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.part.len() => Ok(ByteRange::at(self.part.start() + offset, len)),
            _ => {
                let error = Error::out_of_bounds(operation, offset, len, self.part.len());
                Err(error.in_file(self.device.name()))
            }
        }
    }

    fn read_only(&self, operation: &'static str) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, operation).in_file(self.device.name()))
    }
}

impl BlockDevice for Window {
    fn len(&self) -> u64 {
        self.part.len()
    }

    fn name(&self) -> &str {
        self.device.name()
    }

    /// That of a plain disk: units of the whole do not begin where the part does.
    fn geometry(&self) -> Geometry {
        let whole = self.device.geometry();
        let mut geometry = Geometry::plain();
        geometry.writable = false;
        geometry.request_alignment = whole.request_alignment;
        geometry.forgetful = whole.forgetful;
        geometry.backing = whole.backing;
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = self.inside("read", offset, buf.len() as u64)?;
        self.device.read_at(buf, range.start())
    }

    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
        self.read_only("write")
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        self.read_only("write zeroes")
    }

    fn discard(&self, _: ByteRange) -> Result<()> {
        self.read_only("discard")
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let range = self.inside("map", range.start(), range.len())?;
        self.device.extents(range, &mut |mut extent| {
            extent.range = ByteRange::at(extent.range.start() - self.part.start(), extent.range.len());
            visit(extent)
        })
    }

    fn cancel_in_flight(&self) {
        self.device.cancel_in_flight();
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::ExtentKind;
    use blockmirror_block::testing::MemoryDisk;

    use super::*;

    #[test]
    fn it_shows_the_part_and_nothing_past_it() {
        let disk = MemoryDisk::new(10_000);
        disk.write_at(&[1; 1000], 2000, WriteFlags::NONE).unwrap();
        let disk: Arc<dyn BlockDevice> = Arc::new(disk);
        let window = Window::new(Arc::clone(&disk), ByteRange::new(2500, 9000));
        assert_eq!((window.len(), window.geometry().writable), (6500, false));
        let mut read = [7; 1000];
        window.read_at(&mut read, 0).unwrap();
        assert_eq!((read[499], read[500]), (1, 0));
        let mut seen = Vec::new();
        let mut end = 0;
        let all = ByteRange::new(0, 6500);
        window
            .extents(all, &mut |extent| {
                assert_eq!(extent.range.start(), end);
                end = extent.range.end();
                seen.push(extent.kind);
                Visit::Continue(())
            })
            .unwrap();
        assert_eq!((end, seen[0]), (6500, ExtentKind::Data));
        for (offset, len) in [(6000, 501), (6501, 0), (u64::MAX, 1)] {
            let error = window.read_at(&mut vec![0; len], offset).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds);
        }
        assert_eq!(window.write_at(&[1], 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert!(Window::new(Arc::clone(&disk), ByteRange::new(10_000, 20_000)).is_empty());
        assert_eq!(Window::new(disk, ByteRange::new(9_000, u64::MAX)).len(), 1000);
    }
}
