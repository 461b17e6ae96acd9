//! Whose an open file is, and how its name lasts: for files that say what another file holds.
//!
//! Asked by callers that believe what they read in a file whose name the user has chosen.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blockmirror_block::{Error, Result, Storage};
use rustix::process::geteuid;

use crate::location::Location;
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

    /// Makes the name durable that it was opened by, `path`.
    ///
    /// # Errors
    /// Any; the name may not survive a crash.
    pub fn sync_name(&self, path: &Path) -> Result<()> {
        let synced = Location::find(path)
            .and_then(|(location, _)| location.sync(self.file()).map_err(|e| Error::io("sync directory", e)));
        synced.map_err(|e| e.or_in_file(&path.display().to_string().into()))
    }
}
