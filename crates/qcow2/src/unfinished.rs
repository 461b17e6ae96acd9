//! An image that is written in place, marked until it is durable.
//!
//! Used by `image::Target` where a new image cannot be written beside the old one. While the mark stands the
//! version field of the header holds a value that no reader takes, so that a copy which was interrupted is
//! never opened as if it were whole; and it is set, durably, before the first byte of the old image goes. The
//! image itself is read and written through this storage, which shows its own view of the first bytes.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{ByteRange, HostRun, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags};

use crate::limits;

/// Bytes that differ from what the storage below holds: the magic number and the version.
const HEAD: usize = 8;

/// A storage whose image is marked as unfinished until [`finish`](Self::finish).
#[derive(Debug)]
pub struct Unfinished {
    inner: Arc<dyn Storage>,
    /// The first bytes as the image has written them. Guards `inner`'s first bytes too. Leaf lock: I/O of 8
    /// bytes under it.
    head: Mutex<Head>,
}

#[derive(Debug)]
struct Head {
    bytes: [u8; HEAD],
    /// Whether `inner` holds the same.
    finished: bool,
}

impl Unfinished {
    /// Marks `inner`, durably. What it held is lost.
    ///
    /// # Errors
    /// The storage cannot be written. Then its first bytes are written back, without a flush; whether that
    /// succeeded is what [`marks`](Self::marks) says.
    pub fn begin(inner: Arc<dyn Storage>) -> Result<Self> {
        let len = inner.len()?;
        let mut old = [0; HEAD];
        let old = &mut old[..len.min(HEAD as u64) as usize];
        inner.read_at(old, 0)?;
        if let Err(error) = inner.write_at(&mark(), 0).and_then(|()| inner.flush()) {
            // The error at hand is the one to report.
            let _ = inner.write_at(old, 0);
            if old.len() < HEAD && !inner.info().fixed_len {
                let _ = inner.set_len(len);
            }
            return Err(error);
        }
        Ok(Self { inner, head: Mutex::new(Head { bytes: [0; HEAD], finished: false }) })
    }

    /// Whether `storage` has the mark, or cannot be read.
    pub fn marks(storage: &dyn Storage) -> bool {
        let mut head = [0; HEAD];
        storage.read_at(&mut head, 0).is_err() || head == mark()
    }

    /// Makes everything written durable, then takes the mark away, durably.
    ///
    /// # Errors
    /// The mark may still be there.
    pub fn finish(&self) -> Result<()> {
        self.inner.flush()?;
        let mut head = self.head.lock();
        self.inner.write_at(&head.bytes, 0)?;
        head.finished = true;
        drop(head);
        self.inner.flush()
    }

    /// Runs `write` for what lies behind the first bytes, after `change` has been applied to those that are
    /// in `range`.
    fn split(
        &self,
        range: ByteRange,
        change: impl FnOnce(&mut [u8]),
        write: impl FnOnce(ByteRange) -> Result<()>,
    ) -> Result<()> {
        let behind = ByteRange::new(range.start().max(HEAD as u64), range.end().max(HEAD as u64));
        let inside = range.intersect(ByteRange::new(0, HEAD as u64));
        if !inside.is_empty() {
            let mut head = self.head.lock();
            let (start, end) = (inside.start() as usize, inside.end() as usize);
            change(&mut head.bytes[start..end]);
            if head.finished {
                self.inner.write_at(&head.bytes, 0)?;
            }
        }
        if behind.is_empty() { Ok(()) } else { write(behind) }
    }
}

/// The magic number, and the version that no reader takes.
fn mark() -> [u8; HEAD] {
    let mut mark = [0; HEAD];
    mark[..4].copy_from_slice(&limits::MAGIC.to_be_bytes());
    mark[4..].copy_from_slice(&limits::VERSION_UNFINISHED.to_be_bytes());
    mark
}

