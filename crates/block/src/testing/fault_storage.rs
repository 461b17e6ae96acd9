//! A storage whose operations fail, or are held, as planned.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::fault::{Faults, OpKind, first_half};
use crate::ZeroFlags;
use crate::storage::{Storage, StorageExtent, StorageInfo};
use crate::{ByteRange, Error, ErrorKind, Result};
use crate::{HostRun, Visit};

/// Passes everything on to another storage, unless the plan says that it fails.
///
/// As the contract wants it, every flush after a failed one fails as well, also after [`Faults::heal`].
#[derive(Debug)]
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    name: Arc<str>,
    faults: Faults,
    flush_failed: AtomicBool,
}

impl FaultStorage {
    /// `inner` under the plan `faults`.
    pub fn new(inner: Arc<dyn Storage>, faults: Faults) -> Self {
        let name = Arc::from(inner.name());
        Self { inner, name, faults, flush_failed: AtomicBool::new(false) }
    }

    fn run(&self, kind: OpKind, range: Option<ByteRange>, whole: impl FnOnce() -> Result<()>) -> Result<()> {
        self.faults.run(kind, range, whole, || Ok(())).map_err(|e| e.or_in_file(&self.name))
    }
}

impl Storage for FaultStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        self.run(OpKind::Len, None, || Ok(()))?;
        self.inner.len()
    }

    fn info(&self) -> StorageInfo {
        self.inner.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        self.run(OpKind::Read, Some(range), || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let whole = || self.inner.write_at(buf, offset);
        let half = || self.inner.write_at(&buf[..first_half(offset, buf.len())], offset);
        let range = ByteRange::at(offset, buf.len() as u64);
        self.faults.run(OpKind::Write, Some(range), whole, half).map_err(|e| e.or_in_file(&self.name))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.run(OpKind::WriteZeroes, Some(range), || self.inner.write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.run(OpKind::Discard, Some(range), || self.inner.discard(range))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.run(OpKind::Allocate, Some(range), || self.inner.allocate(range))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.run(OpKind::SetLen, None, || self.inner.set_len(len))
    }

    fn flush(&self) -> Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            let error = Error::new(ErrorKind::Poisoned, "flush").because("an earlier flush failed");
            return Err(error.in_file(Arc::clone(&self.name)));
        }
        let result = self.run(OpKind::Flush, None, || self.inner.flush());
        if result.is_err() {
            self.flush_failed.store(true, Ordering::Release);
        }
        result
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.run(OpKind::Extents, Some(range), || self.inner.extents(range, visit))
    }

    fn clone_block(&self, file: &dyn Storage) -> Option<u64> {
        self.inner.clone_block(file)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let mut calls = 0;
        self.run(OpKind::Clone, Some(ByteRange::at(offset, len)), || {
            calls = self.inner.clone_range(offset, run, len)?;
            Ok(())
        })?;
        Ok(calls)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.host_fd()
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        self.inner.allocated_bytes()
    }
}
