//! The layer that a commit writes to: found on the way down a chain, and opened for writing.
//!
//! Used by [`OpenOptions::commit_base`](crate::OpenOptions::commit_base). What must hold: the file is judged
//! as one that is written to, so that what is allowed for reading only does not count.

use std::path::{Path, PathBuf};

use blockmirror_file::FileId;

use crate::protocol::BackingTarget;
use crate::reference::join_name;

/// Which layer below an image is opened for writing, too.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitBase {
    /// The image's own backing file.
    Backing,
    /// The first layer of the chain that has this name: as it stands in the header above, or as a path to the
    /// same file, seen from the directory of the image above or from the working directory.
    Named(PathBuf),
}

impl CommitBase {
    /// Whether it is what the image `above`, `depth` images above it, calls `name` and `target` is.
    pub(crate) fn is(&self, above: &Path, name: &Path, target: &BackingTarget, depth: usize) -> bool {
        let wanted = match self {
            Self::Backing => return depth == 1,
            Self::Named(wanted) => wanted,
        };
        let file = match target {
            BackingTarget::File(file) | BackingTarget::Blkdebug { image: file, .. } => file.handle.id(),
            BackingTarget::Null => None,
        };
        let leads_there = |path: &Path| file.is_some() && FileId::of(path) == file;
        name == wanted
            || join_name(above, wanted.as_os_str()).is_some_and(|path| leads_there(&path))
            || leads_there(wanted)
    }
}
