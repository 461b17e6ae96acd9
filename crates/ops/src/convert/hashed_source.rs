//! The source of a copy, which is hashed while it is copied: for a verification by hash, and for the digests
//! of a checkpoint.
//!
//! Reads are answered from blocks of 1 MiB that are read as a whole, once: what is hashed is what the copy
//! gets. A block stays in memory until all of it has been read, or others need the room. For a checkpoint a
//! block with a bad sector is read in pieces, as the copy asks for them, and has no digest then.
//!
//! ```text
//!   mover: read_at ---> block in memory? --no--> read it, hash it, record the digest
//!                            |  yes
//!                            v
//!                      copy the piece
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockmirror_block::sync::{Condvar, Mutex, MutexGuard};
use blockmirror_block::{
    BlockDevice, ByteRange, Error, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_hash::{
    BLOCK, BlockDigest, BlockDigests, DigestRecorder, HashOptions, RunDigest, ZERO_DIGEST,
};

/// Blocks that are kept although nothing reads them at this moment.
const MOST_KEPT: usize = 32;

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::convert) struct HashedSource {
    inner: Arc<dyn BlockDevice>,
    recorder: DigestRecorder,
    /// Whether pieces are read of a block that cannot be read as a whole.
    in_pieces: bool,
    /// *Guards* the blocks in memory. *Order*: leaf. *Not under it*: device calls, hashing.
    blocks: Mutex<Blocks>,
    /// A block has been read, or could not be.
    loaded: Condvar,
}

#[derive(Debug, Default)]
struct Blocks {
    by_number: BTreeMap<u64, Slot>,
    /// Counts uses, so that the block is found that was used least lately.
    clock: u64,
    /// Blocks that were read twice and held something else the second time.
    unstable: Vec<u64>,
    /// Blocks that could not be read as a whole the last time.
    unread: BTreeSet<u64>,
}

#[derive(Debug)]
enum Slot {
    /// A thread reads it.
    Loading,
    Loaded {
        bytes: Arc<Vec<u8>>,
        used: u64,
        /// Bytes that were not asked for so far.
        left: u64,
    },
}

impl HashedSource {
    pub(super) fn new(inner: Arc<dyn BlockDevice>) -> Self {
        let (recorder, blocks, loaded) = (DigestRecorder::new(), Mutex::default(), Condvar::new());
        Self { inner, recorder, in_pieces: false, blocks, loaded }
    }

    /// The same of a source with bad sectors: what can be read is.
    pub(super) fn in_pieces(mut self) -> Self {
        self.in_pieces = true;
        self
    }

    /// The digest of `run`, whole blocks that were copied by now: of those that were not read the source has
    /// said that they are zeros. `None` if one of them could be read in pieces only.
    pub(super) fn run_digest(&self, run: ByteRange) -> Option<BlockDigest> {
        let numbers = run.start() / BLOCK..run.end().div_ceil(BLOCK);
        if self.blocks.lock().unread.range(numbers.clone()).next().is_some() {
            return None;
        }
        let mut digest = RunDigest::new();
        numbers.for_each(|number| digest.block(self.recorder.get(number).unwrap_or(ZERO_DIGEST)));
        Some(digest.finish())
    }

    /// Forgets the digests of `run`, whole blocks.
    pub(super) fn forget(&self, run: ByteRange) {
        self.recorder.forget(run.start() / BLOCK..run.end().div_ceil(BLOCK));
    }

    /// The blocks that were read twice and were not the same.
    pub(super) fn unstable(&self) -> Vec<ByteRange> {
        self.blocks.lock().unstable.iter().map(|number| self.range(*number)).collect()
    }

    /// The digests of the whole source, as far as it was copied those of what the copy got. What was not read
    /// is read now. Neither digests nor blocks of the copy stay here.
    pub(super) fn digests(&self, stop: &mut dyn FnMut() -> Visit) -> Result<Option<BlockDigests>> {
        // The copy is over: nothing reads the blocks that are left.
        self.blocks.lock().by_number.clear();
        self.recorder.complete(&*self.inner, &HashOptions::new(), &mut |_| stop())
    }

    fn range(&self, number: u64) -> ByteRange {
        ByteRange::at(number * BLOCK, BLOCK).intersect(ByteRange::new(0, self.inner.len()))
    }

