//! Holes and data of a file, from `SEEK_DATA` and `SEEK_HOLE`.
//!
//! The file may change while it is being asked about: every answer is clipped to what was asked, each step
//! moves forward, and anything the kernel will not tell counts as data.

use std::fs::File;

use blockmirror_block::{ByteRange, Error, Result, StorageExtent, Visit};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Where the next data at or after `at` begins.
enum Next {
    At(u64),
    /// No data up to the end of the file.
    None,
    /// The file cannot tell.
    Unknown,
}

fn next(file: &File, from: SeekFrom) -> Result<Next> {
    match crate::io::retry(|| seek(file, from)) {
        Ok(at) => Ok(Next::At(at)),
        Err(Errno::NXIO) => Ok(Next::None),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE) => Ok(Next::Unknown),
        Err(e) => Err(Error::io("find holes", e.into())),
    }
}

/// Visits the runs of `range`, which ends at or before the end of the file, in order and without gaps.
/// Neighbouring runs differ.
pub(crate) fn visit(
    file: &File,
    range: ByteRange,
    visit: &mut dyn FnMut(StorageExtent) -> Visit,
) -> Result<()> {
    let end = range.end();
    let mut at = range.start();
    // A run is handed out only once the next one is known to differ.
    let mut pending: Option<StorageExtent> = None;
    let mut push = |run: StorageExtent| -> Visit {
        if run.range.is_empty() {
            return Visit::Continue(());
        }
        match &mut pending {
            Some(last) if last.hole == run.hole => {
                last.range = ByteRange::new(last.range.start(), run.range.end());
                Visit::Continue(())
            }
            last => match last.replace(run) {
                Some(done) => visit(done),
                None => Visit::Continue(()),
            },
        }
    };
    while at < end {
        let data = match next(file, SeekFrom::Data(at))? {
            Next::At(data) => data.clamp(at, end),
            Next::None => end,
            Next::Unknown => at,
        };
        if push(StorageExtent { range: ByteRange::new(at, data), hole: true }).is_break() {
            return Ok(());
        }
        if data >= end {
            break;
        }
        let hole = match next(file, SeekFrom::Hole(data))? {
            // No progress means that the file changed in between: call the rest data.
            Next::At(hole) if hole > data => hole.min(end),
            Next::At(_) | Next::Unknown | Next::None => end,
        };
        if push(StorageExtent { range: ByteRange::new(data, hole), hole: false }).is_break() {
            return Ok(());
        }
        at = hole;
    }
    if let Some(last) = pending {
        let _ = visit(last);
    }
    Ok(())
}
