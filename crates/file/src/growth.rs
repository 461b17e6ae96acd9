//! Keeps changes of a file's length from cutting off each other's data.
//!
//! `ftruncate` makes a file longer or shorter, whichever it turns out to be: "look at the length, then set
//! it" would cut off what a write appended in between. So writes past the end that is known hold a lock
//! shared, and changes of length hold it exclusively. Writes below it, nearly all, take no lock.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::{ByteRange, Error, RangeLock, Result};

/// The one range that the lock is about.
const WHOLE: ByteRange = ByteRange::new(0, u64::MAX);

/// Orders what may change the length of one open file.
#[derive(Debug)]
pub(crate) struct Growth {
    /// The file is at least this long, as far as this process changes it.
    known_len: AtomicU64,
    order: RangeLock,
}

impl Growth {
    /// For a file of `len` bytes.
    pub(crate) fn new(len: u64) -> Self {
        Self { known_len: AtomicU64::new(len), order: RangeLock::new() }
    }

    /// Runs `write`, which fills `range` and may let the file grow up to its end.
    pub(crate) fn while_writing(&self, range: ByteRange, write: impl FnOnce() -> Result<()>) -> Result<()> {
        // Nothing grows by an empty write, wherever it lies.
        if range.is_empty() || range.end() <= self.known_len.load(Ordering::Acquire) {
            return write();
        }
        let _order = self.order.lock_shared(WHOLE)?;
        write()?;
        self.known_len.fetch_max(range.end(), Ordering::AcqRel);
        Ok(())
    }

    /// Makes the file at least `end` bytes long.
    pub(crate) fn grow_to(&self, file: &File, end: u64, operation: &'static str) -> Result<()> {
        let failed = |e: io::Error| Error::io(operation, e);
        let _order = self.order.lock_exclusive(WHOLE)?;
        if file.metadata().map_err(failed)?.len() < end {
            file.set_len(end).map_err(failed)?;
        }
        self.known_len.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// Makes the file `len` bytes long.
    pub(crate) fn set_len(&self, file: &File, len: u64) -> Result<()> {
        let _order = self.order.lock_exclusive(WHOLE)?;
        // Lowered first: a write that still believed the old length would skip the lock.
        self.known_len.fetch_min(len, Ordering::AcqRel);
        file.set_len(len).map_err(|e| Error::io("set length", e))?;
        self.known_len.store(len, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A write between the two steps of a change of length must not believe the old length. Here the second
    /// step fails, so what the first has done shows.
    #[test]
    fn the_known_length_is_lowered_before_the_file_becomes_shorter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [1; 1000]).unwrap();
        let file = File::open(&path).unwrap();
        let growth = Growth::new(1000);
        growth.set_len(&file, 100).unwrap_err();
        assert_eq!(growth.known_len.load(Ordering::Acquire), 100);
        growth.set_len(&file, 2000).unwrap_err();
        assert_eq!(growth.known_len.load(Ordering::Acquire), 100, "it did not become longer");
    }
}
