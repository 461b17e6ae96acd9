//! A disk whose operations fail, or are held, as planned.

use std::sync::Arc;

use super::fault::{Faults, OpKind, first_half};
use crate::{BlockDevice, CloneUnits, Geometry, Storage, WriteFlags, ZeroFlags};
use crate::{ByteRange, Result};
use crate::{Extent, HostRun, Visit};

/// Passes everything on to another disk, unless the plan says that it fails.
#[derive(Debug)]
pub struct FaultDisk {
    inner: Arc<dyn BlockDevice>,
    name: Arc<str>,
    faults: Faults,
    ignores_cancel: bool,
}

impl FaultDisk {
    /// `inner` under the plan `faults`.
    pub fn new(inner: Arc<dyn BlockDevice>, faults: Faults) -> Self {
        let name = Arc::from(inner.name());
        Self { inner, name, faults, ignores_cancel: false }
    }

    /// Calls that are held stay held when they are cancelled, as those of a disk that does not support it.
    #[must_use]
    pub fn ignoring_cancel(mut self) -> Self {
        self.ignores_cancel = true;
        self
    }

    fn run(&self, kind: OpKind, range: Option<ByteRange>, whole: impl FnOnce() -> Result<()>) -> Result<()> {
        self.faults.run(kind, range, whole, || Ok(())).map_err(|e| e.or_in_file(&self.name))
    }
}

impl BlockDevice for FaultDisk {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        self.run(OpKind::Read, Some(range), || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let whole = || self.inner.write_at(buf, offset, flags);
        let half = || self.inner.write_at(&buf[..first_half(offset, buf.len())], offset, flags);
        let range = ByteRange::at(offset, buf.len() as u64);
        self.faults.run(OpKind::Write, Some(range), whole, half).map_err(|e| e.or_in_file(&self.name))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.run(OpKind::WriteZeroes, Some(range), || self.inner.write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.run(OpKind::Discard, Some(range), || self.inner.discard(range))
    }

    fn flush(&self) -> Result<()> {
        self.run(OpKind::Flush, None, || self.inner.flush())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.run(OpKind::Extents, Some(range), || self.inner.extents(range, visit))
    }

    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        self.inner.clone_units(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let mut calls = 0;
        self.run(OpKind::Clone, Some(ByteRange::at(offset, len)), || {
            calls = self.inner.clone_range(offset, run, len)?;
            Ok(())
        })?;
        Ok(calls)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        let mut copied = 0;
        self.run(OpKind::Write, Some(range), || {
            copied = self.inner.copy_up(range, max_depth)?;
            Ok(())
        })?;
        Ok(copied)
    }

    fn cancel_in_flight(&self) {
        if self.ignores_cancel {
            return;
        }
        self.faults.cancel();
        self.inner.cancel_in_flight();
    }
}
