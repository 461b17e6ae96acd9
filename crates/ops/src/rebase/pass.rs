//! The pass of a rebase: what the image shows of its old chain and would not show of the new one is written
//! into the image.
//!
//! Runs on the job's thread. The extents of the image say which parts it does not decide itself, and which of
//! those both chains are known to read as zeros. The rest is read from both and compared by units of the
//! image's mapping. Units that differ become data of the image, or zeros by its own statement. To store data
//! compressed, whole clusters are compared and written, also those that the image decides in part.

use std::collections::VecDeque;
use std::ops::Range;

use blockmirror_block::{
    BlockDevice, ByteRange, Error as BlockError, Extent, ExtentKind, QueryBudget, Visit, WriteFlags,
    ZeroFlags, zero,
};
use blockmirror_job::Operation;
use blockmirror_qcow2::CompressFilter;

use crate::Worker;
use crate::error::Error;

/// Bytes that are compared at once.
const PIECE: u64 = 1 << 20;

/// Extents that are fetched at once.
const BATCH: usize = 1024;

/// The smallest unit that is compared, and the unit of an image that does not say its own.
const SECTOR: u64 = 512;

/// The pass over one image.
pub(super) struct Pass<'a> {
    image: &'a dyn BlockDevice,
    /// What is written through, if data is to be stored compressed.
    compress: Option<&'a CompressFilter>,
    new: Option<&'a dyn BlockDevice>,
    /// The depth in the image's chain from which on both chains are the same files.
    shared: Option<u32>,
    /// Zeros below this offset become data.
    data_below: u64,
    unit: u64,
    old: Vec<u8>,
    other: Vec<u8>,
}

/// What failed, and on which side.
type Failure = (Operation, BlockError);

impl<'a> Pass<'a> {
    /// `image` gets what it does not share with `new`; without that everything it shows. From the depth
    /// `shared` on, if there is one, its chain is that of `new`. Data goes through `compress`, which writes
    /// the image, if there is one.
    pub(super) fn new(
        image: &'a dyn BlockDevice,
        compress: Option<&'a CompressFilter>,
        new: Option<&'a dyn BlockDevice>,
        shared: Option<u32>,
    ) -> Self {
        let geometry = image.geometry();
        let subcluster = geometry.subcluster_size.filter(|_| compress.is_none());
        let unit = subcluster.or(geometry.cluster_size).unwrap_or(SECTOR).max(SECTOR);
        Self { image, compress, new, shared, data_below: 0, unit, old: Vec::new(), other: Vec::new() }
    }

    /// Zeros that the image shows below `offset` become data of it.
    pub(super) fn allocate_zeros_below(mut self, offset: u64) -> Self {
        self.data_below = offset;
        self
    }

    pub(super) fn run(&mut self, worker: &mut Worker) -> Result<(), Error> {
        let end = self.image.len();
        let mut mine = Extents::new(self.image);
        let mut theirs = self.new.map(Extents::new);
        let mut at = 0;
        while at < end {
            worker.next_step(self.unit, PIECE)?;
            let piece = self.piece(at, end, &mut mine, theirs.as_mut());
            match piece.and_then(|(piece, action)| Ok((piece, self.bring_up(piece, action)?))) {
                Ok((piece, moved)) => {
                    worker.done(piece.end() - at, moved);
                    at = piece.end();
                }
                Err((operation, error)) => {
                    worker.failed(operation, ByteRange::at(at, 1), error)?;
                }
            }
        }
        Ok(())
    }

    /// The next piece of the disk, and what it needs.
    fn piece(
        &self,
        at: u64,
        end: u64,
        mine: &mut Extents<'_>,
        theirs: Option<&mut Extents<'_>>,
    ) -> Result<(ByteRange, Action), Failure> {
        let found = mine.at(at, end).map_err(|error| (Operation::Read, error))?;
        let rest = ByteRange::new(at, found.range.end());
        if found.in_top() || self.shared.is_some_and(|depth| found.depth >= depth) {
            return Ok((rest, Action::Nothing));
        }
        let old_zero = found.reads_as_zero();
        // Past the end of the new file there are zeros.
        let theirs = theirs.filter(|theirs| at < theirs.device.len());
        let (rest, new_zero) = match theirs {
            None => (rest, true),
            Some(theirs) => {
                let there = theirs.device.len().min(rest.end());
                let other = theirs.at(at, there).map_err(|error| (Operation::Read, error))?;
                (ByteRange::new(at, rest.end().min(other.range.end())), other.reads_as_zero())
            }
        };
        match (old_zero, new_zero) {
            (true, true) => Ok((rest, Action::Nothing)),
            _ => {
                // Pieces end on borders of units.
                let most = (at / self.unit * self.unit).saturating_add(PIECE.max(self.unit));
                let piece = ByteRange::new(at, rest.end().min(most));
                if self.compress.is_none() {
                    return Ok((piece, Action::Compare { old_zero, new_zero }));
                }
                // What is known is not known of the rest of the clusters.
                let whole = piece.align_outward(self.unit).intersect(ByteRange::new(0, end));
                Ok((whole, Action::Compare { old_zero: false, new_zero: false }))
            }
        }
    }

