//! A storage that counts its reads, and cancels what the image does when one of them comes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{
    BlockDevice, ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags,
};
use blockmirror_qcow2::{OpenOptions, Qcow2};

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
        Self { inner, reads: AtomicUsize::new(0), trigger: Mutex::default() }
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
        if let Some(trigger) = &mut *self.trigger.lock().unwrap() {
            trigger.after.take_if(|after| after.overlaps(range));
        }
        self.inner.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.inner.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.inner.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.inner.extents(range, visit)
    }
}
