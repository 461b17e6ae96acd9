//! How a disk is hashed.

use std::num::NonZeroUsize;
use std::thread;

/// How a disk is hashed. What comes out does not depend on it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HashOptions {
    pub(crate) threads: NonZeroUsize,
}

impl HashOptions {
    /// As many threads as the machine runs at once.
    pub fn new() -> Self {
        Self { threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN) }
    }

    /// Threads that read and hash, of which at most 64 are used. Each has a buffer of 1 MiB.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = threads;
        self
    }
}

impl Default for HashOptions {
    fn default() -> Self {
        Self::new()
    }
}
