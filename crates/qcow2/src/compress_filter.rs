//! An image that stores what is written to it compressed: the [`BlockDevice`] that a conversion fills.
//!
//! Made by `image` for a caller that asks for compressed writes; everything but whole clusters of data goes
//! to the image as it is.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags,
};

use crate::image::Qcow2;

/// Writes whole clusters compressed, as QEMU's filter `compress` does.
///
/// A part of a cluster is written plainly: what writes to it best uses the clusters of its
/// [`geometry`](BlockDevice::geometry), which has no smaller unit.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, Storage, WriteFlags, testing::MemoryStorage};
/// use blockmirror_qcow2::{CompressFilter, CreateOptions, OpenOptions};
///
/// let storage = Arc::new(MemoryStorage::new());
/// CreateOptions::new(1 << 20).create(&*storage, None)?;
/// let disk = Arc::new(OpenOptions::new().writable(true).open(storage.clone())?);
/// let target = CompressFilter::new(disk)?;
/// target.write_at(&[7; 1 << 20], 0, WriteFlags::NONE)?;
/// target.flush()?;
/// assert!(storage.len()? < 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CompressFilter {
    image: Arc<Qcow2>,
}

impl CompressFilter {
    /// Stores what is written to `image` compressed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an image with an external data file, which holds nothing compressed.
    pub fn new(image: Arc<Qcow2>) -> Result<Self> {
        if image.header().data_file.is_some() {
            let error = Error::new(ErrorKind::Unsupported, "write compressed").in_file(image.name());
            return Err(error.because("an image with an external data file has no compressed data"));
        }
        Ok(Self { image })
    }

    /// The part of `range` that covers whole clusters. The end of the disk ends one.
    fn whole(&self, range: ByteRange) -> ByteRange {
        let cluster = self.image.ctx.cluster().bytes();
        let whole = range.align_inward(cluster);
        let end = if range.end() == self.image.len() { range.end() } else { whole.end() };
        let start = range.start().next_multiple_of(cluster);
        if start < end { ByteRange::new(start, end) } else { ByteRange::new(range.end(), range.end()) }
    }
}

impl BlockDevice for CompressFilter {
    fn len(&self) -> u64 {
        self.image.len()
    }

    fn name(&self) -> &str {
        self.image.name()
    }

    fn geometry(&self) -> Geometry {
        // Zeros in a part of a cluster would take its data apart.
        let mut geometry = self.image.geometry();
        geometry.subcluster_size = None;
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.image.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let range = ByteRange::checked(offset, buf.len());
        let Some(range) = range.filter(|range| range.end() <= self.len() && !range.is_empty()) else {
            // The image refuses it, or has nothing to do.
            return self.image.write_at(buf, offset, flags);
        };
        let whole = self.whole(range);
        let (start, end) = ((whole.start() - offset) as usize, (whole.end() - offset) as usize);
        for (part, at) in [(&buf[..start], offset), (&buf[end..], whole.end())] {
            if !part.is_empty() {
                self.image.write_at(part, at, flags.difference(WriteFlags::FUA))?;
            }
        }
        self.image.write_compressed(&buf[start..end], whole.start())?;
        if flags.contains(WriteFlags::FUA) { self.image.flush() } else { Ok(()) }
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.image.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.image.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.image.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.image.extents(range, visit)
    }

    fn preallocate(&self, range: ByteRange) -> Result<()> {
        self.image.preallocate(range)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.image.resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.image.copy_up(range, max_depth)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.image) as Arc<dyn BlockDevice>)
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.image.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.image.cancel_in_flight();
    }
}
