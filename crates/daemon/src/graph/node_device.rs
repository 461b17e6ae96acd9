//! What every node puts between its users and its driver: the options that all drivers have (read-only,
//! discard, detect-zeroes, cache.no-flush), and the figures of `query-blockstats`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use blockmirror_block::{
    BlockDevice, ByteRange, CloneUnits, DiscardEffect, Error, ErrorKind, Extent, Geometry, HostRun, Result,
    Storage, Visit, WriteFlags, ZeroFlags, zero,
};

use super::write_watch::WriteWatch;

/// The options that all drivers have.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeviceOptions {
    /// No writes.
    pub(crate) read_only: bool,
    /// Discards and unmapping zeros reach the driver (`discard=unmap`).
    pub(crate) unmap: bool,
    /// Flushes do nothing.
    pub(crate) no_flush: bool,
    /// Writes of zeros become zeroing; with `unmap`, they may give space back.
    pub(crate) detect_zeroes: bool,
    /// What is detected may be unmapped.
    pub(crate) detect_unmap: bool,
}

/// Counts and times of one kind of request.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    pub(crate) operations: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) nanoseconds: AtomicU64,
}

/// The figures of a node.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) flushes: Counter,
    pub(crate) unmaps: Counter,
    /// The end of the highest write.
    pub(crate) highest_write: AtomicU64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct NodeDevice {
    name: String,
    /// A request goes on with the device that it found: its `Arc` is counted until the request ends.
    device: ArcSwap<Driven>,
    /// May change while requests run: a request sees each as it was or as it is.
    switches: Switches,
    stats: Stats,
    watch: WriteWatch,
}

/// The driver's device.
#[derive(Debug)]
struct Driven(Arc<dyn BlockDevice>);

/// [`DeviceOptions`] that can change.
#[derive(Debug, Default)]
struct Switches {
    read_only: AtomicBool,
    unmap: AtomicBool,
    no_flush: AtomicBool,
    detect_zeroes: AtomicBool,
    detect_unmap: AtomicBool,
}

impl Switches {
    fn set(&self, options: DeviceOptions) {
        self.read_only.store(options.read_only, Ordering::Relaxed);
        self.unmap.store(options.unmap, Ordering::Relaxed);
        self.no_flush.store(options.no_flush, Ordering::Relaxed);
        self.detect_zeroes.store(options.detect_zeroes, Ordering::Relaxed);
        self.detect_unmap.store(options.detect_unmap, Ordering::Relaxed);
    }

    fn get(&self) -> DeviceOptions {
        DeviceOptions {
            read_only: self.read_only.load(Ordering::Relaxed),
            unmap: self.unmap.load(Ordering::Relaxed),
            no_flush: self.no_flush.load(Ordering::Relaxed),
            detect_zeroes: self.detect_zeroes.load(Ordering::Relaxed),
            detect_unmap: self.detect_unmap.load(Ordering::Relaxed),
        }
    }
}

impl Counter {
    fn count<T>(&self, bytes: u64, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = call();
        let taken: Duration = start.elapsed();
        let nanoseconds = u64::try_from(taken.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        if result.is_ok() {
            self.operations.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        result
    }
}

impl NodeDevice {
    /// `device` with `options`.
    pub(crate) fn new(device: Arc<dyn BlockDevice>, options: DeviceOptions) -> Arc<Self> {
        let switches = Switches::default();
        switches.set(options);
        let name = device.name().to_owned();
        Arc::new(Self {
            name,
            device: ArcSwap::from_pointee(Driven(device)),
            switches,
            stats: Stats::default(),
            watch: WriteWatch::default(),
        })
    }

    /// The driver's device.
    pub(crate) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device.load().0)
    }

