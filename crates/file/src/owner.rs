//! Whose an open file is: for files that say what another file holds.
//!
//! Asked by callers that believe what they read in a file whose name the user has chosen.

use std::os::unix::fs::MetadataExt;

use blockmirror_block::{Error, Result, Storage};
use rustix::process::geteuid;

use crate::storage::FileStorage;

impl FileStorage {
    /// Whether the file belongs to the user of this process, or to root, and has no other name. Otherwise
    /// another user may have made it, and may write what is read here.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn is_own(&self) -> Result<bool> {
        let meta = self.file().metadata().map_err(|e| Error::io("look up", e).in_file(self.name()))?;
        Ok((meta.uid() == geteuid().as_raw() || meta.uid() == 0) && meta.nlink() == 1)
    }
}
