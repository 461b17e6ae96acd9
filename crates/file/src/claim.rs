//! Why a file or block device is not written: it is in use as a disk.
//!
//! Called by [`crate::open`] and [`crate::storage`] when an open with a claim was refused, or has to be.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::io::Errno;

use crate::below::Sysfs;
use crate::holders::{self, FileHolder, LoopUse};
use crate::id::FileId;

/// The error for the block device `path`, which is mounted or held.
pub(crate) fn refused(path: &Path, e: std::io::Error) -> Error {
    let holder =
        fs::metadata(path).ok().and_then(|meta| holders::claimer_of(&Sysfs::of_host().device(meta.rdev())));
    let holder = holder.unwrap_or_else(|| "it is claimed by another device or program".to_owned());
    Error::new(ErrorKind::Locked, "open")
        .because(format!("the block device is in use: {holder}"))
        .caused_by(e)
}

/// Fails while a loop device on the file or device is used, or may be: it claims nothing that it stands on.
pub(crate) fn check_loops(file: FileId) -> Result<()> {
    match holders::loop_device(file) {
        None | Some(FileHolder::Loop { usage: LoopUse::Free, .. }) => Ok(()),
        Some(holder) => Err(Error::new(ErrorKind::Locked, "open")
            .because(holder.to_string())
            .caused_by(std::io::Error::from(Errno::BUSY))),
    }
}