    /// Puts another device of the same driver in its place; returns the old one, which requests under way
    /// still use.
    pub(crate) fn replace(&self, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device.swap(Arc::new(Driven(device))).0)
    }

    /// Changes the options.
    pub(crate) fn set_options(&self, options: DeviceOptions) {
        self.switches.set(options);
    }

    /// The figures so far.
    pub(crate) fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Whether it was asked to write anything, whatever came of it.
    pub(crate) fn was_written(&self) -> bool {
        let was_asked = |counter: &Counter| {
            let done = counter.operations.load(Ordering::Acquire);
            done > 0 || counter.failed.load(Ordering::Acquire) > 0
        };
        // Clones count there alone.
        let cloned = self.stats.highest_write.load(Ordering::Acquire) > 0;
        was_asked(&self.stats.writes) || was_asked(&self.stats.unmaps) || cloned || self.watch.was_rewritten()
    }

    /// What logs of live mirrors watch.
    pub(crate) fn watch(&self) -> &WriteWatch {
        &self.watch
    }

    /// The options.
    pub(crate) fn options(&self) -> DeviceOptions {
        self.switches.get()
    }

    /// Refuses writes from now on, or lets them through again.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        self.switches.read_only.store(read_only, Ordering::Relaxed);
    }

    /// Whether what is below could be written, whatever the options say.
    pub(crate) fn could_be_written(&self) -> bool {
        self.device().geometry().writable
    }

    fn check_writable(&self, operation: &'static str) -> Result<()> {
        if self.options().read_only {
            return Err(Error::new(ErrorKind::ReadOnly, operation).because("the node is read-only"));
        }
        Ok(())
    }
}

impl BlockDevice for NodeDevice {
    fn len(&self) -> u64 {
        self.device().len()
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.device().geometry();
        geometry.writable &= !self.options().read_only;
        if !self.options().unmap {
            geometry.discard = DiscardEffect::Ignored;
        }
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.stats.reads.count(buf.len() as u64, || self.device().read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.check_writable("write")?;
        let len = buf.len() as u64;
        self.stats.writes.count(len, || {
            if self.options().detect_zeroes && !buf.is_empty() && zero::is_zero(buf) {
                let mut zero_flags = ZeroFlags::from(flags);
                if self.options().detect_unmap && self.options().unmap {
                    zero_flags |= ZeroFlags::MAY_UNMAP;
                }
                let range = ByteRange::checked(offset, buf.len())
                    .ok_or_else(|| Error::out_of_bounds("write", offset, len, self.len()))?;
                return self.device().write_zeroes(range, zero_flags);
            }
            self.device().write_at(buf, offset, flags)
        })?;
        self.stats.highest_write.fetch_max(offset.saturating_add(len), Ordering::Relaxed);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.check_writable("write zeroes")?;
        let flags = if self.options().unmap { flags } else { flags.difference(ZeroFlags::MAY_UNMAP) };
        self.stats.writes.count(range.len(), || self.device().write_zeroes(range, flags))?;
        self.stats.highest_write.fetch_max(range.end(), Ordering::Relaxed);
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.check_writable("discard")?;
        self.stats.unmaps.count(range.len(), || {
            if range.end() > self.len() {
                return Err(Error::new(ErrorKind::OutOfBounds, "discard"));
            }
            if self.options().unmap { self.device().discard(range) } else { Ok(()) }
        })
    }

    fn flush(&self) -> Result<()> {
        self.stats.flushes.count(0, || if self.options().no_flush { Ok(()) } else { self.device().flush() })
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.device().extents(range, visit)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.check_writable("resize")?;
        // It may take contents away.
        self.watch.note_rewritten();
        self.device().resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.check_writable("copy up")?;
        self.device().copy_up(range, max_depth)
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.device().clone_units(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        self.check_writable("clone")?;
        let calls = self.device().clone_range(offset, run, len)?;
        self.stats.highest_write.fetch_max(offset.saturating_add(len), Ordering::Relaxed);
        Ok(calls)
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.device().write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.device().cancel_in_flight();
    }
}
