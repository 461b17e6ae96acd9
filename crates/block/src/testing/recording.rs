//! A storage that remembers what was durable when.
//!
//! The base of crash tests: a format is driven over it, then `crash` derives from the log every image that a
//! power cut could have left.

use std::sync::Arc;

use super::crash::CrashPoints;
use super::log::{Logged, SECTOR};
use super::memory_storage::MemoryStorage;
use super::sparse::SparseBytes;
use crate::Visit;
use crate::ZeroFlags;
use crate::storage::{HostRun, Storage, StorageExtent, StorageInfo};
use crate::sync::Mutex;
use crate::{ByteRange, Error, ErrorKind, Result};

/// A growing [`Storage`] in memory that logs every change and every flush, with the data.
///
/// Changes take effect at once for readers. What a crash would leave of them is for [`CrashPoints`] to say:
/// all that was logged before the last flush, and any part of the rest.
#[derive(Debug)]
pub struct RecordingStorage {
    name: Arc<str>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    live: SparseBytes,
    base: SparseBytes,
    log: Vec<Logged>,
}

impl Default for RecordingStorage {
    fn default() -> Self {
        Self::with_contents(&[])
    }
}

impl RecordingStorage {
    /// A storage that holds `bytes`, durably.
    pub fn with_contents(bytes: &[u8]) -> Self {
        let mut base = SparseBytes::new(0);
        base.write(bytes, 0);
        let state = State { live: base.clone(), base, log: Vec::new() };
        Self { name: Arc::from("recording"), state: Mutex::new(state) }
    }

    /// Entries logged so far: a position to compare [`CrashPoint::position`](super::CrashPoint::position)
    /// with.
    pub fn position(&self) -> usize {
        self.state.lock().log.len()
    }

    /// What was logged so far.
    pub fn log(&self) -> Vec<Logged> {
        self.state.lock().log.clone()
    }

    /// The bytes as readers see them now.
    pub fn to_vec(&self) -> Vec<u8> {
        self.state.lock().live.to_vec()
    }

    /// A copy of what readers see now.
    pub fn snapshot(&self) -> MemoryStorage {
        MemoryStorage::from_sparse(self.state.lock().live.clone())
    }

    /// Every image that a crash at any moment since the beginning could have left. The log is taken as it is
    /// now.
    pub fn crash_points(&self) -> CrashPoints {
        let state = self.state.lock();
        CrashPoints::new(state.base.clone(), state.log.clone())
    }

    /// Makes a change now and logs it as the disk would see it: in whole sectors, since a sector that is
    /// written in part goes to the disk together with what it held in memory.
    fn change(&self, entry: Logged) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        entry.apply(&mut state.live);
        match entry {
            Logged::Write { offset, data } => {
                let whole = ByteRange::at(offset, data.len() as u64).align_outward(SECTOR);
                state.log_live(whole);
            }
            Logged::Zero(range) => {
                let inner = range.align_inward(SECTOR);
                if inner.is_empty() {
                    state.log_live(range.align_outward(SECTOR));
                } else {
                    state.log_live(ByteRange::new(range.start(), inner.start()).align_outward(SECTOR));
                    state.log.push(Logged::Zero(inner));
                    state.log_live(ByteRange::new(inner.end(), range.end()).align_outward(SECTOR));
                }
            }
            Logged::SetLen(_) | Logged::Flush => state.log.push(entry),
        }
    }
}

impl State {
    /// Logs `range` as written with what it holds now, as far as the storage goes.
    fn log_live(&mut self, range: ByteRange) {
        let range = range.intersect(ByteRange::new(0, self.live.len()));
        if range.is_empty() {
            return;
        }
        let mut data = vec![0; range.len() as usize];
        self.live.read(&mut data, range.start());
        self.log.push(Logged::Write { offset: range.start(), data: Arc::from(data) });
    }
}

impl Storage for RecordingStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.state.lock().live.len())
    }

    fn info(&self) -> StorageInfo {
        StorageInfo { cheap_zero: true, discards: true, ..StorageInfo::plain() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if ByteRange::checked(offset, buf.len()).is_none() {
            return Err(Error::new(ErrorKind::OutOfBounds, "read")
                .in_file(Arc::clone(&self.name))
                .at(offset));
        }
        self.state.lock().live.read(buf, offset);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if ByteRange::checked(offset, buf.len()).is_none() {
            return Err(Error::new(ErrorKind::OutOfBounds, "write")
                .in_file(Arc::clone(&self.name))
                .at(offset));
        }
        if !buf.is_empty() {
            self.change(Logged::Write { offset, data: Arc::from(buf) });
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> Result<()> {
        if !range.is_empty() {
            self.change(Logged::Zero(range));
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let range = range.intersect(ByteRange::new(0, self.len()?));
        if !range.is_empty() {
            self.change(Logged::Zero(range));
        }
        Ok(())
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        if !range.is_empty() && range.end() > self.len()? {
            self.change(Logged::SetLen(range.end()));
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(Logged::SetLen(len));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.change(Logged::Flush);
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
        let extents = self.state.lock().live.extents(range);
        SparseBytes::visit(extents, visit);
        Ok(())
    }
}
