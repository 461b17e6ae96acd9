//! Where a name leads: the directory that holds it, open, and the last component.
//!
//! Made by [`crate::target`] and [`crate::new_file`]; everything later (create, rename, remove) goes through
//! that one descriptor, so that a directory which is renamed or replaced meanwhile changes nothing. Symbolic
//! links are followed, also one that leads to a file that does not exist yet. A link of `/proc` is no name
//! but a descriptor.
//!
//! What must hold: what is judged (links, owners, the file itself) is an `O_PATH` handle, never a name that
//! is looked up twice; a link of another user in a directory that everyone may write is not followed, as by
//! the kernel's `fs.protected_symlinks`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, PROC_SUPER_MAGIC, RenameFlags, Stat, StatxAttributes, StatxFlags,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;

use crate::handle::PathHandle;

/// As many links as the kernel follows.
const MAX_LINKS: u32 = 40;

/// What has the name.
#[derive(Debug)]
pub(crate) enum Found {
    Nothing,
    /// The file that the path leads to.
    File(PathHandle),
    /// A link of `/proc`: to a descriptor, which has no directory.
    Descriptor(PathHandle),
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
        // The kernel judges the links first: mount flags and security modules may forbid to follow them. What
        // it finds does not count: the name may lead elsewhere when it is followed here.
        match fs::metadata(given) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        let mut location = Self::split(CWD, Path::new("."), given)?;
        for _ in 0..MAX_LINKS {
            let there = match location.handle(OFlags::NOFOLLOW) {
                Ok(there) => there,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((location, Found::Nothing)),
                Err(e) => return Err(failed(e)),
            };
            if !there.file_type().is_symlink() {
                return Ok((location, Found::File(there)));
            }
            let filesystem = rustix::fs::fstatfs(&location.directory).map_err(|e| failed(e.into()))?;
            if filesystem.f_type == PROC_SUPER_MAGIC {
                let descriptor = location.handle(OFlags::empty()).map_err(failed)?;
                return Ok((location, Found::Descriptor(descriptor)));
            }
            if !may_follow(there.metadata(), &location.stat().map_err(failed)?) {
                return Err(Error::new(ErrorKind::PermissionDenied, "create")
                    .because("a link of another user in a sticky directory is not followed"));
            }
            let link = rustix::fs::readlinkat(&there, "", Vec::new()).map_err(|e| failed(e.into()))?;
            let link = Path::new(OsStr::from_bytes(link.as_bytes()));
            location = Self::split(location.directory.as_fd(), &location.shown, link)?;
        }
        Err(failed(Errno::LOOP.into()))
    }

    /// The directory and name of `path`, which is relative to `base`, called `shown`.
    fn split(base: BorrowedFd<'_>, shown: &Path, path: &Path) -> Result<Self> {
        let refuse = |why: &str| Err(Error::new(ErrorKind::InvalidInput, "create").because(why));
        let bytes = path.as_os_str().as_bytes();
        if bytes.ends_with(b"/") || bytes.ends_with(b"/.") {
            return refuse("it names a directory, not a file");
        }
        let Some(name) = path.file_name() else {
            return refuse("it does not name a file");
        };
        let here = Path::new(".");
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let shown = match parent {
            None => shown.to_owned(),
            Some(parent) if shown == here => parent.to_owned(),
            Some(parent) => shown.join(parent),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            retry_on_intr(|| rustix::fs::openat(base, parent.unwrap_or(here), flags, Mode::empty()))
                .map_err(|e| Error::io("create", e.into()))?;
        Ok(Self { directory, shown, name: name.to_owned() })
    }

    /// What has the name, as a handle.
    fn handle(&self, flags: OFlags) -> io::Result<PathHandle> {
        PathHandle::find_at(self.directory.as_fd(), &self.name, self.beside(&self.name), flags)
    }

    /// Owner and mode of the directory.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        Ok(rustix::fs::statat(&self.directory, "", AtFlags::EMPTY_PATH)?)
    }

    /// Fails unless the name still leads to `file`.
    pub(crate) fn check_leads_to(&self, file: &Metadata, operation: &'static str) -> Result<()> {
        let there = rustix::fs::statat(&self.directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| Error::io(operation, e.into()))?;
        if (file.dev(), file.ino()) == (there.st_dev, there.st_ino) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::AlreadyExists, operation)
            .because("another file has taken the name of the one to replace"))
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
        let opened =
            retry_on_intr(|| rustix::fs::openat(&self.directory, name, flags, Mode::from_raw_mode(mode)));
        Ok(opened?.into())
    }

    /// Whether something is mounted on the name. A kernel before 5.8 does not say; then it is not.
    pub(crate) fn is_mount_point(&self) -> bool {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::statx(&self.directory, &*self.name, flags, StatxFlags::BASIC_STATS)
            .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }

    /// Renames `from` to the location's own name. What has that is replaced if it is the file `old`; without
    /// one, nothing has it.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if another file has the name, and keeps it.
    pub(crate) fn rename_here(&self, from: &OsStr, old: Option<&Metadata>) -> Result<()> {
        let (dir, to) = (&self.directory, &*self.name);
        let failed = |e: io::Error| Error::io("rename", e);
        match old {
            Some(old) => self.exchange(from, old),
            None => {
                let rename = || rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE);
                let link = || rustix::fs::linkat(dir, from, dir, to, AtFlags::empty());
                self.take_free_name(from, rename, link).map_err(failed)
            }
        }
    }

    /// Gives `from` the location's own name in place of `old`. Another file may take the name in the last
    /// moment: what comes out of the exchange is looked at, and gets its name back. Where the file system
    /// cannot exchange names, such a file is lost.
    fn exchange(&self, from: &OsStr, old: &Metadata) -> Result<()> {
        let (dir, to) = (&self.directory, &*self.name);
        let failed = |e: io::Error| Error::io("rename", e);
        let exchange = || {
            self.unless_done(from, || rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::EXCHANGE))
        };
        let exchanged = exchange();
        if is_unknown(&exchanged) {
            return self.unless_done(from, || rustix::fs::renameat(dir, from, dir, to)).map_err(failed);
        }
        exchanged.map_err(failed)?;
        if self.is_called(from, old) {
            // The new file has its name. An old one that cannot be removed is found by the next run.
            let _ = self.remove(from);
            return Ok(());
        }
        // Should that fail, the other file stays under the temporary name.
        exchange().map_err(failed)?;
        Err(Error::new(ErrorKind::AlreadyExists, "rename")
            .because("another file has taken the name of the one to replace"))
    }

    /// Gives `from` the location's own name, which is free, by `rename` or, on a file system that does not
    /// know that, by `link`; neither replaces a file. Where both are unknown, a file that takes the name
    /// after the last look at it is lost.
    fn take_free_name(
        &self,
        from: &OsStr,
        rename: impl FnMut() -> rustix::io::Result<()>,
        link: impl FnMut() -> rustix::io::Result<()>,
    ) -> io::Result<()> {
        let renamed = self.unless_done(from, rename);
        if !is_unknown(&renamed) {
            return renamed;
        }
        let linked = self.unless_done(from, link);
        if linked.is_ok() {
            // The file has its name; the temporary one is found by the next run.
            let _ = self.remove(from);
            return Ok(());
        }
        let no_links = linked.as_ref().is_err_and(|e| Errno::from_io_error(e) == Some(Errno::PERM));
        if !no_links && !is_unknown(&linked) {
            return linked;
        }
        match self.identity(&self.name) {
            Ok(_) => Err(Errno::EXIST.into()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (dir, to) = (&self.directory, &*self.name);
                self.unless_done(from, || rustix::fs::renameat(dir, from, dir, to))
            }
            Err(e) => Err(e),
        }
    }

    /// Gives the temporary name `to` to `file`, which has the location's own; true if that was done. Another
    /// file that has the name keeps it.
    pub(crate) fn rename_away(&self, to: &OsStr, file: &Metadata) -> bool {
        if !self.is_called(&self.name, file) {
            return false;
        }
        let (dir, name) = (&self.directory, &*self.name);
        if retry_on_intr(|| rustix::fs::renameat(dir, name, dir, to)).is_err() {
            return false;
        }
        let is_ours = self.is_called(to, file);
        if !is_ours {
            // Should that fail, the other file stays under the temporary name.
            let _ = retry_on_intr(|| rustix::fs::renameat_with(dir, to, dir, name, RenameFlags::NOREPLACE));
        }
        is_ours
    }

    /// Whether `name` of the directory leads to `file`.
    fn is_called(&self, name: &OsStr, file: &Metadata) -> bool {
        self.identity(name).is_ok_and(|found| found == (file.dev(), file.ino()))
    }

    /// Does `call`, which gives the file `from` the location's own name, again when a signal has interrupted
    /// it. A file system behind a network may have done it all the same: then the name leads to the file.
    fn unless_done(&self, from: &OsStr, mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
        let file = self.identity(from)?;
        loop {
            match call() {
                Err(Errno::INTR) if self.identity(&self.name).ok() != Some(file) => {}
                Err(Errno::INTR) => return Ok(()),
                other => return Ok(other?),
            }
        }
    }

    /// Device and inode of what is called `name` in the directory.
    fn identity(&self, name: &OsStr) -> io::Result<(u64, u64)> {
        let stat = retry_on_intr(|| rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW))?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Whether `name` of the directory leads to another file than `file`.
    pub(crate) fn is_called_otherwise(&self, name: &OsStr, file: &Metadata) -> bool {
        self.identity(name).is_ok_and(|found| found != (file.dev(), file.ino()))
    }

    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        let mut interrupted = false;
        loop {
            match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Err(Errno::INTR) => interrupted = true,
                // By the call that was interrupted.
                Err(Errno::NOENT) if interrupted => return Ok(()),
                other => return Ok(other?),
            }
        }
    }

    /// Those names in the directory that `wanted` is true for; none if it may not be read.
    pub(crate) fn names(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<OsString> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(readable) = retry_on_intr(|| rustix::fs::openat(&self.directory, ".", flags, Mode::empty()))
        else {
            return Vec::new();
        };
        let Ok(entries) = rustix::fs::Dir::new(readable) else { return Vec::new() };
        let names = entries.flatten().map(|entry| entry.file_name().to_bytes().to_vec());
        names.filter(|name| wanted(name)).map(OsString::from_vec).collect()
    }

    /// Makes the names of the directory durable; `file` is one of them.
    pub(crate) fn sync(&self, file: &File) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let done = match retry_on_intr(|| rustix::fs::openat(&self.directory, ".", flags, Mode::empty())) {
            Ok(directory) => retry_on_intr(|| rustix::fs::fsync(&directory)),
            // A directory that may be written but not read cannot be opened for this: its filesystem can.
            Err(Errno::ACCESS) => retry_on_intr(|| rustix::fs::syncfs(file)),
            Err(e) => Err(e),
        };
        match done {
            // Some filesystems cannot, and need not.
            Err(Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// Whether the file system does not know such a call.
fn is_unknown(done: &io::Result<()>) -> bool {
    let error = done.as_ref().err().and_then(Errno::from_io_error);
    matches!(error, Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP))
}

/// Whether `link` may be followed, which lies in `directory`: the rule of `fs.protected_symlinks`, whether or
/// not that is switched on.
fn may_follow(link: &Metadata, directory: &Stat) -> bool {
    let everyones = Mode::SVTX | Mode::WOTH;
    let is_everyones = Mode::from_raw_mode(directory.st_mode).contains(everyones);
    !is_everyones || link.uid() == geteuid().as_raw() || link.uid() == directory.st_uid
}

#[cfg(test)]
mod tests {
    use blockmirror_testing::skip_unsupported;

    use super::*;

    /// An interrupted rename failed the whole copy; one that had happened all the same would have failed when
    /// it was repeated.
    #[test]
    fn an_interrupted_rename_is_repeated_unless_it_was_done() {
        let dir = tempfile::tempdir().unwrap();
        for (done_at, tries) in [(1, 1), (3, 3)] {
            fs::write(dir.path().join("from"), "new").unwrap();
            fs::write(dir.path().join("to"), "old").unwrap();
            let (location, _) = Location::find(&dir.path().join("to")).unwrap();
            let mut calls = 0;
            let renamed = location.unless_done(OsStr::new("from"), || {
                calls += 1;
                if calls == done_at {
                    fs::rename(dir.path().join("from"), dir.path().join("to")).unwrap();
                }
                Err(Errno::INTR)
            });
            renamed.unwrap();
            assert_eq!(calls, tries);
            assert_eq!(fs::read(dir.path().join("to")).unwrap(), b"new");
        }
        // A name that others have taken is not ours.
        fs::write(dir.path().join("from"), "new").unwrap();
        let (location, _) = Location::find(&dir.path().join("to")).unwrap();
        let mut answers = [Err(Errno::INTR), Err(Errno::EXIST)].into_iter();
        let failed = location.unless_done(OsStr::new("from"), || answers.next().unwrap()).unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::AlreadyExists);
        let refused = location.rename_here(OsStr::new("from"), None).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
        let old = fs::metadata(dir.path().join("to")).unwrap();
        location.rename_here(OsStr::new("from"), Some(&old)).unwrap();
        assert!(!dir.path().join("from").exists());
        assert_eq!(fs::read(dir.path().join("to")).unwrap(), b"new");
    }

    /// A file that took the name between the last look and the rename was lost.
    #[test]
    fn a_file_that_takes_the_name_in_the_last_moment_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("from"), "new").unwrap();
        fs::write(path("to"), "old").unwrap();
        let (location, _) = Location::find(&path("to")).unwrap();
        let (dir, names) = (&location.directory, (OsStr::new("from"), OsStr::new("to")));
        let exchanged = rustix::fs::renameat_with(dir, names.0, dir, names.1, RenameFlags::EXCHANGE);
        if is_unknown(&exchanged.map_err(io::Error::from)) {
            return skip_unsupported(format_args!("the temporary directory exchanges no names"));
        }
        fs::write(path("from"), "new").unwrap();
        fs::write(path("to"), "old").unwrap();
        // Open, so that its inode is not given to another file.
        let old = File::open(path("to")).unwrap();
        fs::write(path("other"), "other").unwrap();
        fs::rename(path("other"), path("to")).unwrap();
        let refused = location.rename_here(OsStr::new("from"), Some(&old.metadata().unwrap())).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(path("to")).unwrap(), b"other");
        assert_eq!(fs::read(path("from")).unwrap(), b"new");
        // Nor does it lose its name to a file that is to give it back.
        let ours = fs::metadata(path("from")).unwrap();
        assert!(!location.rename_away(OsStr::new("back"), &ours));
        assert_eq!(fs::read(path("to")).unwrap(), b"other");
    }

    /// On a file system with neither `RENAME_NOREPLACE` nor hard links no new file got its name.
    #[test]
    fn a_new_file_gets_its_name_on_any_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (location, _) = Location::find(&path("to")).unwrap();
        let from = OsStr::new("from");
        for no_links in [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS] {
            fs::write(path("from"), "new").unwrap();
            location.take_free_name(from, || Err(Errno::INVAL), || Err(no_links)).unwrap();
            assert_eq!(fs::read(path("to")).unwrap(), b"new");
            assert!(!path("from").exists());
            fs::write(path("from"), "newer").unwrap();
            let taken = location.take_free_name(from, || Err(Errno::INVAL), || Err(no_links)).unwrap_err();
            assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(path("to")).unwrap(), b"new");
            fs::remove_file(path("to")).unwrap();
        }
        // With links, and a temporary name that stays.
        let link = || {
            fs::hard_link(path("from"), path("to")).unwrap();
            fs::remove_file(path("from")).unwrap();
            Ok(())
        };
        location.take_free_name(from, || Err(Errno::INVAL), link).unwrap();
        assert_eq!(fs::read(path("to")).unwrap(), b"newer");
        // Any other error stands.
        fs::write(path("from"), "new").unwrap();
        let failed = location.take_free_name(from, || Err(Errno::INVAL), || Err(Errno::NOSPC)).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
    }
}
