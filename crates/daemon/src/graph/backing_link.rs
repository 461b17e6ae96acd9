//! The link by which an overlay or a filter reaches the disk it stands on.
//!
//! Held by the driver's device, and by the graph, which makes it lead where it has to
//! ([`Graph::retarget_backing_links`](super::Graph::retarget_backing_links)). A request goes to the device to
//! which the link leads when it begins.

use std::sync::Arc;

use arc_swap::ArcSwap;
use blockmirror_block::{
    BlockDevice, ByteRange, CloneUnits, DiscardEffect, Error, ErrorKind, Extent, Geometry, HostRun, Result,
    Storage, Visit, WriteFlags, ZeroFlags,
};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct BackingLink {
    name: String,
    target: ArcSwap<Target>,
    /// Whether its holder writes by it: filters do, overlays do not.
    writable: bool,
}

#[derive(Debug)]
struct Target(Arc<dyn BlockDevice>);

impl BackingLink {
    /// The link of an overlay to `device`.
    pub(crate) fn for_overlay(device: Arc<dyn BlockDevice>) -> Arc<Self> {
        Self::new(device, false)
    }

    /// The link of a filter to `device`.
    pub(crate) fn for_filter(device: Arc<dyn BlockDevice>) -> Arc<Self> {
        Self::new(device, true)
    }

    fn new(device: Arc<dyn BlockDevice>, writable: bool) -> Arc<Self> {
        let name = device.name().to_owned();
        Arc::new(Self { name, target: ArcSwap::from_pointee(Target(device)), writable })
    }

    /// Leads to `device` from now on.
    pub(super) fn retarget(&self, device: Arc<dyn BlockDevice>) {
        if !Arc::ptr_eq(&self.target(), &device) {
            self.target.store(Arc::new(Target(device)));
        }
    }

    fn target(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.target.load().0)
    }

    fn check_writable(&self, operation: &'static str) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, operation).because("an overlay does not write its backing file"))
    }
}

impl BlockDevice for BackingLink {
    fn len(&self) -> u64 {
        self.target().len()
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.target().geometry();
        if !self.writable {
            geometry.writable = false;
            geometry.discard = DiscardEffect::Ignored;
        }
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.target().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.check_writable("write")?;
        self.target().write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.check_writable("write zeroes")?;
        self.target().write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.check_writable("discard")?;
        self.target().discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.target().flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.target().extents(range, visit)
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.target().clone_units(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        self.check_writable("clone")?;
        self.target().clone_range(offset, run, len)
    }

    fn preallocate(&self, range: ByteRange) -> Result<()> {
        self.check_writable("preallocate")?;
        self.target().preallocate(range)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.check_writable("resize")?;
        self.target().resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.check_writable("copy up")?;
        self.target().copy_up(range, max_depth)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(self.target())
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.target().write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.target().cancel_in_flight();
    }
}
