//! The raw device.
//!
//! Lock order: `first_sector` only. It is held during writes that touch sector 0 of a probed image, so that
//! two halves of a magic cannot slip in side by side, and never while a visitor runs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    BlockDevice, ByteRange, CloneUnits, DiscardEffect, Error, ErrorKind, Extent, ExtentKind, ExtentMerger,
    Geometry, HostRun, Result, Storage, StorageEvent, Visit, WriteFlags, ZeroCost, ZeroFlags,
};

use crate::magic;

/// The length of a disk is a multiple of this.
pub const SECTOR: u64 = 512;

/// How a raw image is to be used.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawOptions {
    probed: bool,
}

impl RawOptions {
    /// An image whose format was given as raw.
    pub fn new() -> Self {
        Self::default()
    }

    /// The format was guessed, not given: writes that would make the first sector look like another format
    /// are refused.
    #[must_use]
    pub fn probed(mut self, probed: bool) -> Self {
        self.probed = probed;
        self
    }
}

/// A storage as a disk.
///
/// A storage that does not end at a sector is a disk that does: a file of 1000 bytes is a disk of 1024. The
/// missing bytes read as zeros, and writing them makes the file longer.
pub struct Raw {
    storage: Arc<dyn Storage>,
    /// Changes only while no read or write is under way.
    len: AtomicU64,
    geometry: Geometry,
    /// `Some` if the format was guessed.
    first_sector: Option<Mutex<()>>,
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw").field("name", &self.name()).field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Raw {
    /// Makes a disk of all of `storage`, with the length it has now.
    ///
    /// # Errors
    /// Whatever asking for the length may give; [`ErrorKind::LimitExceeded`] if that rounds up past 64 bits.
    pub fn open(storage: Arc<dyn Storage>, options: RawOptions) -> Result<Self> {
        let len = storage.len()?.checked_next_multiple_of(SECTOR).ok_or_else(|| {
            Error::new(ErrorKind::LimitExceeded, "open")
                .in_file(storage.name())
                .because("longer than a disk can be")
        })?;
        let info = storage.info();
        let mut geometry = Geometry::plain();
        geometry.request_alignment = info.request_alignment;
        geometry.zero_cost = if info.cheap_zero { ZeroCost::Metadata } else { ZeroCost::Data };
        geometry.discard = if info.discards { DiscardEffect::Frees } else { DiscardEffect::Ignored };
        geometry.writable = info.writable;
        geometry.forgetful = info.forgetful;
        geometry.can_flush = info.can_flush;
        geometry.backing = info.backing;
        let first_sector = options.probed.then(Mutex::default);
        Ok(Self { storage, len: AtomicU64::new(len), geometry, first_sector })
    }

    /// The storage below.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn check(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(ByteRange::new(offset, end)),
            _ => Err(Error::out_of_bounds(operation, offset, len, self.len()).in_file(self.name())),
        }
    }

    fn check_write(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        if !self.geometry.writable {
            return Err(Error::new(ErrorKind::ReadOnly, operation).in_file(self.name()));
        }
        self.check(offset, len, operation)
    }

    /// Does `write`, which changes `range`, unless the image was probed and the first sector would then be
    /// another format's. `change` does to the bytes of the range in the first sector what the write will do.
    fn guarded(
        &self,
        range: ByteRange,
        operation: &'static str,
        change: impl FnOnce(&mut [u8]),
        write: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let touched = range.intersect(ByteRange::new(0, SECTOR));
        let (Some(lock), false) = (&self.first_sector, touched.is_empty()) else {
            return write();
        };
        let _held = lock.lock();
        let mut sector = [0; SECTOR as usize];
        self.storage.read_at(&mut sector, 0)?;
        change(&mut sector[touched.start() as usize..touched.end() as usize]);
        if let Some(format) = magic::foreign_format(&sector) {
            return Err(Error::new(ErrorKind::PermissionDenied, operation)
                .in_file(self.name())
                .at(range.start())
                .because(format!(
                    "the format was guessed to be raw, and this would make the image look like {format}; \
                     give the format explicitly to allow it"
                )));
        }
        write()
    }
}

