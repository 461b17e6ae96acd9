//! Where two disks do not hold the same bytes: all of it, where `compare` stops at the first.
//!
//! Called by commands that list what differs, and by the verification of a copy. The extents of both disks
//! are walked side by side, so what both sides know to be zero is not read.

mod side;

use blockmirror_block::{BlockDevice, ByteRange, Error, Visit, zero};

use self::side::Side;

const BUFFER: usize = 1 << 20;
const SECTOR: u64 = 512;

/// Visits the ranges of `within` in which `a` and `b` differ, in order, in sectors of 512 bytes; neighbours
/// are visited as one. Where a disk ends zeros follow. `progress` gets the offset up to which all is
/// compared, and says whether to go on; `false` if it stopped.
///
/// ```
/// use blockmirror_block::testing::MemoryDisk;
/// use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags};
/// use blockmirror_image::differences;
///
/// let (a, b) = (MemoryDisk::new(1 << 20), MemoryDisk::new(1 << 20));
/// b.write_at(&[1; 600], 4096, WriteFlags::NONE)?;
/// let mut found = Vec::new();
/// let whole = ByteRange::new(0, a.len());
/// differences(&a, &b, whole, &mut |_| Visit::Continue(()), &mut |range| found.push(range))?;
/// assert_eq!(found, [ByteRange::at(4096, 1024)]);
/// # Ok::<(), blockmirror_block::Error>(())
/// ```
///
/// # Errors
/// What the devices report.
pub fn differences(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    within: ByteRange,
    progress: &mut dyn FnMut(u64) -> Visit,
    found: &mut dyn FnMut(ByteRange),
) -> Result<bool, Error> {
    let mut pending: Option<ByteRange> = None;
    let all = walk(a, b, within, progress, &mut |range| {
        match &mut pending {
            Some(last) if last.end() >= range.start() => *last = ByteRange::new(last.start(), range.end()),
            last => {
                if let Some(done) = last.replace(range) {
                    found(done.intersect(within));
                }
            }
        }
        Visit::Continue(())
    });
    // What was found before a read that fails is a difference all the same.
    if let Some(last) = pending {
        found(last.intersect(within));
    }
    Ok(all?.is_continue())
}

/// Walks through `within`; breaks if `progress` did. `on` gets whole sectors, the last of the disk excepted.
fn walk(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    within: ByteRange,
    progress: &mut dyn FnMut(u64) -> Visit,
    on: &mut dyn FnMut(ByteRange) -> Visit,
) -> Result<Visit, Error> {
    let mut left = Side::new(a, within.end());
    let mut right = Side::new(b, within.end());
    let mut at = within.start();
    while at < within.end() {
        let (x, y) = (left.extent_at(at)?, right.extent_at(at)?);
        let run = ByteRange::new(at, x.end.min(y.end)).intersect(within);
        at = run.end();
        if x.is_zero() && y.is_zero() {
            if progress(at).is_break() {
                return Ok(Visit::Break(()));
            }
            continue;
        }
        for piece in run.pieces(BUFFER as u64) {
            let visit = match (x.is_zero(), y.is_zero()) {
                (false, true) => unequal(piece, left.read(piece)?, None, on),
                (true, false) => unequal(piece, right.read(piece)?, None, on),
                _ => unequal(piece, left.read(piece)?, Some(right.read(piece)?), on),
            };
            if visit.is_break() || progress(piece.end()).is_break() {
                return Ok(Visit::Break(()));
            }
        }
    }
    Ok(Visit::Continue(()))
}

/// Reports the sectors of `piece` in which `x` is not `y`, or is not zero.
fn unequal(piece: ByteRange, x: &[u8], y: Option<&[u8]>, on: &mut dyn FnMut(ByteRange) -> Visit) -> Visit {
    let is_equal = |from: usize, to: usize| match y {
        Some(y) => x[from..to] == y[from..to],
        None => zero::is_zero(&x[from..to]),
    };
    if is_equal(0, x.len()) {
        return Visit::Continue(());
    }
    let mut run: Option<ByteRange> = None;
    let mut at = piece.start();
    while at < piece.end() {
        let end = (at - at % SECTOR).saturating_add(SECTOR).min(piece.end());
        if is_equal((at - piece.start()) as usize, (end - piece.start()) as usize) {
            if let Some(done) = run.take() {
                on(done)?;
            }
        } else {
            let start = run.map_or(at - at % SECTOR, ByteRange::start);
            run = Some(ByteRange::new(start, end));
        }
        at = end;
    }
    match run {
        Some(done) => on(done),
        None => Visit::Continue(()),
    }
}
