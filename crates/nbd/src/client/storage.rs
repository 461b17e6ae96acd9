//! An export as what a format lives in: a storage whose length cannot change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::{
    BlockDevice, ByteRange, DiscardEffect, Error, ErrorKind, Result, Storage, StorageExtent, StorageInfo,
    Visit, WriteFlags, ZeroCost, ZeroFlags,
};

use super::Client;

/// A [`Client`] as a [`Storage`].
#[derive(Debug)]
pub struct ClientStorage {
    client: Arc<Client>,
    /// Whether a flush has failed: all later ones fail too. `None` where each flush stands for itself.
    failed: Option<AtomicBool>,
}

impl ClientStorage {
    /// All of the export, for a format: after a failed flush all flushes fail.
    pub fn new(client: Arc<Client>) -> Self {
        Self { client, failed: Some(AtomicBool::new(false)) }
    }

    /// All of the export, for a disk with no format above it: the client knows which writes a lost connection
    /// may have taken along, and fails the flush that should have covered them; those after it may succeed.
    /// So a job that writes what was not flushed again can go on.
    pub fn plain(client: Arc<Client>) -> Self {
        Self { client, failed: None }
    }

    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Fails if `range` reaches past the end.
    fn fits(&self, offset: u64, len: u64, operation: &'static str) -> Result<()> {
        let size = self.client.len();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::new(ErrorKind::NoSpace, operation)
                .in_file(self.client.name())
                .at(offset)
                .because(format!("{len} bytes reach past the end of the export at {size}"))),
        }
    }
}

impl Storage for ClientStorage {
    fn name(&self) -> &str {
        self.client.name()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.client.len())
    }

    fn info(&self) -> StorageInfo {
        let geometry = self.client.geometry();
        let mut info = StorageInfo::plain();
        info.fixed_len = true;
        info.request_alignment = geometry.request_alignment;
        info.writable = geometry.writable;
        info.cheap_zero = geometry.zero_cost == ZeroCost::Metadata;
        info.discards = geometry.discard == DiscardEffect::Frees;
        info.zero_init = false;
        info.forgetful = geometry.forgetful;
        info.can_flush = geometry.can_flush;
        info.backing = geometry.backing;
        info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = self.client.len().saturating_sub(offset).min(buf.len() as u64);
        let (inside, past) = buf.split_at_mut(there as usize);
        past.fill(0);
        if inside.is_empty() { Ok(()) } else { self.client.read_at(inside, offset) }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.fits(offset, buf.len() as u64, "write")?;
        self.client.write_at(buf, offset, WriteFlags::NONE)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.fits(range.start(), range.len(), "write zeroes")?;
        self.client.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.client.discard(range.intersect(ByteRange::new(0, self.client.len())))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "allocate").in_file(self.client.name()).at(range.start()))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.fits(0, len, "set length")?;
        match self.client.len() {
            size if size == len => Ok(()),
            size => Err(Error::new(ErrorKind::Unsupported, "set length")
                .in_file(self.client.name())
                .because(format!("an export of {size} bytes cannot become {len}"))),
        }
    }

    fn flush(&self) -> Result<()> {
        let Some(failed) = &self.failed else { return self.client.flush() };
        if failed.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Poisoned, "flush")
                .in_file(self.client.name())
                .because("an earlier flush failed"));
        }
        self.client.flush().map_err(|error| {
            // It was given up: what was written is as durable as before. What a lost connection took along is
            // reported by the next flush.
            if error.kind() == ErrorKind::Cancelled {
                return error;
            }
            failed.store(true, Ordering::SeqCst);
            match error.kind() {
                // To write it again does not help here.
                ErrorKind::WritesLost => {
                    Error::new(ErrorKind::Io, "flush").in_file(self.client.name()).caused_by(error)
                }
                _ => error,
            }
        })
    }

    fn cancel_in_flight(&self) {
        self.client.cancel_in_flight();
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        let range = range.intersect(ByteRange::new(0, self.client.len()));
        if range.is_empty() {
            return Ok(());
        }
        self.client.extents(range, &mut |extent| {
            visit(StorageExtent { range: extent.range, hole: extent.reads_as_zero() })
        })
    }
}
