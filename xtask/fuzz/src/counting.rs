//! A storage that counts requests and bytes, and fails once there are more than the bound: what an image can
//! cause is bounded by the length of its file, so that a run ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{
    ByteRange, Error, ErrorKind, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags,
};
use blockmirror_testing::bounds::Work;

#[derive(Debug)]
pub(crate) struct CountingStorage {
    inner: MemoryStorage,
    bound: Work,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl CountingStorage {
    pub(crate) fn new(contents: &[u8], bound: Work) -> Arc<Self> {
        let inner = MemoryStorage::with_contents(contents);
        Arc::new(Self { inner, bound, requests: AtomicU64::new(0), bytes: AtomicU64::new(0) })
    }

    /// What was counted, if it was more than the bound.
    pub(crate) fn exceeded(&self) -> Option<String> {
        let Work { requests, bytes } = self.counted();
        let over = requests > self.bound.requests || bytes > self.bound.bytes;
        over.then(|| format!("{requests} requests, {bytes} bytes; the bound is {:?}", self.bound))
    }

    /// What was counted so far.
    pub(crate) fn counted(&self) -> Work {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Work { requests: of(&self.requests), bytes: of(&self.bytes) }
    }

    fn count(&self, bytes: u64) -> Result<()> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        match self.exceeded() {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::Io, "count").because("more than the bound")),
        }
    }
}

impl Storage for CountingStorage {
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
        self.count(buf.len() as u64)?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.count(buf.len() as u64)?;
        self.inner.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.count(0)?;
        self.inner.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.count(0)?;
        self.inner.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.count(0)?;
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.count(0)?;
        self.inner.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.count(0)?;
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.count(0)?;
        self.inner.extents(range, visit)
    }
}