    /// The block `number`, of which `wanted` bytes are asked for; `None` if pieces of it are to be read.
    fn block(&self, number: u64, wanted: u64) -> Result<Option<Arc<Vec<u8>>>> {
        let mut blocks = self.blocks.lock();
        let is_piece = wanted < self.range(number).len();
        loop {
            match blocks.by_number.get(&number) {
                Some(Slot::Loaded { bytes, .. }) => {
                    let bytes = Arc::clone(bytes);
                    blocks.use_part(number, wanted);
                    return Ok(Some(bytes));
                }
                // It fails slowly, and would do so for each piece. Those that have waited ask again.
                _ if self.in_pieces && is_piece && blocks.unread.contains(&number) => return Ok(None),
                Some(Slot::Loading) => blocks = self.loaded.wait(blocks),
                None => break,
            }
        }
        blocks.make_room();
        blocks.by_number.insert(number, Slot::Loading);
        drop(blocks);
        // A panic of the device must not leave the others waiting.
        let mut loading = Loading { source: self, number, bytes: None };
        let range = self.range(number);
        let mut bytes = vec![0; range.len() as usize];
        let read = self.inner.read_at(&mut bytes, range.start());
        if self.in_pieces {
            let mut blocks = self.blocks.lock();
            match read {
                Ok(()) => _ = blocks.unread.remove(&number),
                Err(_) => {
                    blocks.unread.insert(number);
                    return Ok(None);
                }
            }
        }
        read?;
        if self.recorder.record(range.start(), &bytes) {
            self.blocks.lock().unstable.push(number);
        }
        let bytes = Arc::new(bytes);
        loading.bytes = Some((Arc::clone(&bytes), wanted));
        drop(loading);
        Ok(Some(bytes))
    }
}

impl Blocks {
    /// `wanted` bytes of a block in memory are read: it goes when that was the rest of it.
    fn use_part(&mut self, number: u64, wanted: u64) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(Slot::Loaded { used, left, .. }) = self.by_number.get_mut(&number) {
            (*used, *left) = (clock, left.saturating_sub(wanted));
            if *left == 0 {
                self.by_number.remove(&number);
            }
        }
    }

    fn make_room(&mut self) {
        let used = |slot: &Slot| match slot {
            Slot::Loaded { used, .. } => Some(*used),
            Slot::Loading => None,
        };
        while self.by_number.values().filter_map(used).count() >= MOST_KEPT {
            let slots = self.by_number.iter().filter_map(|(number, slot)| Some((used(slot)?, *number)));
            let Some((_, oldest)) = slots.min() else { return };
            self.by_number.remove(&oldest);
        }
    }
}

/// A block that is being read. Dropped without bytes it is forgotten, so that the next thread tries itself.
struct Loading<'a> {
    source: &'a HashedSource,
    number: u64,
    bytes: Option<(Arc<Vec<u8>>, u64)>,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut blocks: MutexGuard<'_, Blocks> = self.source.blocks.lock();
        match self.bytes.take() {
            Some((bytes, wanted)) => {
                let left = bytes.len() as u64;
                blocks.by_number.insert(self.number, Slot::Loaded { bytes, used: 0, left });
                blocks.use_part(self.number, wanted);
            }
            None => {
                blocks.by_number.remove(&self.number);
            }
        }
        drop(blocks);
        self.source.loaded.notify_all();
    }
}

