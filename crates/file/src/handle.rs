//! Files that are found and not yet opened: `O_PATH` descriptors.
//!
//! A caller that decides whether a file may be opened decides about the handle and opens the handle, never
//! the name a second time: a name may lead elsewhere by then. Finding a file has no effect on it: a FIFO does
//! not block, a tape does not rewind, a lease is not broken.

use std::ffi::OsStr;
use std::fs::{self, File, FileType, Metadata};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{Error, Result};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::id::{FileId, FileKind, kind_of};

/// How often the kernel is asked again after it has seen a name change while it followed it.
const TRIES: u32 = 128;

/// A file or directory that was found by its name, whatever becomes of the name.
#[derive(Clone, Debug)]
pub struct PathHandle {
    descriptor: Arc<OwnedFd>,
    meta: Metadata,
    /// A name that led to it, for where there is no `/proc`.
    name: PathBuf,
}

impl PathHandle {
    /// Finds what `path` leads to, after all symbolic links. Needs no permission on the file itself.
    ///
    /// # Errors
    /// As for looking a name up.
    pub fn find(path: impl AsRef<Path>) -> std::io::Result<Self> {
        let path = path.as_ref();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let descriptor = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))?;
        Self::new(descriptor, path.to_owned())
    }

    /// Finds `name` in `directory`, which messages call `shown`; `flags` say whether a link is followed.
    pub(crate) fn find_at(
        directory: BorrowedFd<'_>,
        name: &OsStr,
        shown: PathBuf,
        flags: OFlags,
    ) -> std::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | flags;
        let descriptor = retry_on_intr(|| rustix::fs::openat(directory, name, flags, Mode::empty()))?;
        Self::new(descriptor, shown)
    }

    /// What the kernel says about it.
    pub(crate) fn metadata(&self) -> &Metadata {
        &self.meta
    }

    /// Finds the directory entry `name` of this directory.
    ///
    /// # Errors
    /// As for looking a name up.
    pub fn find_in(&self, name: impl AsRef<Path>) -> std::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let name = name.as_ref();
        let descriptor = retry_on_intr(|| rustix::fs::openat(&self.descriptor, name, flags, Mode::empty()))?;
        Self::new(descriptor, self.name.join(name))
    }

    /// Finds `path`, which is relative to this directory, without following any symbolic link and without
    /// leaving the directory. For where [`real_path`](Self::real_path) cannot say where a file lies.
    ///
    /// # Errors
    /// As for looking a name up; `EXDEV` or `ELOOP` if the path would have to be left.
    pub fn find_beneath(&self, path: impl AsRef<Path>) -> std::io::Result<Self> {
        let path = path.as_ref();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        let descriptor = loop {
            let found = rustix::fs::openat2(&self.descriptor, path, flags, Mode::empty(), resolve);
            match found {
                Err(Errno::AGAIN | Errno::INTR) if tries < TRIES => tries += 1,
                found => break found?,
            }
        };
        Self::new(descriptor, self.name.join(path))
    }

    fn new(descriptor: OwnedFd, name: PathBuf) -> std::io::Result<Self> {
        let file = File::from(descriptor);
        let meta = file.metadata()?;
        Ok(Self { descriptor: Arc::new(file.into()), meta, name })
    }

    /// Where it lies, without symbolic links. `None` where there is no `/proc`, or where it lies outside of
    /// what this process can name.
    pub fn real_path(&self) -> Option<PathBuf> {
        fs::read_link(self.magic_link()).ok().filter(|path| path.is_absolute())
    }

    /// Which file it is; `None` if it is neither a regular file nor a block device.
    pub fn id(&self) -> Option<FileId> {
        FileId::of_metadata(&self.meta)
    }

    /// What kind of file it is.
    pub fn file_type(&self) -> FileType {
        self.meta.file_type()
    }

    /// Opens this very file. Its kind has been checked.
    ///
    /// Without `/proc` its name is opened, and what comes out is this file or an error.
    pub(crate) fn open(&self, writable: bool, flags: OFlags) -> std::io::Result<File> {
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        let link = self.magic_link();
        match retry_on_intr(|| rustix::fs::open(&link, flags, Mode::empty())) {
            Err(Errno::NOENT | Errno::NOTDIR) => self.open_by_name(flags),
            opened => Ok(opened?.into()),
        }
    }

    fn open_by_name(&self, flags: OFlags) -> std::io::Result<File> {
        // A FIFO that has taken the name does not block.
        let nonblock = flags | OFlags::NONBLOCK;
        let opened = retry_on_intr(|| rustix::fs::openat(CWD, &self.name, nonblock, Mode::empty()))?;
        let flags = rustix::fs::fcntl_getfl(&opened)?;
        rustix::fs::fcntl_setfl(&opened, flags - OFlags::NONBLOCK)?;
        let file = File::from(opened);
        // The handle keeps the inode in use, so no other file can have its number.
        if self.id().is_some() && FileId::of_metadata(&file.metadata()?) == self.id() {
            return Ok(file);
        }
        Err(std::io::Error::other("the name leads to another file by now"))
    }

    fn magic_link(&self) -> String {
        format!("/proc/self/fd/{}", self.descriptor.as_raw_fd())
    }

    /// Refuses what cannot hold an image.
    pub(crate) fn check_kind(&self) -> Result<FileKind> {
        kind_of(&self.meta)
    }

    /// Finds `path` for opening.
    pub(crate) fn to_open(path: &Path) -> Result<Self> {
        Self::find(path).map_err(|e| Error::io("open", e))
    }
}

impl AsFd for PathHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use blockmirror_block::ErrorKind;

    use super::*;

    fn content(handle: &PathHandle) -> Vec<u8> {
        std::io::read_to_string(handle.open(false, OFlags::empty()).unwrap()).unwrap().into_bytes()
    }

    #[test]
    fn a_handle_stays_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "first").unwrap();
        let handle = PathHandle::find(path("a")).unwrap();
        fs::rename(path("a"), path("b")).unwrap();
        fs::write(path("a"), "second").unwrap();
        assert_eq!(content(&handle), b"first");
        assert_eq!(handle.real_path().unwrap(), fs::canonicalize(path("b")).unwrap());
        assert_eq!(handle.id(), FileId::of(path("b")));
        // Without `/proc` the name is all there is, and it leads to another file.
        assert!(handle.open_by_name(OFlags::RDONLY).is_err());
        fs::rename(path("b"), path("a")).unwrap();
        assert!(handle.open_by_name(OFlags::RDONLY).is_ok());
    }

    #[test]
    fn nothing_is_found_outside_of_a_directory_or_by_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("in/deep")).unwrap();
        for file in ["in/deep/file", "out"] {
            fs::write(path(file), file).unwrap();
        }
        symlink("../out", path("in/link")).unwrap();
        symlink("deep", path("in/shallow")).unwrap();
        let inside = PathHandle::find(path("in")).unwrap();
        assert!(inside.file_type().is_dir() && inside.id().is_none());
        assert_eq!(content(&inside.find_beneath("deep/file").unwrap()), b"in/deep/file");
        for name in ["link", "../out", "shallow/file", "deep/../../out"] {
            assert!(inside.find_beneath(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_fifo_is_found_and_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let handle = PathHandle::find(&path).unwrap();
        assert!(handle.id().is_none());
        assert_eq!(handle.check_kind().unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
