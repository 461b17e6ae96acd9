//! Repairs an image that is marked dirty before it is written: with lazy refcounts, a writer that did not
//! close it may have left refcounts behind that are too low.
//!
//! Called by a writable open. This crate's own writes never leave refcounts that are too low
//! ([`crate::writeback`]), so it does not set the mark itself. A repair that is cut short leaves the mark,
//! and the next open repeats it.

use blockmirror_block::{Storage, Visit, cancel};

use super::{Repair, repair};
use crate::check::CheckObserver;
use crate::error::{Result, WriteRefusal};
use crate::format::header::Header;

/// Ends the repair with its caller.
struct UntilCancelled;

impl CheckObserver for UntilCancelled {
    fn progress(&mut self, _: u64, _: u64) -> Visit {
        if cancel::is_cancelled() { Visit::Break(()) } else { Visit::Continue(()) }
    }
}

/// Repairs the image in `storage`, and returns its header as it is then.
///
/// # Errors
/// [`WriteRefusal::Dirty`] if corruptions are left that a repair does not mend; as for [`repair`].
pub(crate) fn repair_dirty(storage: &dyn Storage) -> Result<Header> {
    let report = repair(storage, Repair::All, &mut UntilCancelled)?;
    let header = Header::read(storage)?;
    if header.is_dirty() {
        let corruptions = report.corruptions + report.check_errors;
        return Err(WriteRefusal::Dirty { corruptions }.into());
    }
    Ok(header)
}