impl BlockDevice for Raw {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn name(&self) -> &str {
        self.storage.name()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64, "read")?;
        self.storage.announce(StorageEvent::ReadAio);
        self.storage.read_at(buf, offset)?;
        // What lies past the end of the file has been read as zeros.
        if buf.last() != Some(&0) {
            return Ok(());
        }
        let len = self.storage.len()?;
        if offset + buf.len() as u64 <= len.next_multiple_of(SECTOR) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::CutShort, "read").in_file(self.name()).at(offset.max(len)).because(
            format!(
                "the file ends at {len}, the disk at {}: the file has become shorter since it was opened",
                self.len()
            ),
        ))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let range = self.check_write(offset, buf.len() as u64, "write")?;
        self.guarded(
            range,
            "write",
            |sector| sector.copy_from_slice(&buf[..sector.len()]),
            || {
                self.storage.announce(StorageEvent::WriteAio);
                self.storage.write_at(buf, offset)
            },
        )?;
        if flags.contains(WriteFlags::FUA) { self.storage.flush() } else { Ok(()) }
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let range = self.check_write(range.start(), range.len(), "write zeroes")?;
        self.guarded(
            range,
            "write zeroes",
            |sector| sector.fill(0),
            || self.storage.write_zeroes(range, flags),
        )
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let range = self.check_write(range.start(), range.len(), "discard")?;
        self.guarded(range, "discard", |sector| sector.fill(0), || self.storage.discard(range))
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let range = self.check(range.start(), range.len(), "map")?;
        let located = |range: ByteRange, kind| {
            Extent::new(range, kind)
                .in_host(HostRun { storage: Arc::clone(&self.storage), offset: range.start() })
        };
        let mut merger = ExtentMerger::default();
        let mut at = range.start();
        let mut stopped = false;
        let mut last = None;
        self.storage.extents(range, &mut |run| {
            at = run.range.end();
            let kind = if run.hole { ExtentKind::Zero } else { ExtentKind::Data };
            let mut extent = located(run.range, kind);
            // The storage has stopped inside a run: so does this.
            extent.partial = last.replace(run.hole) == Some(run.hole);
            let answer = merger.push(extent, visit);
            stopped = answer.is_break();
            answer
        })?;
        if stopped {
            return Ok(());
        }
        // The bytes between the end of the file and the end of its last sector are zeros; under direct I/O
        // they come with the block that the file ends in. Those of a file that has become shorter are not
        // known: reading them fails.
        let border = self.storage.len()?.next_multiple_of(SECTOR).clamp(at, range.end());
        let in_block = self.geometry.request_alignment > 1 && last == Some(false);
        let kind = if in_block { ExtentKind::Data } else { ExtentKind::Zero };
        let sector = located(ByteRange::new(at, border), kind);
        let missing = located(ByteRange::new(border, range.end()), ExtentKind::Data);
        if merger.push(sector, visit).is_continue() && merger.push(missing, visit).is_continue() {
            let _ = merger.finish(visit);
        }
        Ok(())
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        let refuse = |kind, why: String| Err(Error::new(kind, "resize").in_file(self.name()).because(why));
        if !self.geometry.writable {
            return refuse(ErrorKind::ReadOnly, "the image was opened read-only".into());
        }
        if !len.is_multiple_of(SECTOR) {
            return refuse(ErrorKind::InvalidInput, format!("{len} is not a multiple of {SECTOR}"));
        }
        let old = self.len();
        if len < old && !may_shrink {
            return refuse(ErrorKind::InvalidInput, format!("{len} bytes would cut off some of the {old}"));
        }
        if self.storage.info().fixed_len && len != old {
            return refuse(ErrorKind::Unsupported, "its length is fixed".into());
        }
        if len != old {
            self.storage.set_len(len)?;
            self.len.store(len, Ordering::Release);
        }
        self.storage.flush()
    }

    /// None if the image was probed: its first sector is looked at before it is written.
    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        if self.first_sector.is_some() {
            return None;
        }
        let block = self.storage.clone_block(file)?;
        Some(CloneUnits { device: block, file: block })
    }

    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let range = self.check_write(offset, len, "clone")?;
        if self.first_sector.is_some() && range.start() < SECTOR {
            return Err(Error::new(ErrorKind::Unsupported, "clone")
                .in_file(self.name())
                .because("the first sector of a probed image is looked at before it is written"));
        }
        self.storage.clone_range(offset, run, len)
    }

    fn cancel_in_flight(&self) {
        self.storage.cancel_in_flight();
    }
}
