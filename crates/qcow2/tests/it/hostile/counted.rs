//! A storage that counts what is asked of it, and cancels what the image does when a read comes.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{
    BlockDevice, ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags,
};
use blockmirror_qcow2::{OpenOptions, Qcow2};
use blockmirror_testing::bounds::Work;

/// When an image is cancelled.
#[derive(Debug)]
struct Trigger {
    /// Not before this is written.
    after: Option<ByteRange>,
    read: ByteRange,
    image: Weak<Qcow2>,
}

#[derive(Debug)]
pub(crate) struct Counted {
    inner: Arc<MemoryStorage>,
    reads: AtomicUsize,
    requests: AtomicU64,
    bytes: AtomicU64,
    trigger: Mutex<Option<Trigger>>,
}

impl Counted {
    /// Opens `storage` for writing with the smallest cache.
    pub(crate) fn open(storage: &Arc<MemoryStorage>) -> (Arc<Qcow2>, Arc<Self>) {
        let counted = Arc::new(Self::over(Arc::clone(storage)));
        let options = OpenOptions::new().writable(true).cache_bytes(0);
        (Arc::new(options.open(Arc::clone(&counted) as _).unwrap()), counted)
    }

    /// Counts what is read of `inner`.
    pub(crate) fn over(inner: Arc<MemoryStorage>) -> Self {
        let (requests, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { inner, reads: AtomicUsize::new(0), requests, bytes, trigger: Mutex::default() }
    }

    /// What was asked since the last call: all requests, and the bytes that were read and written.
    pub(crate) fn work(&self) -> Work {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        Work { requests: take(&self.requests), bytes: take(&self.bytes) }
    }

    fn count(&self, bytes: usize) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// How many reads there were since the last call.
    pub(crate) fn reads(&self) -> usize {
        self.reads.swap(0, Ordering::Relaxed)
    }

    /// Cancels what `image` does at the next read of `read`; with `after`, not before that is written. Reads
    /// are counted from there.
    pub(crate) fn cancel_at(&self, image: &Arc<Qcow2>, after: Option<ByteRange>, read: ByteRange) {
        *self.trigger.lock().unwrap() = Some(Trigger { after, read, image: Arc::downgrade(image) });
    }
}

impl Storage for Counted {
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
        let range = ByteRange::at(offset, buf.len() as u64);
        self.count(buf.len());
        self.reads.fetch_add(1, Ordering::Relaxed);
        let met = self
            .trigger
            .lock()
            .unwrap()
            .take_if(|trigger| trigger.after.is_none() && trigger.read.overlaps(range));
        if let Some(image) = met.and_then(|trigger| trigger.image.upgrade()) {
            image.cancel_in_flight();
            self.reads.store(0, Ordering::Relaxed);
        }
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        self.count(buf.len());
        if let Some(trigger) = &mut *self.trigger.lock().unwrap() {
            trigger.after.take_if(|after| after.overlaps(range));
        }
        self.inner.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.count(0);
        self.inner.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.count(0);
        self.inner.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.count(0);
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.count(0);
        self.inner.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.count(0);
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.count(0);
        self.inner.extents(range, visit)
    }
}