impl Storage for Unfinished {
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
        self.inner.read_at(buf, offset)?;
        let inside = ByteRange::at(offset, buf.len() as u64).intersect(ByteRange::new(0, HEAD as u64));
        if !inside.is_empty() {
            let (start, end) = (inside.start() as usize, inside.end() as usize);
            // A read that reaches the head begins in it.
            buf[..end - start].copy_from_slice(&self.head.lock().bytes[start..end]);
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let skipped = |at: u64| (at - offset) as usize;
        self.split(
            ByteRange::at(offset, buf.len() as u64),
            |head| head.copy_from_slice(&buf[..head.len()]),
            |behind| self.inner.write_at(&buf[skipped(behind.start())..], behind.start()),
        )
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.split(range, |head| head.fill(0), |behind| self.inner.write_zeroes(behind, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let behind = range.intersect(ByteRange::new(HEAD as u64, u64::MAX));
        if behind.is_empty() { Ok(()) } else { self.inner.discard(behind) }
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if let Some(head) = self.head.lock().bytes.get_mut(usize::try_from(len).unwrap_or(HEAD)..) {
            head.fill(0);
        }
        self.inner.set_len(len.max(HEAD as u64))
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.inner.extents(range, visit)
    }

    fn clone_block(&self, file: &dyn Storage) -> Option<u64> {
        self.inner.clone_block(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        // Guest data: it lies behind the header.
        self.inner.clone_range(offset, run, len)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.host_fd()
    }

    fn cancel_in_flight(&self) {
        self.inner.cancel_in_flight();
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        self.inner.allocated_bytes()
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};

    use super::*;
    use crate::{CreateOptions, Error, Header, OpenOptions, Version};

    #[test]
    fn an_unfinished_image_opens_nowhere_and_a_finished_one_everywhere() {
        for version in [Version::V2, Version::V3] {
            let below: Arc<dyn Storage> = Arc::new(MemoryStorage::with_contents(&[0x5a; 65536]));
            let unfinished = Arc::new(Unfinished::begin(Arc::clone(&below)).unwrap());
            let refused = || matches!(Header::read(&*below), Err(Error::Unfinished));
            assert!(refused(), "{version:?}: marked before it is emptied");
            let mut options = CreateOptions::new(1 << 20);
            options.version = version;
            options.create(&*unfinished, None).unwrap();
            let image = OpenOptions::new().writable(true).open(Arc::clone(&unfinished) as _).unwrap();
            let device: &dyn blockmirror_block::BlockDevice = &image;
            device.write_at(&[7; 512], 0, blockmirror_block::WriteFlags::NONE).unwrap();
            device.flush().unwrap();
            assert!(refused(), "{version:?}: flushed, not finished");
            unfinished.finish().unwrap();
            let header = Header::read(&*below).unwrap();
            assert_eq!(
                (header.version, header.virtual_size),
                (Header::read(&*unfinished).unwrap().version, 1 << 20)
            );
            drop(image);
            let image = OpenOptions::new().open(below).unwrap();
            let device: &dyn blockmirror_block::BlockDevice = &image;
            let mut read = [0; 512];
            device.read_at(&mut read, 0).unwrap();
            assert_eq!(read, [7; 512]);
        }
    }

    #[test]
    fn the_first_bytes_read_as_they_were_written() {
        let below: Arc<dyn Storage> = Arc::new(MemoryStorage::with_contents(&[0xff; 64]));
        let unfinished = Unfinished::begin(Arc::clone(&below)).unwrap();
        unfinished.set_len(0).unwrap();
        unfinished.write_at(&[1, 2, 3, 4], 6).unwrap();
        unfinished.write_at(&[9], 2).unwrap();
        unfinished.write_zeroes(ByteRange::new(7, 9), ZeroFlags::NONE).unwrap();
        let mut seen = [0xee; 12];
        unfinished.read_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0, 0, 9, 0, 0, 0, 1, 0, 0, 4, 0, 0]);
        let mut part = [0xee; 2];
        unfinished.read_at(&mut part, 6).unwrap();
        assert_eq!(part, [1, 0]);
        unfinished.finish().unwrap();
        below.read_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0, 0, 9, 0, 0, 0, 1, 0, 0, 4, 0, 0]);
    }

    /// The mark stayed in the file, and the error said that the file was as it had been.
    #[test]
    fn a_mark_that_cannot_be_made_durable_is_taken_back() {
        for old in [&[0x5a; 64][..], &[0x5a; 5], &[]] {
            for kind in [OpKind::Write, OpKind::Flush] {
                let below = Arc::new(MemoryStorage::with_contents(old));
                let faults = Faults::new();
                faults.inject(Fault::on(kind));
                let failing = Arc::new(FaultStorage::new(Arc::clone(&below) as _, faults));
                Unfinished::begin(failing).unwrap_err();
                assert_eq!(below.to_vec(), old, "{kind:?}");
            }
        }
    }
}