    /// Does it; returns the bytes that were written or zeroed.
    fn bring_up(&mut self, piece: ByteRange, action: Action) -> Result<u64, Failure> {
        let Action::Compare { old_zero, new_zero } = action else { return Ok(0) };
        let read = |error| (Operation::Read, error);
        // A piece has at most PIECE bytes, or a cluster.
        self.old.clear();
        self.old.resize(piece.len() as usize, 0);
        if !old_zero {
            self.image.read_at(&mut self.old, piece.start()).map_err(read)?;
        }
        self.other.clear();
        self.other.resize(piece.len() as usize, 0);
        if let Some(new) = self.new.filter(|_| !new_zero) {
            let there = piece.intersect(ByteRange::new(0, new.len()));
            if !there.is_empty() {
                new.read_at(&mut self.other[..there.len() as usize], there.start()).map_err(read)?;
            }
        }
        let mut moved = 0;
        for (run, change) in changes(&self.old, &self.other, piece.start(), self.unit) {
            let range = ByteRange::at(piece.start() + run.start as u64, run.len() as u64);
            let done = match change {
                Change::Nothing => continue,
                Change::Zero => self.zero(range, &self.old[run]),
                Change::Data => self.write(&self.old[run], range.start()),
            };
            done.map_err(|error| (Operation::Write, error))?;
            moved += range.len();
        }
        Ok(moved)
    }
}

impl Pass<'_> {
    /// Makes `range` zeros of the image; `zeros` are as many.
    fn zero(&self, range: ByteRange, zeros: &[u8]) -> Result<(), BlockError> {
        let data = range.intersect(ByteRange::new(0, self.data_below));
        if !data.is_empty() {
            self.write(&zeros[..data.len() as usize], data.start())?;
        }
        let rest = ByteRange::new(range.start() + data.len(), range.end());
        if rest.is_empty() {
            return Ok(());
        }
        self.image.write_zeroes(rest, ZeroFlags::MAY_UNMAP | ZeroFlags::EXPLICIT)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), BlockError> {
        match self.compress {
            Some(compress) => compress.write_at(bytes, offset, WriteFlags::NONE),
            None => self.image.write_at(bytes, offset, WriteFlags::NONE),
        }
    }
}

/// What a piece needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Nothing,
    /// At least one side must be read.
    Compare {
        old_zero: bool,
        new_zero: bool,
    },
}

/// What a unit needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Nothing,
    Zero,
    Data,
}

/// The runs of `old`, which begins at `start`, by what they need to read the same over `new`: units that need
/// the same are one.
fn changes(old: &[u8], new: &[u8], start: u64, unit: u64) -> Vec<(Range<usize>, Change)> {
    let mut runs: Vec<(Range<usize>, Change)> = Vec::new();
    for part in ByteRange::at(start, old.len() as u64).pieces(unit) {
        let at = (part.start() - start) as usize..(part.end() - start) as usize;
        let change = match &old[at.clone()] {
            same if *same == new[at.clone()] => Change::Nothing,
            zeros if zero::is_zero(zeros) => Change::Zero,
            _ => Change::Data,
        };
        match runs.last_mut() {
            Some((last, same)) if *same == change => last.end = at.end,
            _ => runs.push((at, change)),
        }
    }
    runs
}

/// The extents of a disk, fetched in batches; offsets only grow.
struct Extents<'a> {
    device: &'a dyn BlockDevice,
    fetched: VecDeque<Extent>,
}

impl<'a> Extents<'a> {
    fn new(device: &'a dyn BlockDevice) -> Self {
        Self { device, fetched: VecDeque::new() }
    }

    /// The extent that holds `at`, from there on and before `end`.
    fn at(&mut self, at: u64, end: u64) -> Result<Extent, BlockError> {
        while self.fetched.front().is_some_and(|extent| extent.range.end() <= at) {
            self.fetched.pop_front();
        }
        let rest = ByteRange::new(at, end);
        if self.fetched.is_empty() {
            let fetched = &mut self.fetched;
            let mut budget = QueryBudget::new();
            self.device.extents(ByteRange::new(at, self.device.len()), &mut |extent| {
                let spent = budget.spend(&extent);
                fetched.push_back(extent);
                if fetched.len() < BATCH { spent } else { Visit::Break(()) }
            })?;
        }
        let clipped = self.fetched.front().and_then(|extent| extent.clip(rest));
        // A device that reports nothing has broken its contract; reading tells the truth, and what is written
        // into the image is what it shows.
        Ok(clipped.unwrap_or_else(|| Extent::new(rest, ExtentKind::Data).at_depth(1)))
    }
}
