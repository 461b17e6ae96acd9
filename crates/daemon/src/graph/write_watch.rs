//! What a log of a live mirror needs of the nodes that its disks consist of, beside their counters.
//!
//! [`NodeDevice`](super::NodeDevice) has it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct WriteWatch {
    /// It was written by means that are not counted.
    rewritten: AtomicBool,
    /// Logs whose rules need its flushes.
    logs: AtomicUsize,
}

impl WriteWatch {
    /// It is, or was, written by means that are not counted.
    pub(crate) fn note_rewritten(&self) {
        self.rewritten.store(true, Ordering::Release);
    }

    /// Whether [`note_rewritten`](Self::note_rewritten) was called.
    pub(crate) fn was_rewritten(&self) -> bool {
        self.rewritten.load(Ordering::Acquire)
    }

    /// A log needs its flushes, from now on or no longer.
    pub(crate) fn log_comes(&self, comes: bool) {
        match comes {
            true => self.logs.fetch_add(1, Ordering::AcqRel),
            false => self.logs.fetch_sub(1, Ordering::AcqRel),
        };
    }

    /// Whether a log needs its flushes.
    pub(crate) fn has_log(&self) -> bool {
        self.logs.load(Ordering::Acquire) > 0
    }
}
