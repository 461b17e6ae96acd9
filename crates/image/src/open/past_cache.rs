//! Opening an image to see what its medium holds: for callers that verify what they have written.

use super::OpenOptions;

impl OpenOptions {
    /// Reads of all files of the chain go past the host's page cache
    /// ([`FileStorage::read_past_cache`](blockmirror_file::FileStorage::read_past_cache)), whatever the cache
    /// mode; writes do as it says. Exports of NBD servers have no page cache here.
    #[must_use]
    pub fn past_cache(mut self, past: bool) -> Self {
        self.past_cache = past;
        self
    }

    /// For an image whose files are open for writing: it is not written through what is opened so.
    pub(crate) fn read_back(mut self) -> Self {
        self.read_back = true;
        self.compress = false;
        self
    }
}
