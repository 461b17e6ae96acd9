//! Worker threads: as many as there is work for.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{BlockDevice, ByteRange, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags};
use blockmirror_mirror::{MirrorJob, MirrorOptions};

/// A hang ends as a failure: none of the tests takes as long.
const LIMIT: Duration = Duration::from_secs(120);

/// A source whose reads wait until `wanted` threads have asked for one.
#[derive(Debug)]
struct Crowd {
    disk: MemoryDisk,
    wanted: usize,
    readers: Mutex<HashSet<ThreadId>>,
    changed: Condvar,
}

impl Crowd {
    fn new(len: usize, wanted: usize) -> Arc<Self> {
        let disk = MemoryDisk::with_contents(&vec![7; len]);
        Arc::new(Self { disk, wanted, readers: Mutex::default(), changed: Condvar::new() })
    }

    fn readers(&self) -> usize {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn copied_by(self: &Arc<Self>, threads: usize) -> usize {
        let target = Arc::new(MemoryDisk::new(self.len()));
        let options = MirrorOptions::new().threads(NonZeroUsize::new(threads));
        let source: Arc<dyn BlockDevice> = Arc::clone(self) as _;
        MirrorJob::start(source, Arc::clone(&target) as _, options).unwrap().wait().unwrap();
        assert_eq!(target.contents().unwrap(), self.disk.contents().unwrap());
        self.readers()
    }
}

impl BlockDevice for Crowd {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn name(&self) -> &str {
        "crowd"
    }

    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut readers = self.readers.lock().unwrap();
        readers.insert(std::thread::current().id());
        self.changed.notify_all();
        let alone = |readers: &mut HashSet<ThreadId>| readers.len() < self.wanted;
        let (readers, waited) = self.changed.wait_timeout_while(readers, LIMIT, alone).unwrap();
        assert!(!waited.timed_out(), "only {} threads read", readers.len());
        drop(readers);
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.disk.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.disk.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.disk.extents(range, visit)
    }
}

#[test]
fn a_large_copy_has_all_of_its_threads() {
    assert_eq!(Crowd::new(64 << 20, 4).copied_by(4), 4);
}

#[test]
fn a_small_copy_has_one_thread() {
    assert_eq!(Crowd::new(1 << 20, 1).copied_by(8), 1);
}
