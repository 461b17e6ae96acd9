//! The lock rule: nothing is written, flushed, zeroed or discarded under the metadata lock.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{OnceLock, Weak};

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, MemoryStorage, OpKind};
use blockmirror_block::{StorageExtent, StorageInfo};

use super::*;
use crate::CreateOptions;

/// A storage that looks, at each change, whether the thread that makes it holds the metadata lock of the
/// image.
#[derive(Debug, Default)]
struct LockProbe {
    inner: MemoryStorage,
    image: OnceLock<Weak<Qcow2>>,
    changes: AtomicUsize,
}

impl LockProbe {
    fn check(&self, what: &str) {
        if let Some(image) = self.image.get().and_then(Weak::upgrade) {
            // There is one thread: if the lock is held, this one holds it.
            assert!(image.meta.try_lock().is_some(), "{what} under the metadata lock");
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Storage for LockProbe {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> BlockResult<u64> {
        self.inner.len()
    }

    fn info(&self) -> StorageInfo {
        self.inner.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.check("a write");
        self.inner.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> BlockResult<()> {
        self.check("zeroing");
        self.inner.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> BlockResult<()> {
        self.check("a discard");
        self.inner.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> BlockResult<()> {
        self.check("an allocation");
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> BlockResult<()> {
        self.check("a change of length");
        self.inner.set_len(len)
    }

    fn flush(&self) -> BlockResult<()> {
        self.check("a flush");
        self.inner.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> BlockResult<()> {
        self.inner.extents(range, visit)
    }
}

#[test]
fn nothing_is_written_under_the_metadata_lock() {
    const LEN: u64 = 1 << 20;
    for (cluster, extended) in [(512, false), (65_536, false), (65_536, true)] {
        let mut options = CreateOptions::new(LEN);
        (options.cluster_size, options.refcount_bits, options.extended_l2) = (cluster, 64, extended);
        let storage = Arc::new(LockProbe::default());
        options.create(&*storage, None).unwrap();
        let backing = Arc::new(MemoryDisk::with_contents(&vec![0xbb; LEN as usize]));
        let open = OpenOptions::new().writable(true).cache_bytes(0).backing(backing);
        let image = Arc::new(open.open(storage.clone()).unwrap());
        storage.image.set(Arc::downgrade(&image)).unwrap();
        let disk: &dyn BlockDevice = &*image;
        // With clusters of 512 bytes this needs a larger refcount table, which is moved several times.
        disk.resize(16 * LEN, false).unwrap();
        for at in (0..16 * LEN).step_by(300_000) {
            disk.write_at(&vec![1; 200_000], at, WriteFlags::NONE).unwrap();
            disk.write_zeroes(ByteRange::at(at, 70_000), ZeroFlags::MAY_UNMAP).unwrap();
            disk.copy_up(ByteRange::at(at + 200_000, 10_000), u32::MAX).unwrap();
            disk.discard(ByteRange::at(at + 70_000, 70_000)).unwrap();
        }
        disk.flush().unwrap();
        disk.preallocate(ByteRange::new(15 * LEN, 16 * LEN)).unwrap();
        disk.resize(32 * LEN, false).unwrap();
        disk.resize(LEN, true).unwrap();
        image.set_backing_file(Some(b"below"), Some("raw")).unwrap();
        disk.flush().unwrap();
        assert!(storage.changes.load(Ordering::Relaxed) > 100);
    }
}

/// A read of an image that is open read-only may be in its backing device: that device is not replaced until
/// the read is over, so that it can be closed then.
#[test]
fn a_backing_device_is_replaced_after_the_reads_of_a_read_only_image() {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(1 << 20).create(&*storage, None).unwrap();
    let faults = Faults::new();
    let below = FaultDisk::new(Arc::new(MemoryDisk::with_contents(&[7; 1 << 20])), faults.clone());
    let image = OpenOptions::new().backing(Arc::new(below)).open(storage).unwrap();
    let gate = faults.hold(OpKind::Read, None);
    std::thread::scope(|s| {
        let read = s.spawn(|| {
            let mut found = [0; 512];
            image.read_at(&mut found, 4096).map(|()| found)
        });
        gate.wait_held(1);
        let replaced = s.spawn(|| image.replace_backing(None).is_some());
        while image.ranges.waiters() == 0 && !replaced.is_finished() {
            std::thread::yield_now();
        }
        let early = replaced.is_finished();
        gate.open();
        assert_eq!(read.join().unwrap().unwrap(), [7; 512]);
        assert!(replaced.join().unwrap());
        assert!(!early, "replaced while a read was in it");
    });
}
