//! `compare`: whether two disks hold the same bytes.
//!
//! The extents of both are walked side by side, so what both sides know to be zero is not read. Disks of
//! different length are equal if the rest of the longer one is zero, unless the comparison is strict.

use std::collections::VecDeque;

use blockmirror_block::{BlockDevice, ByteRange, Error, Extent, ExtentKind, QueryBudget, Visit, zero};
use thiserror::Error as ThisError;

/// What two disks differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// Strict only: the lengths.
    Length,
    /// Strict only: whether the bytes at this offset are data, zero or unallocated, and how they are stored.
    Status {
        /// Where.
        offset: u64,
    },
    /// The bytes in the 512-byte sector at this offset.
    Content {
        /// Start of the sector.
        offset: u64,
    },
}

/// Which of the two disks failed, and in what.
#[derive(Debug, ThisError)]
#[error("{cause}")]
#[non_exhaustive]
pub struct CompareError {
    /// What failed.
    pub cause: Error,
    /// It is the second disk.
    pub is_second: bool,
    /// It was read; otherwise it was asked for its extents.
    pub is_read: bool,
    /// Where that began.
    pub offset: u64,
}

impl From<CompareError> for Error {
    fn from(error: CompareError) -> Self {
        error.cause
    }
}

/// How much is compared, and how.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct CompareOptions {
    /// Lengths and allocation must be the same, too.
    pub strict: bool,
}

impl CompareOptions {
    /// Whether lengths and allocation must be the same, too. Default: false.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }
}

const BUFFER: usize = 1 << 20;
const SECTOR: u64 = 512;
/// Extents fetched at once: bounds memory however fragmented an image is.
const BATCH: usize = 4096;

/// Compares `a` with `b`; `progress` hears how many bytes are done and says whether to go on.
///
/// Returns the first difference, or `None` if there is none (or `progress` stopped it).
///
/// # Errors
/// What the devices report, and which of them.
pub fn compare(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    options: CompareOptions,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> Result<Option<Difference>, CompareError> {
    if options.strict && a.len() != b.len() {
        return Ok(Some(Difference::Length));
    }
    let common = a.len().min(b.len());
    let mut left = Side::new(a, false, ByteRange::new(0, common));
    let mut right = Side::new(b, true, ByteRange::new(0, common));
    let mut at = 0;
    while at < common {
        let (x, y) = (left.extent_at(at)?, right.extent_at(at)?);
        let run = ByteRange::new(at, x.end.min(y.end));
        if options.strict && x.status() != y.status() {
            return Ok(Some(Difference::Status { offset: at }));
        }
        let (x_zero, y_zero) = (x.kind != ExtentKind::Data, y.kind != ExtentKind::Data);
        if !(x_zero && y_zero) {
            for piece in run.pieces(BUFFER as u64) {
                let offset = match (x_zero, y_zero) {
                    (false, true) => left.first_not_zero(piece)?,
                    (true, false) => right.first_not_zero(piece)?,
                    _ => first_difference(left.read(piece)?, right.read(piece)?, piece),
                };
                if let Some(offset) = offset {
                    return Ok(Some(Difference::Content { offset }));
                }
                if progress(piece.end()).is_break() {
                    return Ok(None);
                }
            }
        } else if progress(run.end()).is_break() {
            return Ok(None);
        }
        at = run.end();
    }
    let (longer, is_second) = if a.len() > b.len() { (a, false) } else { (b, true) };
    let mut rest = Side::new(longer, is_second, ByteRange::new(common, longer.len()));
    while at < longer.len() {
        let extent = rest.extent_at(at)?;
        let run = ByteRange::new(at, extent.end);
        if extent.kind == ExtentKind::Data {
            for piece in run.pieces(BUFFER as u64) {
                if let Some(offset) = rest.first_not_zero(piece)? {
                    return Ok(Some(Difference::Content { offset }));
                }
                if progress(piece.end()).is_break() {
                    return Ok(None);
                }
            }
        } else if progress(run.end()).is_break() {
            return Ok(None);
        }
        at = run.end();
    }
    Ok(None)
}

fn first_difference(x: &[u8], y: &[u8], piece: ByteRange) -> Option<u64> {
    if x == y {
        return None;
    }
    let first = x.iter().zip(y).position(|(x, y)| x != y)?;
    Some(sector_of(piece.start() + first as u64))
}

fn sector_of(offset: u64) -> u64 {
    offset - offset % SECTOR
}

/// What is known about a disk from some offset on.
#[derive(Clone, Copy)]
struct Known {
    end: u64,
    kind: ExtentKind,
    /// What a strict comparison compares besides: whether bytes are mapped that are a hole below, stored
    /// compressed, and stored as they are.
    stored: (bool, bool, bool),
}

impl Known {
    fn status(self) -> (ExtentKind, (bool, bool, bool)) {
        (self.kind, self.stored)
    }
}

/// One of the two disks: its extents, fetched in batches, and a buffer.
struct Side<'a> {
    device: &'a dyn BlockDevice,
    is_second: bool,
    range: ByteRange,
    fetched: VecDeque<Extent>,
    buffer: Vec<u8>,
}

impl<'a> Side<'a> {
    fn new(device: &'a dyn BlockDevice, is_second: bool, range: ByteRange) -> Self {
        Self { device, is_second, range, fetched: VecDeque::new(), buffer: Vec::new() }
    }

    fn failed(&self, is_read: bool, offset: u64, cause: Error) -> CompareError {
        CompareError { cause, is_second: self.is_second, is_read, offset }
    }

    /// The extent that holds `at`. Offsets only grow from call to call.
    fn extent_at(&mut self, at: u64) -> Result<Known, CompareError> {
        while self.fetched.front().is_some_and(|extent| extent.range.end() <= at) {
            self.fetched.pop_front();
        }
        if self.fetched.is_empty() {
            let fetched = &mut self.fetched;
            let mut budget = QueryBudget::new();
            let asked = self.device.extents(ByteRange::new(at, self.range.end()), &mut |extent| {
                let spent = budget.spend(&extent);
                fetched.push_back(extent);
                if fetched.len() < BATCH { spent } else { Visit::Break(()) }
            });
            asked.map_err(|cause| self.failed(false, at, cause))?;
        }
        // A device that reports nothing has broken its contract; reading tells the truth.
        let nothing = Known { end: self.range.end(), kind: ExtentKind::Data, stored: (false, false, false) };
        Ok(self.fetched.front().map_or(nothing, |extent| Known {
            end: extent.range.end(),
            kind: extent.kind,
            stored: (extent.mapped_hole, extent.compressed, extent.host.is_some()),
        }))
    }

    fn read(&mut self, piece: ByteRange) -> Result<&[u8], CompareError> {
        // A piece is at most BUFFER bytes.
        self.buffer.resize(piece.len() as usize, 0);
        let read = self.device.read_at(&mut self.buffer, piece.start());
        read.map_err(|cause| self.failed(true, piece.start(), cause))?;
        Ok(&self.buffer)
    }

    fn first_not_zero(&mut self, piece: ByteRange) -> Result<Option<u64>, CompareError> {
        let bytes = self.read(piece)?;
        if zero::is_zero(bytes) {
            return Ok(None);
        }
        let first = bytes.iter().position(|b| *b != 0);
        Ok(first.map(|first| sector_of(piece.start() + first as u64)))
    }
}
