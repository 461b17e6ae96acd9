//! Opening: what the caller asks for, what kind of file it turns out to be, and the facts that hold for as
//! long as it is open.
//!
//! Only regular files and block devices are opened. What is there is found first and checked, and then that
//! file is opened ([`PathHandle`]), so that opening does not set off what a tape drive or a FIFO does when
//! opened.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::Result;
use blockmirror_image_lock::{ImageLock, Permissions};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::FileStorage;
use crate::claim;
use crate::direct::{self, Direct};
use crate::flushes::Flushes;
use crate::handle::PathHandle;
use crate::id::FileKind;

/// How an open file is protected against other users of the same image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LockMode {
    /// Readers keep writers out, a writer keeps readers and writers out.
    #[default]
    Exclusive,
    /// Says what it does, and bears with whatever others do (`-U`); goes on without where that cannot be
    /// said.
    Shared,
    /// No lock at all.
    Off,
}

/// How a file is to be opened. The default: an existing file, read-only, locked.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileOptions {
    pub(crate) writable: bool,
    pub(crate) create_new: bool,
    pub(crate) direct: bool,
    pub(crate) claim: bool,
    pub(crate) no_sync: bool,
    pub(crate) lock: LockMode,
}

impl FileOptions {
    /// An existing file, read-only, locked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens for reading and writing.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable;
        self
    }

    /// Creates the file, empty; it must not exist. Implies writable.
    #[must_use]
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self
    }

    /// Bypasses the host's page cache (`O_DIRECT`).
    #[must_use]
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// Claims a block device: opening fails while it is mounted, or claimed by another device or program, and
    /// they cannot claim it while it is open. A claim is held once: opening the same device with a second one
    /// fails too. A regular file is not claimed. Opening either fails while a loop device on it is used, or
    /// may be.
    #[must_use]
    pub fn claim(mut self, claim: bool) -> Self {
        self.claim = claim;
        self
    }

    /// Flushes succeed and do nothing: what is written becomes durable when the system writes it back.
    #[must_use]
    pub fn no_sync(mut self, no_sync: bool) -> Self {
        self.no_sync = no_sync;
        self
    }

    /// How to lock the image.
    #[must_use]
    pub fn lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// Opens `path`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::AlreadyExists`] and [`ErrorKind::PermissionDenied`] from the
    /// system; [`ErrorKind::Locked`] if another user of the image stands in the way;
    /// [`ErrorKind::InvalidInput`] for anything that is neither a regular file nor a block device.
    ///
    /// [`ErrorKind::NotFound`]: blockmirror_block::ErrorKind::NotFound
    /// [`ErrorKind::AlreadyExists`]: blockmirror_block::ErrorKind::AlreadyExists
    /// [`ErrorKind::PermissionDenied`]: blockmirror_block::ErrorKind::PermissionDenied
    /// [`ErrorKind::Locked`]: blockmirror_block::ErrorKind::Locked
    /// [`ErrorKind::InvalidInput`]: blockmirror_block::ErrorKind::InvalidInput
    pub fn open(&self, path: impl AsRef<Path>) -> Result<FileStorage> {
        let path = path.as_ref();
        let name: Arc<str> = path.display().to_string().into();
        self.open_named(path, &name, 0o666).map_err(|e| e.or_in_file(&name))
    }

    /// Opens the file that `handle` is of, calling it `shown` in messages: for a caller that decides about
    /// files before they are opened, and wants the user to read the name that the user knows.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_handle(&self, handle: &PathHandle, shown: impl AsRef<Path>) -> Result<FileStorage> {
        let path = shown.as_ref();
        let name: Arc<str> = path.display().to_string().into();
        self.open_found(handle, path, &name).map_err(|e| e.or_in_file(&name))
    }

    /// Opens `path` under the name `name`; a new file gets `mode`, less the umask.
    pub(crate) fn open_named(&self, path: &Path, name: &Arc<str>, mode: u32) -> Result<FileStorage> {
        if !self.create_new {
            return self.open_found(&PathHandle::to_open(path)?, path, name);
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags((self.flags() | OFlags::NOCTTY).bits().cast_signed())
            .open(path)
            .map_err(|e| direct::explain(e, self.direct, "create"))?;
        self.adopt(file, path, name)
    }

    /// Opens what `handle` is of under the name `name`.
    pub(crate) fn open_found(
        &self,
        handle: &PathHandle,
        path: &Path,
        name: &Arc<str>,
    ) -> Result<FileStorage> {
        let kind = handle.check_kind()?;
        let claim = if self.claim && kind == FileKind::Block { OFlags::EXCL } else { OFlags::empty() };
        if let Some(id) = handle.id().filter(|_| self.claim) {
            claim::check_loops(id)?;
        }
        let file = handle.open(self.writable, self.flags() | claim).map_err(|e| match e.raw_os_error() {
            Some(errno) if errno == Errno::BUSY.raw_os_error() => claim::refused(path, e),
            _ => direct::explain(e, self.direct, "open"),
        })?;
        self.adopt(file, path, name)
    }

    /// Flags for opening a file.
    pub(crate) fn flags(&self) -> OFlags {
        if self.direct { OFlags::DIRECT } else { OFlags::empty() }
    }

    /// Makes a storage of `file`, which has been opened as these options say; `path` is for messages about
    /// its lock.
    pub(crate) fn adopt(&self, file: File, path: &Path, name: &Arc<str>) -> Result<FileStorage> {
        let writable = self.writable || self.create_new;
        let lock = lock(&file, path, self.lock, writable)?;
        let direct = if self.direct { Some(Direct::new(&file, writable)?) } else { None };
        let flushes = if self.no_sync { Flushes::that_do_nothing() } else { Flushes::default() };
        Ok(FileStorage::assemble(file, Arc::clone(name), writable, lock, direct)?.with_flushes(flushes))
    }
}

/// Locks `file` as `mode` says, for a reader or a writer.
pub(crate) fn lock(file: &File, path: &Path, mode: LockMode, writable: bool) -> Result<Option<ImageLock>> {
    let unshared = match mode {
        LockMode::Off => return Ok(None),
        LockMode::Shared => Permissions::NONE,
        LockMode::Exclusive => Permissions::CHANGE,
    };
    let wanted = if writable { Permissions::READ_WRITE } else { Permissions::READ };
    let lock = ImageLock::acquire(file, path, wanted, unshared);
    if mode == LockMode::Shared { Ok(lock.ok()) } else { Ok(Some(lock?)) }
}
