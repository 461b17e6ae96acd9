//! The target of a copy, each write to which is read back after a flush.
//!
//! The digest of what is written is kept until the next flush; the flush then reads it back and compares. So
//! that what is kept has a bound, and what one flush reads, a flush comes after each 256 MiB that will be
//! read, or 65,536 writes. Zeros that the target knows are not read. Between reads of 1 MiB, or of one write,
//! a caller that is cancelled is given up.
//!
//! What must hold: a write leaves `pending` only by a flush that succeeded and began after the write had
//! returned, and by a read of it after that. All writes of a copy of a source that does not change write the
//! same bytes to the same place, so that a later write does not contradict an earlier digest.

use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, ExtentKind, Geometry, QueryBudget, Result, Visit,
    WriteFlags, ZeroFlags, cancel, zero,
};
use blockmirror_hash::{BlockDigest, block_digest};

/// Bytes to be read back that are written before a flush.
const MOST_BYTES: u64 = 256 << 20;
/// Writes that are remembered before a flush.
const MOST_WRITES: usize = 65_536;
/// Zeros that are read at once.
const BUFFER: u64 = 1 << 20;
/// Extents that are looked at together.
const BATCH: usize = 4096;

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::convert) struct WrittenTarget {
    inner: Arc<dyn BlockDevice>,
    /// *Guards* the writes that were not read back. *Order*: leaf. *Not under it*: device calls.
    pending: Mutex<Pending>,
    /// *Guards* what was found. *Order*: leaf. *Not under it*: device calls.
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Pending {
    writes: Vec<Written>,
    /// Bytes that the next flush reads.
    bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    range: ByteRange,
    /// `None`: zeros.
    digest: Option<BlockDigest>,
}

/// What reading back has found.
#[derive(Debug)]
pub(in crate::convert) struct Found {
    /// Where the target does not hold what was written.
    pub(super) unequal: DirtyBitmap,
    /// Bytes that it holds.
    pub(super) bytes: u64,
    /// Why the rest was not read back, if something is unequal.
    pub(super) failed: Option<Error>,
}

impl WrittenTarget {
    /// `unequal` is an empty bitmap of the disk.
    pub(super) fn new(inner: Arc<dyn BlockDevice>, unequal: DirtyBitmap) -> Self {
        Self {
            inner,
            pending: Mutex::default(),
            found: Mutex::new(Found { unequal, bytes: 0, failed: None }),
        }
    }

    /// Reads back what was not read back so far; what has been found. `progress` gets the bytes that the
    /// target holds so far, and says whether to go on. Fails only if nothing is unequal.
    pub(super) fn finish(self: Arc<Self>, progress: &mut dyn FnMut(u64) -> Visit) -> Result<Found> {
        let failed = self.flush_while(progress).err();
        let found = self.found.lock();
        match failed {
            Some(error) if found.unequal.is_clean() => Err(error),
            failed => Ok(Found { unequal: found.unequal.clone(), bytes: found.bytes, failed }),
        }
    }

    fn written(&self, range: ByteRange, digest: Option<BlockDigest>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let bytes = digest.map_or_else(|| self.unknown_bytes(range), |_| range.len());
        let mut pending = self.pending.lock();
        pending.writes.push(Written { range, digest });
        pending.bytes += bytes;
        let is_full = pending.bytes >= MOST_BYTES || pending.writes.len() >= MOST_WRITES;
        drop(pending);
        if is_full { self.flush() } else { Ok(()) }
    }

    /// The bytes of `range`, which was zeroed, that the target does not say to be zero, as far as one bounded
    /// query tells.
    fn unknown_bytes(&self, range: ByteRange) -> u64 {
        let (mut known, mut seen, mut budget) = (0, 0, QueryBudget::new());
        let asked = self.inner.extents(range, &mut |extent| {
            if !must_be_read(extent.kind) {
                known += extent.range.len();
            }
            seen += 1;
            let spent = budget.spend(&extent);
            if seen < BATCH { spent } else { Visit::Break(()) }
        });
        // Reading back fails if this does.
        asked.map_or(range.len(), |()| range.len().saturating_sub(known))
    }

    /// Flushes, and reads back what was written before.
    fn flush_while(&self, progress: &mut dyn FnMut(u64) -> Visit) -> Result<()> {
        let mut batch = std::mem::take(&mut *self.pending.lock());
        let flushed = self.inner.flush();
        let mut buffer = Vec::new();
        // In order of offset, from the end of the list: what is left after a failure stays in it.
        let read_back = flushed.and_then(|()| {
            batch.writes.sort_unstable_by_key(|written| std::cmp::Reverse(written.range.start()));
            while let Some(written) = batch.writes.last() {
                self.read_back(*written, &mut buffer, progress)?;
                batch.writes.pop();
            }
            Ok(())
        });
        if read_back.is_err() {
            let mut pending = self.pending.lock();
            pending.bytes += batch.bytes;
            pending.writes.append(&mut batch.writes);
        }
        read_back
    }

    /// Fails if the caller is cancelled, or `progress` says so.
    fn go_on(&self, progress: &mut dyn FnMut(u64) -> Visit) -> Result<()> {
        let done = self.found.lock().bytes.min(self.len());
        match cancel::is_cancelled() || progress(done).is_break() {
            true => Err(Error::new(ErrorKind::Cancelled, "verify").because("interrupted")),
            false => Ok(()),
        }
    }

    fn read_back(
        &self,
        written: Written,
        buffer: &mut Vec<u8>,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<()> {
        let Written { range, digest } = written;
        self.go_on(progress)?;
        let is_equal = match digest {
            Some(digest) => {
                // Written from one buffer.
                buffer.resize(range.len() as usize, 0);
                self.inner.read_at(buffer, range.start())?;
                block_digest(buffer) == digest
            }
            None => return self.read_back_zeros(range, buffer, progress),
        };
        self.note(range, is_equal);
        Ok(())
    }

    /// What the target says is zero is not read.
    fn read_back_zeros(
        &self,
        range: ByteRange,
        buffer: &mut Vec<u8>,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<()> {
        let mut at = range.start();
        while at < range.end() {
            self.go_on(progress)?;
            let (mut extents, mut budget) = (Vec::new(), QueryBudget::new());
            self.inner.extents(ByteRange::new(at, range.end()), &mut |extent| {
                let spent = budget.spend(&extent);
                extents.push((extent.range, extent.kind));
                if extents.len() < BATCH { spent } else { Visit::Break(()) }
            })?;
            if extents.is_empty() {
                // A device that reports nothing has broken its contract; reading tells the truth.
                extents.push((ByteRange::new(at, range.end()), ExtentKind::Data));
            }
            for (part, kind) in extents {
                at = part.end();
                if !must_be_read(kind) {
                    self.note(part, true);
                    continue;
                }
                for piece in part.pieces(BUFFER) {
                    self.go_on(progress)?;
                    buffer.resize(piece.len() as usize, 0);
                    self.inner.read_at(buffer, piece.start())?;
                    self.note(piece, zero::is_zero(buffer));
                }
            }
        }
        Ok(())
    }

    fn note(&self, range: ByteRange, is_equal: bool) {
        let mut found = self.found.lock();
        if is_equal {
            found.bytes += range.len();
        } else {
            found.unequal.set(range.start()..range.end());
        }
    }
}

/// Whether what was zeroed must be read to know that it is.
fn must_be_read(kind: ExtentKind) -> bool {
    matches!(kind, ExtentKind::Data | ExtentKind::Unknown)
}

impl BlockDevice for WrittenTarget {
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
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let digest = block_digest(buf);
        self.inner.write_at(buf, offset, flags)?;
        self.written(ByteRange::at(offset, buf.len() as u64), Some(digest))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.inner.write_zeroes(range, flags)?;
        self.written(range, None)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.flush_while(&mut |_| Visit::Continue(()))
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.inner.extents(range, visit)
    }

    fn preallocate(&self, range: ByteRange) -> Result<()> {
        self.inner.preallocate(range)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.inner))
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.inner.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.inner.cancel_in_flight();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use blockmirror_block::cancel::CancelSource;
    use blockmirror_block::testing::{CorruptingDisk, DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind};

    use super::*;

    const LEN: u64 = 1 << 20;

    fn over(inner: Arc<dyn BlockDevice>) -> Arc<WrittenTarget> {
        Arc::new(WrittenTarget::new(inner, DirtyBitmap::new(LEN, 512).unwrap()))
    }

    fn go_on(_: u64) -> Visit {
        Visit::Continue(())
    }

    fn write_all(target: &WrittenTarget) {
        target.write_at(&[1; 8192], 4096, WriteFlags::NONE).unwrap();
        target.write_zeroes(ByteRange::at(65_536, 65_536), ZeroFlags::NONE).unwrap();
        target.write_at(&[2; 512], 12_288, WriteFlags::NONE).unwrap();
    }

    #[test]
    fn what_is_stored_wrongly_is_found_at_the_flush() {
        for (wrong, want) in [(5000, 4096..12_288), (12_300, 12_288..12_800), (70_000, 65_536..131_072)] {
            let disk = Arc::new(MemoryDisk::new(LEN));
            disk.write_at(&vec![1; LEN as usize], 0, WriteFlags::NONE).unwrap();
            let target = over(Arc::new(CorruptingDisk::new(disk, wrong)));
            write_all(&target);
            target.flush().unwrap();
            let found = target.finish(&mut go_on).unwrap();
            let runs: Vec<_> = found.unequal.runs().collect();
            assert_eq!(runs.len(), 1, "{wrong}: {runs:?}");
            assert!(runs[0].start >= want.start && runs[0].end <= want.end, "{wrong}: {runs:?}");
            assert!(runs[0].contains(&wrong), "{wrong}: {runs:?}");
        }
        let target = over(Arc::new(MemoryDisk::new(LEN)));
        write_all(&target);
        let found = target.finish(&mut go_on).unwrap();
        assert!(found.unequal.is_clean());
        assert_eq!(found.bytes, 8192 + 65_536 + 512);
    }

    /// A write that no flush has covered is not what is read: it may be in a cache only.
    #[test]
    fn nothing_is_read_back_before_a_flush_and_everything_after_one() {
        let disk = Arc::new(MemoryDisk::new(LEN).logged());
        let target = over(Arc::clone(&disk) as _);
        write_all(&target);
        assert!(!disk.take_log().iter().any(|op| matches!(op, DiskOp::Read(_))));
        target.flush().unwrap();
        let log = disk.take_log();
        assert!(matches!(log[0], DiskOp::Flush), "{log:?}");
        let read: u64 = log
            .iter()
            .map(|op| match op {
                DiskOp::Read(range) => range.len(),
                _ => 0,
            })
            .sum();
        assert!(read >= 8192 + 512, "{log:?}");
    }

    /// After a flush or a read that failed the same writes are read back by the next one.
    #[test]
    fn a_failure_forgets_nothing() {
        for kind in [OpKind::Flush, OpKind::Read] {
            let faults = Faults::new();
            let inner = CorruptingDisk::new(Arc::new(MemoryDisk::new(LEN)), 5000);
            let target = over(Arc::new(FaultDisk::new(Arc::new(inner), faults.clone())));
            write_all(&target);
            faults.inject(Fault::on(kind));
            target.flush().unwrap_err();
            let found = target.finish(&mut go_on).unwrap();
            assert!(found.unequal.is_dirty(5000), "{kind:?}");
        }
    }

    /// What was found before the failure was lost with it.
    #[test]
    fn a_failure_of_the_last_flush_hides_nothing_that_was_found() {
        let faults = Faults::new();
        let inner = CorruptingDisk::new(Arc::new(MemoryDisk::new(LEN)), 5000);
        let target = over(Arc::new(FaultDisk::new(Arc::new(inner), faults.clone())));
        write_all(&target);
        target.flush().unwrap();
        target.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
        faults.inject(Fault::on(OpKind::Flush));
        let found = target.finish(&mut go_on).unwrap();
        assert!(found.unequal.is_dirty(5000) && found.failed.is_some());
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let target = over(Arc::new(MemoryDisk::new(LEN)));
        for _ in 0..MOST_WRITES + 10 {
            target.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
        }
        assert_eq!(target.pending.lock().writes.len(), 10);
    }

    /// A disk of zeros without a map of them, as a block device; it counts what is read.
    #[derive(Debug, Default)]
    struct Unmapped {
        flushes: AtomicU64,
        read: AtomicU64,
    }

    const UNMAPPED: u64 = 1 << 30;

    impl BlockDevice for Unmapped {
        fn len(&self) -> u64 {
            UNMAPPED
        }

        fn name(&self) -> &str {
            "unmapped"
        }

        fn geometry(&self) -> Geometry {
            MemoryDisk::new(LEN).geometry()
        }

        fn read_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
            self.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
            buf.fill(0);
            Ok(())
        }

        fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> Result<()> {
            Ok(())
        }

        fn write_zeroes(&self, _: ByteRange, _: ZeroFlags) -> Result<()> {
            Ok(())
        }

        fn discard(&self, _: ByteRange) -> Result<()> {
            Ok(())
        }

        fn flush(&self) -> Result<()> {
            self.flushes.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
            let _ = visit(Extent::new(range, ExtentKind::Data));
            Ok(())
        }
    }

    /// Zeros counted as nothing: all of them waited for one flush, which read them without a stop.
    #[test]
    fn zeros_that_are_read_count_and_the_last_read_can_be_stopped() {
        let disk = Arc::new(Unmapped::default());
        let empty = DirtyBitmap::new(UNMAPPED, 65_536).unwrap();
        let target = Arc::new(WrittenTarget::new(Arc::clone(&disk) as _, empty));
        for at in 0..7 {
            target.write_zeroes(ByteRange::at(at * (64 << 20), 64 << 20), ZeroFlags::NONE).unwrap();
        }
        let (flushes, read) = (&disk.flushes, &disk.read);
        assert_eq!((flushes.load(Ordering::SeqCst), read.load(Ordering::SeqCst)), (1, MOST_BYTES));
        let mut seen = Vec::new();
        let stopped = target.finish(&mut |done| {
            seen.push(done);
            if read.load(Ordering::SeqCst) > MOST_BYTES { Visit::Break(()) } else { Visit::Continue(()) }
        });
        assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(read.load(Ordering::SeqCst), MOST_BYTES + BUFFER);
        assert_eq!(seen.last(), Some(&(MOST_BYTES + BUFFER)));
    }

    #[test]
    fn a_caller_that_is_cancelled_does_not_wait_for_what_is_read_back() {
        let disk = Arc::new(Unmapped::default());
        let empty = DirtyBitmap::new(UNMAPPED, 65_536).unwrap();
        let target = Arc::new(WrittenTarget::new(Arc::clone(&disk) as _, empty));
        let source = CancelSource::new();
        let _scope = source.enter();
        source.cancel();
        let stopped = target.write_zeroes(ByteRange::new(0, UNMAPPED), ZeroFlags::NONE).unwrap_err();
        assert_eq!(stopped.kind(), ErrorKind::Cancelled);
        assert_eq!(disk.read.load(Ordering::SeqCst), 0);
    }
}
