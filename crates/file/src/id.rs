//! Which file it is, whatever name it was opened by, and which bytes it shares with another.
//!
//! Used by all of the crate, and by callers that must not write what they read. What block devices stand on
//! is [`crate::below`]'s to find out.

use std::fs::{self, File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use blockmirror_block::{Error, ErrorKind, Result};

/// What an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    Block,
}

/// What kind of file `meta` describes, if it is one that can hold an image.
pub(crate) fn kind_of(meta: &Metadata) -> Result<FileKind> {
    let kind = meta.file_type();
    if kind.is_file() {
        return Ok(FileKind::Regular);
    }
    if kind.is_block_device() {
        return Ok(FileKind::Block);
    }
    let what = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a special file"
    };
    Err(Error::new(ErrorKind::InvalidInput, "open")
        .because(format!("it is {what}; only regular files and block devices hold images")))
}

/// Identity of a file, the same by whatever name or link it was opened. Two block device nodes of one device
/// are the same too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    /// `None` for a block device, which `device` names alone.
    inode: Option<u64>,
}

impl FileId {
    /// The file that `path` leads to now, without opening it; `None` if there is none that could hold an
    /// image.
    pub fn of(path: impl AsRef<Path>) -> Option<Self> {
        Self::of_metadata(&fs::metadata(path).ok()?)
    }

    /// The file that is open as `descriptor`; `None` if it could not hold an image.
    pub fn of_open(descriptor: impl AsFd) -> Option<Self> {
        let file = File::from(descriptor.as_fd().try_clone_to_owned().ok()?);
        Self::of_metadata(&file.metadata().ok()?)
    }

    /// The file that `meta` describes; `None` if it could not hold an image.
    pub(crate) fn of_metadata(meta: &Metadata) -> Option<Self> {
        let kind = kind_of(meta).ok()?;
        Some(Self::from_metadata(meta, kind))
    }

    pub(crate) fn from_metadata(meta: &Metadata, kind: FileKind) -> Self {
        match kind {
            FileKind::Regular => Self::of_regular_file(meta.dev(), meta.ino()),
            FileKind::Block => Self::of_block_device(meta.rdev()),
        }
    }

    pub(crate) fn of_regular_file(device: u64, inode: u64) -> Self {
        Self { device, inode: Some(inode) }
    }

    pub(crate) fn of_block_device(device: u64) -> Self {
        Self { device, inode: None }
    }

    /// The number of a block device.
    pub(crate) fn block_device(self) -> Option<u64> {
        self.inode.is_none().then_some(self.device)
    }

    /// The device number: of the block device, or of the filesystem of a regular file.
    pub(crate) fn device(self) -> u64 {
        self.device
    }

    /// The inode of a regular file.
    pub(crate) fn inode(self) -> Option<u64> {
        self.inode
    }
}
