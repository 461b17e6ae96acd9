//! A storage in memory.

use std::sync::Arc;

use super::sparse::SparseBytes;
use crate::Visit;
use crate::ZeroFlags;
use crate::storage::{HostRun, Storage, StorageExtent, StorageInfo};
use crate::sync::Mutex;
use crate::{ByteRange, Error, ErrorKind, Result};

/// A [`Storage`] in memory, sparse in pages of 4 KiB.
///
/// Grows by default, zeroes and discards by making pages absent. Every flush succeeds, there being
/// nothing to lose; [`RecordingStorage`](super::RecordingStorage) is the one that takes durability seriously.
#[derive(Debug)]
pub struct MemoryStorage {
    name: Arc<str>,
    info: StorageInfo,
    bytes: Mutex<SparseBytes>,
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStorage {
    /// An empty storage that grows.
    pub fn new() -> Self {
        Self::from_sparse(SparseBytes::new(0))
    }

    /// A storage that holds `bytes`.
    pub fn with_contents(bytes: &[u8]) -> Self {
        let mut sparse = SparseBytes::new(0);
        sparse.write(bytes, 0);
        Self::from_sparse(sparse)
    }

    /// A storage of `len` zero bytes that cannot grow or shrink.
    pub fn fixed(len: u64) -> Self {
        let storage = Self::from_sparse(SparseBytes::new(len));
        let info = StorageInfo { fixed_len: true, ..storage.info };
        storage.with_info(info)
    }

    pub(crate) fn from_sparse(bytes: SparseBytes) -> Self {
        let info = StorageInfo { cheap_zero: true, discards: true, ..StorageInfo::plain() };
        Self { name: Arc::from("memory"), info, bytes: Mutex::new(bytes) }
    }

    /// The same under another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Arc::from(name);
        self
    }

    /// The same with other facts. Without `cheap_zero` zeros are written; without `discards` a discard does
    /// nothing.
    #[must_use]
    pub fn with_info(mut self, info: StorageInfo) -> Self {
        self.info = info;
        self
    }

    /// The same, refusing writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.info.writable = false;
        self
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.lock().to_vec()
    }

    /// Checks a change of `range` before it is made.
    fn admit(&self, range: Option<ByteRange>, offset: u64, operation: &'static str) -> Result<ByteRange> {
        let refuse = |kind| Err(Error::new(kind, operation).in_file(Arc::clone(&self.name)).at(offset));
        if !self.info.writable {
            return refuse(ErrorKind::ReadOnly);
        }
        match range {
            None => refuse(ErrorKind::OutOfBounds),
            Some(range) if self.info.fixed_len && range.end() > self.bytes.lock().len() => {
                refuse(ErrorKind::NoSpace)
            }
            Some(range) => Ok(range),
        }
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().len())
    }

    fn info(&self) -> StorageInfo {
        self.info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if ByteRange::checked(offset, buf.len()).is_none() {
            return Err(Error::new(ErrorKind::OutOfBounds, "read")
                .in_file(Arc::clone(&self.name))
                .at(offset));
        }
        self.bytes.lock().read(buf, offset);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.admit(ByteRange::checked(offset, buf.len()), offset, "write")?;
        if !buf.is_empty() {
            self.bytes.lock().write(buf, offset);
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.admit(Some(range), range.start(), "write zeroes")?;
        if !self.info.cheap_zero && flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(Error::new(ErrorKind::Unsupported, "write zeroes").in_file(Arc::clone(&self.name)));
        }
        if range.is_empty() {
            return Ok(());
        }
        let mut bytes = self.bytes.lock();
        bytes.zero(range);
        if bytes.len() < range.end() {
            bytes.set_len(range.end());
        }
        if !self.info.cheap_zero {
            for piece in range.pieces(1 << 20) {
                bytes.write(&vec![0; piece.len() as usize], piece.start());
            }
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.admit(Some(ByteRange::default()), range.start(), "discard")?;
        if self.info.discards {
            let mut bytes = self.bytes.lock();
            let range = range.intersect(ByteRange::new(0, bytes.len()));
            bytes.zero(range);
        }
        Ok(())
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.admit(Some(range), range.start(), "allocate")?;
        let mut bytes = self.bytes.lock();
        if !range.is_empty() && bytes.len() < range.end() {
            bytes.set_len(range.end());
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.admit(Some(ByteRange::new(0, len)), 0, "set length")?;
        let mut bytes = self.bytes.lock();
        if self.info.fixed_len && len != bytes.len() {
            return Err(Error::new(ErrorKind::Unsupported, "set length").in_file(Arc::clone(&self.name)));
        }
        bytes.set_len(len);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// With every file, which a test may say is a host's.
    fn clone_block(&self, _: &dyn Storage) -> Option<u64> {
        Some(super::CLONE_BLOCK)
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        super::clone_as_write(self, offset, run, len)
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        let extents = self.bytes.lock().extents(range);
        SparseBytes::visit(extents, visit);
        Ok(())
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        Ok(Some(self.bytes.lock().present()))
    }
}
