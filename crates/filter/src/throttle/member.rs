//! A member of a throttle group: a disk or a storage whose requests wait in the group.
//!
//! Reads, writes, zeroing and discards count by their length; flushes and queries pass. Contents that a
//! copy-up brings into the device are paid for afterwards, since only then it is known how much it was.
//! Copies in the kernel are refused, so that callers read and write instead.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, Extent, Geometry, Result, Storage, StorageExtent, StorageInfo, Visit, WriteFlags,
    ZeroFlags,
};

use super::bucket::Direction;
use super::group::{Membership, ThrottleGroup};

/// A disk in a throttle group.
#[derive(Debug)]
pub struct Throttle {
    child: Arc<dyn BlockDevice>,
    member: Membership,
}

impl Throttle {
    /// `child` as a new member of `group`.
    pub fn new(child: Arc<dyn BlockDevice>, group: &Arc<ThrottleGroup>) -> Self {
        Self { child, member: group.join() }
    }

    /// The device below.
    pub fn child(&self) -> &Arc<dyn BlockDevice> {
        &self.child
    }

    /// The group.
    pub fn group(&self) -> &Arc<ThrottleGroup> {
        self.member.group()
    }
}

impl BlockDevice for Throttle {
    fn len(&self) -> u64 {
        self.child.len()
    }

    fn name(&self) -> &str {
        self.child.name()
    }

    fn geometry(&self) -> Geometry {
        self.child.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.member.admit(Direction::Read, buf.len() as u64);
        self.child.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.member.admit(Direction::Write, buf.len() as u64);
        self.child.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.member.admit(Direction::Write, range.len());
        self.child.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.member.admit(Direction::Write, range.len());
        self.child.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.child.flush()
    }

    /// Without places in host files: who read there would not be throttled.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.child.extents(range, &mut |mut extent| {
            extent.host = None;
            visit(extent)
        })
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.child.resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        let copied = self.child.copy_up(range, max_depth)?;
        if copied > 0 {
            self.member.charge(Direction::Write, copied);
        }
        Ok(copied)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.child))
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.child.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.member.let_go();
        self.child.cancel_in_flight();
    }
}

/// A storage in a throttle group.
#[derive(Debug)]
pub struct ThrottleStorage {
    child: Arc<dyn Storage>,
    member: Membership,
}

impl ThrottleStorage {
    /// `child` as a new member of `group`.
    pub fn new(child: Arc<dyn Storage>, group: &Arc<ThrottleGroup>) -> Self {
        Self { child, member: group.join() }
    }

    /// The group.
    pub fn group(&self) -> &Arc<ThrottleGroup> {
        self.member.group()
    }
}

impl Storage for ThrottleStorage {
    fn name(&self) -> &str {
        self.child.name()
    }

    fn len(&self) -> Result<u64> {
        self.child.len()
    }

    fn info(&self) -> StorageInfo {
        self.child.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.member.admit(Direction::Read, buf.len() as u64);
        self.child.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.member.admit(Direction::Write, buf.len() as u64);
        self.child.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.member.admit(Direction::Write, range.len());
        self.child.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.member.admit(Direction::Write, range.len());
        self.child.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.child.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.child.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.child.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.child.extents(range, visit)
    }

    fn cancel_in_flight(&self) {
        self.member.let_go();
        self.child.cancel_in_flight();
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        self.child.allocated_bytes()
    }
}