impl BlockDevice for HashedSource {
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
        let range = match ByteRange::checked(offset, buf.len()) {
            Some(range) if range.end() <= self.len() => range,
            _ => {
                let error = Error::out_of_bounds("read", offset, buf.len() as u64, self.len());
                return Err(error.in_file(self.name()));
            }
        };
        let mut at = range.start();
        while at < range.end() {
            let number = at / BLOCK;
            let block = self.range(number);
            let piece = ByteRange::new(at, range.end()).intersect(block);
            let bytes = self.block(number, piece.len())?;
            let from = (piece.start() - block.start()) as usize;
            let to = (piece.start() - range.start()) as usize;
            let len = piece.len() as usize;
            let part = &mut buf[to..to + len];
            match bytes {
                Some(bytes) => part.copy_from_slice(&bytes[from..from + len]),
                None => self.inner.read_at(part, piece.start())?,
            }
            at = piece.end();
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.inner.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.inner.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    /// Without the places in host files: what is copied past this device is not hashed.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.inner.extents(range, &mut |mut extent| {
            extent.host = None;
            visit(extent)
        })
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
    use blockmirror_block::testing::{DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind};
    use blockmirror_hash::DiskHash;

    use super::*;

    const LEN: u64 = 3 * BLOCK + 4096;

    fn disk() -> Arc<MemoryDisk> {
        let disk = MemoryDisk::new(LEN).logged();
        disk.write_at(&vec![3; 2 * BLOCK as usize], BLOCK, WriteFlags::NONE).unwrap();
        disk.write_at(&[4; 4096], 3 * BLOCK, WriteFlags::NONE).unwrap();
        disk.take_log();
        Arc::new(disk)
    }

    fn hash(source: &HashedSource) -> DiskHash {
        assert!(source.unstable().is_empty());
        source.digests(&mut || Visit::Continue(())).unwrap().unwrap().hash()
    }

    /// Whatever pieces it is read in, each block is read once, and the hash is that of the disk.
    #[test]
    fn a_block_is_read_once_and_hashed() {
        let inner = disk();
        let whole =
            DiskHash::of(&*inner, &HashOptions::new(), &mut |_| Visit::Continue(())).unwrap().unwrap();
        inner.take_log();
        let source = HashedSource::new(Arc::clone(&inner) as _);
        for piece in ByteRange::new(BLOCK, LEN).pieces(300_000) {
            let mut read = vec![0; piece.len() as usize];
            source.read_at(&mut read, piece.start()).unwrap();
            let mut want = read.clone();
            inner.read_at(&mut want, piece.start()).unwrap();
            assert!(read == want);
        }
        let reads = |log: Vec<DiskOp>| {
            let whole = |op: &DiskOp| matches!(op, DiskOp::Read(range) if range.start() % BLOCK == 0);
            log.iter().filter(|op| whole(op)).count()
        };
        assert!(reads(inner.take_log()) >= 3);
        assert!(source.blocks.lock().by_number.is_empty(), "all of it was read");
        assert_eq!(hash(&source), whole);
        assert_eq!(reads(inner.take_log()), 0, "what was copied is not read again");
        assert!(source.recorder.is_empty(), "one set of digests is enough");
    }

    /// A source that reads differently the second time is no source of a proof.
    #[test]
    fn a_block_that_changes_between_two_reads_is_reported() {
        let inner = disk();
        let source = HashedSource::new(Arc::clone(&inner) as _);
        source.read_at(&mut vec![0; BLOCK as usize], BLOCK).unwrap();
        inner.write_at(&[9], BLOCK + 5, WriteFlags::NONE).unwrap();
        source.read_at(&mut vec![0; BLOCK as usize], BLOCK).unwrap();
        assert_eq!(source.unstable(), [ByteRange::at(BLOCK, BLOCK)]);
    }

    #[test]
    fn a_read_error_is_the_callers_and_the_next_read_tries_again() {
        let faults = Faults::new();
        let source = HashedSource::new(Arc::new(FaultDisk::new(disk(), faults.clone())));
        faults.inject(Fault::on(OpKind::Read));
        source.read_at(&mut [0; 512], BLOCK).unwrap_err();
        source.read_at(&mut [0; 512], BLOCK).unwrap();
        assert!(source.read_at(&mut [0; 512], LEN - 511).is_err());
    }

    /// A copy that leaves out bad sectors lost all of the block around one.
    #[test]
    fn around_a_bad_sector_the_pieces_are_read_and_the_block_has_no_digest() {
        let faults = Faults::new();
        let source = HashedSource::new(Arc::new(FaultDisk::new(disk(), faults.clone()))).in_pieces();
        let (first, second) = (ByteRange::at(BLOCK, BLOCK), ByteRange::at(2 * BLOCK, BLOCK));
        faults.inject(Fault::on(OpKind::Read));
        let mut piece = [0; 512];
        source.read_at(&mut piece, BLOCK).unwrap();
        assert_eq!((piece, source.run_digest(first)), ([3; 512], None));
        source.read_at(&mut piece, 2 * BLOCK).unwrap();
        let whole = blockmirror_hash::block_digest(&vec![3; BLOCK as usize]);
        assert_eq!(source.run_digest(second), Some(whole));
        source.read_at(&mut piece, BLOCK + 512).unwrap();
        assert_eq!(source.run_digest(first), None, "a piece does not read the whole block again");
        source.read_at(&mut vec![0; BLOCK as usize], BLOCK).unwrap();
        assert_eq!(source.run_digest(first), Some(whole), "it can be read as a whole by now");
        assert_eq!(source.run_digest(ByteRange::at(0, BLOCK)), Some(ZERO_DIGEST), "nothing was to be read");
        source.forget(ByteRange::at(BLOCK, 2 * BLOCK));
        assert!(source.recorder.is_empty());
    }

    /// Each of them read all of the block, one after the other.
    #[test]
    fn pieces_that_wait_for_a_block_do_not_read_it_when_that_has_failed() {
        let faults = Faults::new();
        let source = HashedSource::new(Arc::new(FaultDisk::new(disk(), faults.clone()))).in_pieces();
        let bad = ByteRange::at(2 * BLOCK - 512, 512);
        faults.inject(Fault::on(OpKind::Read).within(bad).forever());
        let gate = faults.hold(OpKind::Read, Some(bad));
        let read = |at: u64| {
            let mut piece = [0; 4096];
            source.read_at(&mut piece, BLOCK + at * 4096).unwrap();
            assert_eq!(piece, [3; 4096]);
        };
        let begun = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            scope.spawn(|| read(0));
            gate.wait_held(1);
            // Whichever of them come before the failure and which after.
            for at in 1..4 {
                let (begun, read) = (&begun, &read);
                scope.spawn(move || {
                    begun.wait();
                    read(at);
                });
            }
            begun.wait();
            gate.open();
        });
        assert_eq!((faults.failed(), faults.seen(OpKind::Read)), (1, 5));
    }

    #[test]
    fn no_more_blocks_are_kept_than_the_bound() {
        let source = HashedSource::new(Arc::new(MemoryDisk::new(100 * BLOCK)));
        for number in 0..100 {
            source.read_at(&mut [0; 512], number * BLOCK).unwrap();
        }
        assert_eq!(source.blocks.lock().by_number.len(), MOST_KEPT);
        source.digests(&mut || Visit::Continue(())).unwrap().unwrap();
        assert!(source.blocks.lock().by_number.is_empty());
    }
}
