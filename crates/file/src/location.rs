//! Where a name leads: the directory that holds it, open, and the last component.
//!
//! Made by [`crate::target`] and [`crate::new_file`]; everything later (create, rename, remove) goes through that one
//! descriptor, so that a directory which is renamed or replaced meanwhile changes nothing. Symbolic links are followed,
//! also one that leads to a file that does not exist yet. A link of `/proc` is no name but a descriptor.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, RenameFlags, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;

/// As many links as the kernel follows.
const MAX_LINKS: u32 = 40;

/// What has the name.
#[derive(Debug)]
pub(crate) enum Found {
    Nothing,
    /// The file that the path leads to.
    File(Metadata),
    /// A link of `/proc`: to a descriptor, which has no directory.
    Descriptor(Metadata),
}

/// A directory and a name in it.
#[derive(Debug)]
pub(crate) struct Location {
    directory: OwnedFd,
    /// The directory by name, for messages.
    shown: PathBuf,
    name: OsString,
}

impl Location {
    /// Follows `given` to the name that a new file would get.
    pub(crate) fn find(given: &Path) -> Result<(Self, Found)> {
        let failed = |e: io::Error| Error::io("create", e);
        // The kernel judges the links first: it does not follow every link for everyone.
        let meta = match fs::metadata(given) {
            Ok(meta) => Some(meta),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed(e)),
        };
        let mut path = given.to_owned();
        for _ in 0..MAX_LINKS {
            let location = Self::split(&path)?;
            let stat =
                match rustix::fs::statat(&location.directory, &*location.name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => return Ok((location, Found::Nothing)),
                    Err(e) => return Err(failed(e.into())),
                };
            if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                // What is there by now, should it have changed since.
                let meta = meta.map_or_else(|| fs::metadata(&path), Ok).map_err(failed)?;
                return Ok((location, Found::File(meta)));
            }
            let filesystem = rustix::fs::fstatfs(&location.directory).map_err(|e| failed(e.into()))?;
            if filesystem.f_type == PROC_SUPER_MAGIC {
                let meta = meta.ok_or_else(|| Error::new(ErrorKind::NotFound, "create"))?;
                return Ok((location, Found::Descriptor(meta)));
            }
            let link = rustix::fs::readlinkat(&location.directory, &*location.name, Vec::new())
                .map_err(|e| failed(e.into()))?;
            path = location.shown.join(OsStr::from_bytes(link.as_bytes()));
        }
        Err(failed(Errno::LOOP.into()))
    }

    fn split(path: &Path) -> Result<Self> {
        let refuse = |why: &str| Err(Error::new(ErrorKind::InvalidInput, "create").because(why));
        let bytes = path.as_os_str().as_bytes();
        if bytes.ends_with(b"/") || bytes.ends_with(b"/.") {
            return refuse("it names a directory, not a file");
        }
        let Some(name) = path.file_name() else {
            return refuse("it does not name a file");
        };
        let shown = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, &shown, flags, Mode::empty())
            .map_err(|e| Error::io("create", e.into()))?;
        Ok(Self { directory, shown, name: name.to_owned() })
    }

    pub(crate) fn name(&self) -> &OsStr {
        &self.name
    }

    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The path of `name` in the directory, for messages.
    pub(crate) fn beside(&self, name: &OsStr) -> PathBuf {
        if self.shown == Path::new(".") { name.into() } else { self.shown.join(name) }
    }

    /// Opens the file `name` of the directory for reading and writing; links are not followed.
    pub(crate) fn open(&self, name: &OsStr, more: OFlags, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC | more;
        Ok(rustix::fs::openat(&self.directory, name, flags, Mode::from_raw_mode(mode))?.into())
    }

    /// Whether something is mounted on the name. A kernel before 5.8 does not say; then it is not.
    pub(crate) fn is_mount_point(&self) -> bool {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::statx(&self.directory, &*self.name, flags, StatxFlags::BASIC_STATS)
            .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }

    /// Renames `from` to the location's own name; `replace`: whatever has that is replaced.
    pub(crate) fn rename_here(&self, from: &OsStr, replace: bool) -> io::Result<()> {
        let (dir, to) = (&self.directory, &*self.name);
        if replace {
            return Ok(rustix::fs::renameat(dir, from, dir, to)?);
        }
        match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
            // A filesystem without the flag: a link never replaces either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(dir, from, dir, to, AtFlags::empty())?;
                self.remove(from)
            }
            other => Ok(other?),
        }
    }

    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?)
    }

    /// The names in the directory; none if it may not be read.
    pub(crate) fn names(&self) -> Vec<OsString> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(readable) = rustix::fs::openat(&self.directory, ".", flags, Mode::empty()) else {
            return Vec::new();
        };
        let Ok(entries) = rustix::fs::Dir::new(readable) else { return Vec::new() };
        entries.flatten().map(|entry| OsString::from_vec(entry.file_name().to_bytes().to_vec())).collect()
    }

    /// Makes the names of the directory durable; `file` is one of them.
    pub(crate) fn sync(&self, file: &File) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let done = match rustix::fs::openat(&self.directory, ".", flags, Mode::empty()) {
            Ok(directory) => rustix::fs::fsync(directory),
            // A directory that may be written but not read cannot be opened for this: its filesystem can.
            Err(Errno::ACCESS) => rustix::fs::syncfs(file),
            Err(e) => Err(e),
        };
        match done {
            // Some filesystems cannot, and need not.
            Err(Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }
}
