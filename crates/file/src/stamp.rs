//! What shows whether a file is the same and has not been written since: identity and times.
//!
//! Taken of what a copy reads, and compared by a later one that goes on.

use std::fmt;
use std::os::unix::fs::MetadataExt;

use blockmirror_block::{Error, Result, Storage};
use rustix::fs::fstatvfs;

use crate::storage::FileStorage;

/// Identity and times of a regular file, which change if another file takes its place, or when it is written.
///
/// The file system is named by its own number. Of ext4 and btrfs that stays the same when it is mounted
/// again; of XFS it is the device number, which may be another after a reboot: then the file counts as
/// another one. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    filesystem: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileStamp {
    /// The same for a file that may be written meanwhile: without length and times.
    #[must_use]
    pub fn identity(self) -> Self {
        Self { len: 0, modified: (0, 0), changed: (0, 0), ..self }
    }
}

/// One line, the same for the same stamp.
impl fmt::Display for FileStamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { filesystem, inode, len, modified, changed } = self;
        write!(f, "fs {filesystem:x} inode {inode} length {len}")?;
        write!(f, " mtime {}.{:09} ctime {}.{:09}", modified.0, modified.1, changed.0, changed.1)
    }
}

impl FileStorage {
    /// The stamp of the file as it is now; `None` of a block device, which has none.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn stamp(&self) -> Result<Option<FileStamp>> {
        if self.id().inode().is_none() {
            return Ok(None);
        }
        let failed = |e| Error::io("look up", e).in_file(self.name());
        let meta = self.file().metadata().map_err(failed)?;
        let filesystem = fstatvfs(self.file()).map_err(|e| failed(e.into()))?.f_fsid;
        Ok(Some(FileStamp {
            filesystem,
            inode: meta.ino(),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }))
    }
}
