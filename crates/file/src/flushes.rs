//! Flushes of an open file: many flushes, few `fdatasync` calls, and no success after a failure.
//!
//! The kernel reports a lost write to one sync call and forgets it, so after a failure no flush of
//! [`crate::FileStorage`] succeeds any more.

use std::fs::File;
use std::io;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{Error, ErrorKind, GroupCommit, Result};

/// Groups the flushes of one open file.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    group: GroupCommit,
    /// *Guards* the error number of the first failure. *Order*: leaf. *Not under it*: the system call.
    failed: Mutex<Option<i32>>,
    /// Nothing is made durable.
    off: bool,
}

impl Flushes {
    /// Those of a file of which nothing is made durable.
    pub(crate) fn that_do_nothing() -> Self {
        Self { off: true, ..Self::default() }
    }

    /// Whether they do nothing.
    pub(crate) fn are_off(&self) -> bool {
        self.off
    }

    /// Makes everything written before the call durable.
    pub(crate) fn flush(&self, file: &File) -> Result<()> {
        if self.off {
            return Ok(());
        }
        self.flush_with(|| file.sync_data())
    }

    /// Whether a flush has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.lock().is_some()
    }

    /// Flushes may succeed again: what a failed one should have covered is written once more.
    pub(crate) fn reset(&self) {
        *self.failed.lock() = None;
    }

    fn flush_with(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<()> {
        // One run at a time: none begins between a failure and the note of it.
        self.group.join(|| {
            if let Some(errno) = *self.failed.lock() {
                return Err(Error::new(ErrorKind::Poisoned, "flush")
                    .because("an earlier flush failed; data written before it may be lost")
                    .caused_by(io::Error::from_raw_os_error(errno)));
            }
            sync().map_err(|error| {
                let errno = error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error());
                *self.failed.lock() = Some(errno);
                Error::io("flush", error)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failure_no_flush_succeeds() {
        let flushes = Flushes::default();
        flushes.flush_with(|| Ok(())).unwrap();
        let first = flushes.flush_with(|| Err(io::Error::from_raw_os_error(5))).unwrap_err();
        assert_eq!(first.kind(), ErrorKind::Io);
        let later = flushes.flush_with(|| panic!("must not sync again")).unwrap_err();
        assert_eq!(later.kind(), ErrorKind::Poisoned);
    }

    /// Those that wait for a sync that fails must not take a later one for theirs: the kernel would report
    /// success.
    #[test]
    fn a_failure_fails_those_that_arrived_meanwhile() {
        let flushes = Flushes::default();
        std::thread::scope(|s| {
            let mut waiting = Vec::new();
            let first = flushes.flush_with(|| {
                for _ in 0..3 {
                    waiting.push(s.spawn(|| flushes.flush_with(|| Ok(()))));
                }
                Err(io::Error::from_raw_os_error(5))
            });
            assert_eq!(first.unwrap_err().kind(), ErrorKind::Io);
            for thread in waiting {
                assert_eq!(thread.join().unwrap().unwrap_err().kind(), ErrorKind::Poisoned);
            }
        });
    }

    #[test]
    fn after_a_reset_the_file_is_synced_again() {
        let flushes = Flushes::default();
        flushes.flush_with(|| Err(io::Error::from_raw_os_error(28))).unwrap_err();
        assert!(flushes.has_failed());
        flushes.reset();
        assert!(!flushes.has_failed());
        let mut syncs = 0;
        flushes
            .flush_with(|| {
                syncs += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(syncs, 1);
    }
}
