//! A disk that holds nothing: it swallows writes. For measuring what lies above it, as QEMU's `null-co`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::cancel::{self, POLL_INTERVAL};
use blockmirror_block::{
    BlockDevice, ByteRange, DiscardEffect, Error, ErrorKind, Extent, ExtentKind, Geometry, Result, Storage,
    StorageExtent, StorageInfo, Visit, WriteFlags, ZeroCost, ZeroFlags,
};

/// The size where none is given: 1 GiB.
pub const DEFAULT_NULL_SIZE: u64 = 1 << 30;

/// Reads as zeros and forgets what is written.
#[derive(Clone, Debug)]
pub struct NullDisk {
    name: Arc<str>,
    len: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl NullDisk {
    /// A disk of `len` bytes that answers at once.
    pub fn new(len: u64) -> Self {
        Self { name: Arc::from("null-co"), len, latency: Duration::ZERO, read_zeroes: false }
    }

    /// The same, which takes `latency` for each request.
    #[must_use]
    pub fn latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// Whether it says that it reads as zeros. (It does so in any case: what else could it hand out?)
    #[must_use]
    pub fn read_zeroes(mut self, read_zeroes: bool) -> Self {
        self.read_zeroes = read_zeroes;
        self
    }

    fn serve(&self, operation: &'static str, range: Option<ByteRange>, offset: u64, len: u64) -> Result<()> {
        if range.is_none_or(|range| range.end() > self.len) {
            return Err(
                Error::out_of_bounds(operation, offset, len, self.len).in_file(Arc::clone(&self.name))
            );
        }
        let began = Instant::now();
        let mut left = self.latency;
        while !left.is_zero() {
            if cancel::is_cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, operation).in_file(Arc::clone(&self.name)));
            }
            std::thread::sleep(left.min(POLL_INTERVAL));
            left = self.latency.saturating_sub(began.elapsed());
        }
        Ok(())
    }
}

impl BlockDevice for NullDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::plain();
        geometry.zero_cost = ZeroCost::Metadata;
        geometry.discard = DiscardEffect::Frees;
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.serve("read", ByteRange::checked(offset, buf.len()), offset, buf.len() as u64)?;
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _: WriteFlags) -> Result<()> {
        self.serve("write", ByteRange::checked(offset, buf.len()), offset, buf.len() as u64)
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroFlags) -> Result<()> {
        self.serve("write zeroes", Some(range), range.start(), range.len())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.serve("discard", Some(range), range.start(), range.len())
    }

    fn flush(&self) -> Result<()> {
        self.serve("flush", Some(ByteRange::default()), 0, 0)
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        if range.end() > self.len {
            let error = Error::out_of_bounds("map", range.start(), range.len(), self.len);
            return Err(error.in_file(Arc::clone(&self.name)));
        }
        if !range.is_empty() {
            let kind = if self.read_zeroes { ExtentKind::Zero } else { ExtentKind::Data };
            // Nothing comes after the only extent.
            let _ = visit(Extent::new(range, kind));
        }
        Ok(())
    }
}

/// The same as something that an image can lie in.
#[derive(Clone, Debug)]
pub struct NullStorage(NullDisk);

impl NullStorage {
    /// `len` bytes, all of which are a hole.
    pub fn new(len: u64) -> Self {
        Self(NullDisk::new(len).read_zeroes(true))
    }
}

impl From<NullDisk> for NullStorage {
    fn from(disk: NullDisk) -> Self {
        Self(disk)
    }
}

impl Storage for NullStorage {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.len)
    }

    fn info(&self) -> StorageInfo {
        let mut info = StorageInfo::plain();
        (info.writable, info.fixed_len) = (true, true);
        info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.serve("read", Some(ByteRange::default()), offset, buf.len() as u64)?;
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "set length").in_file(Arc::clone(&self.0.name)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        if !range.is_empty() {
            let _ = visit(StorageExtent { range, hole: self.0.read_zeroes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_forgets_what_is_written_and_hands_out_no_stale_buffer() {
        let disk = NullDisk::new(1 << 20);
        disk.write_at(&[1; 4096], 0, WriteFlags::FUA).unwrap();
        let mut buf = [7; 4096];
        disk.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [0; 4096]);
        assert!(disk.read_at(&mut buf, (1 << 20) - 1).is_err());
    }

    #[test]
    fn its_extents_follow_what_it_promises() {
        for (promise, kind) in [(false, ExtentKind::Data), (true, ExtentKind::Zero)] {
            let mut seen = Vec::new();
            let disk = NullDisk::new(100).read_zeroes(promise);
            disk.extents(ByteRange::new(5, 100), &mut |e| {
                seen.push((e.range, e.kind));
                Visit::Continue(())
            })
            .unwrap();
            assert_eq!(seen, [(ByteRange::new(5, 100), kind)]);
        }
    }
}
