//! A disk that now and then takes its time, before or after it does what it is asked.
//!
//! On memory-like files everything is over in microseconds, and most orders of events never happen. This
//! makes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::{BlockDevice, ByteRange, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags};

use blockmirror_block::testing::Rng;

#[derive(Debug)]
pub(super) struct SlowDisk {
    inner: Arc<dyn BlockDevice>,
    /// In so many of a hundred cases, up to so many microseconds.
    percent: u64,
    most: u64,
    seed: AtomicU64,
}

impl SlowDisk {
    pub(super) fn new(inner: Arc<dyn BlockDevice>, percent: u64, most: u64, seed: u64) -> Self {
        Self { inner, percent, most, seed: AtomicU64::new(seed) }
    }

    fn dawdle(&self) {
        let mut rng = Rng::new(self.seed.fetch_add(1, Ordering::Relaxed), 7);
        if rng.chance(self.percent) {
            thread::sleep(Duration::from_micros(rng.below(self.most)));
        }
    }

    fn slowly<T>(&self, f: impl FnOnce(&dyn BlockDevice) -> T) -> T {
        self.dawdle();
        let answer = f(&*self.inner);
        self.dawdle();
        answer
    }
}

impl BlockDevice for SlowDisk {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.slowly(|disk| disk.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.slowly(|disk| disk.write_at(buf, offset, flags))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.slowly(|disk| disk.write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.slowly(|disk| disk.discard(range))
    }

    fn flush(&self) -> Result<()> {
        self.slowly(|disk| disk.flush())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.slowly(|disk| disk.extents(range, visit))
    }

    fn cancel_in_flight(&self) {
        self.inner.cancel_in_flight();
    }
}
