//! Failed changes of metadata: whether the disk is in doubt afterwards, and the two steps that decide it, the
//! flush of the image file and a write of its header.
//!
//! Made by whatever writes metadata; `Meta::settle` poisons the image where it must.

use std::sync::atomic::Ordering;

use blockmirror_block::{Error, ErrorKind, Result};

use crate::context::ImageContext;

/// Why a change of metadata did not become durable.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nothing that depends on it was written.
    Write(Error),
    /// What is on disk is not known: a flush, or a write of the header, has failed.
    Doubt(Error),
}

impl Failure {
    /// Whether the change may be tried again.
    pub(crate) fn may_be_tried_again(&self) -> bool {
        matches!(self, Self::Write(error) if error.kind() == ErrorKind::NoSpace)
    }
}

/// Whether a write that failed with `error` may still reach the disk, as one over a network may: a connection
/// that is lost, or dropped, takes no request back. One that was refused does not. Nothing points at new
/// data, or at a new table, until it has been written, so such a failure is the operation's alone; but the
/// place is not used any more while the image is open.
pub(crate) fn may_come_late(error: &Error) -> bool {
    !error.was_refused()
}

/// For writes of metadata other than the header, and for what comes before them.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Write(error)
    }
}

impl ImageContext {
    /// Makes what was written to the image file durable.
    pub(crate) fn barrier(&self) -> Result<(), Failure> {
        self.storage.flush().map_err(Failure::Doubt)?;
        self.progress.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Writes part of the header, durably. All that it points at must be durable.
    pub(crate) fn write_header(&self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.storage.write_at(bytes, at).map_err(Failure::Doubt)?;
        self.barrier()
    }
}
