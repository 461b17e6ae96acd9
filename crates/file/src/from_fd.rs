//! Descriptors from outside: a manager opens the file, and this process is given the descriptor.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::{OFlags, fcntl_getfl};

use crate::open::FileOptions;
use crate::{FileStorage, LockMode};

impl FileOptions {
    /// Makes a storage of a file that is open already, which messages call `shown`. Whether the page cache
    /// is bypassed is the descriptor's affair.
    ///
    /// To be locked it is opened anew by way of `/proc`, because a lock on the descriptor would be shared
    /// with the process that has passed it. Where this process may not do that, the caller sees to the
    /// lock, and asks for [`LockMode::Off`].
    ///
    /// ```
    /// use std::fs::File;
    /// use blockmirror_block::Storage;
    /// use blockmirror_file::FileOptions;
    ///
    /// let dir = tempfile::tempdir()?;
    /// std::fs::write(dir.path().join("disk"), b"boot")?;
    /// let descriptor = File::open(dir.path().join("disk"))?;
    /// let storage = FileOptions::new().from_fd(descriptor.into(), "fd:0")?;
    /// assert_eq!(storage.len()?, 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for [`open`](Self::open), and [`ErrorKind::PermissionDenied`] if it is not open for what these
    /// options ask; [`ErrorKind::InvalidInput`] for a descriptor that always appends, or only names the file
    /// (`O_PATH`), and for options that are about opening: a new file, a claim, direct I/O.
    pub fn from_fd(&self, descriptor: OwnedFd, shown: impl AsRef<Path>) -> Result<FileStorage> {
        let path = shown.as_ref();
        let name: Arc<str> = path.display().to_string().into();
        self.adopt_descriptor(descriptor, path, &name).map_err(|error| error.or_in_file(&name))
    }

    fn adopt_descriptor(&self, descriptor: OwnedFd, path: &Path, name: &Arc<str>) -> Result<FileStorage> {
        let invalid = |why: &str| Err(Error::new(ErrorKind::InvalidInput, "open").because(why));
        if self.create_new || self.claim || self.direct {
            return invalid("a file that is open already is neither created, claimed nor made direct");
        }
        let flags = fcntl_getfl(&descriptor).map_err(|errno| Error::io("open", errno.into()))?;
        if flags.contains(OFlags::PATH) {
            return invalid("the descriptor only names the file");
        }
        if flags.contains(OFlags::APPEND) {
            return invalid("the descriptor appends, whatever the offset");
        }
        let mode = flags & OFlags::RWMODE;
        if mode == OFlags::WRONLY || (self.writable && mode != OFlags::RDWR) {
            let wanted = if self.writable { "reading and writing" } else { "reading" };
            let why = format!("the descriptor is not open for {wanted}");
            return Err(Error::new(ErrorKind::PermissionDenied, "open").because(why));
        }
        let options = Self { direct: flags.contains(OFlags::DIRECT), ..*self };
        let file = match self.lock {
            LockMode::Off => File::from(descriptor),
            // Locks belong to the open file, which the process that gave the descriptor has too, and maybe
            // others: they would exclude none of them, and end when the first of them unlocks.
            LockMode::Exclusive | LockMode::Shared => {
                let own = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
                let mut open = OpenOptions::new();
                open.read(true).write(self.writable);
                let kept = (flags & OFlags::DIRECT) | OFlags::NOCTTY;
                open.custom_flags(kept.bits().cast_signed());
                open.open(own).map_err(|error| Error::io("open anew, to lock it,", error))?
            }
        };
        options.adopt(file, path, name)
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::Storage;

    use super::*;

    fn file() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [7; 8192]).unwrap();
        (dir, path)
    }

    #[test]
    fn a_descriptor_reads_writes_and_is_locked() {
        let (_dir, path) = file();
        let open = || OpenOptions::new().read(true).write(true).open(&path).unwrap().into();
        let storage = FileOptions::new().writable(true).from_fd(open(), "fd:3").unwrap();
        storage.write_at(&[9; 4], 100).unwrap();
        let mut found = [0; 5];
        storage.read_at(&mut found, 100).unwrap();
        assert_eq!(found, [9, 9, 9, 9, 7]);
        assert_eq!(storage.name(), "fd:3");
        let other = FileOptions::new().writable(true).from_fd(open(), "fd:4").unwrap_err();
        assert_eq!(other.kind(), ErrorKind::Locked);
        FileOptions::new().lock(LockMode::Off).from_fd(open(), "fd:4").unwrap();
        drop(storage);
        FileOptions::new().writable(true).from_fd(open(), "fd:4").unwrap();
    }

    /// The lock of one does not end with that of another, whose descriptor is of the same open file.
    #[test]
    fn copies_of_a_descriptor_exclude_each_other() {
        let (_dir, path) = file();
        let passed = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let copy = || passed.try_clone().unwrap().into();
        let write = FileOptions::new().writable(true);
        let storage = write.from_fd(copy(), "fd:3").unwrap();
        assert_eq!(write.from_fd(copy(), "fd:4").unwrap_err().kind(), ErrorKind::Locked);
        drop(FileOptions::new().lock(LockMode::Off).from_fd(copy(), "fd:4").unwrap());
        drop(passed);
        assert_eq!(write.open(&path).unwrap_err().kind(), ErrorKind::Locked);
        drop(storage);
        write.open(&path).unwrap();
    }

    #[test]
    fn what_a_descriptor_cannot_do_is_refused_at_once() {
        let (dir, path) = file();
        let options = |change: fn(&mut OpenOptions) -> &mut OpenOptions| {
            OwnedFd::from(change(&mut OpenOptions::new()).open(&path).unwrap())
        };
        let kind = |options: FileOptions, descriptor: OwnedFd| {
            options.from_fd(descriptor, "fd").map(drop).unwrap_err().kind()
        };
        let (read, write) = (FileOptions::new(), FileOptions::new().writable(true));
        assert_eq!(kind(write, options(|open| open.read(true))), ErrorKind::PermissionDenied);
        assert_eq!(kind(read, options(|open| open.write(true))), ErrorKind::PermissionDenied);
        assert_eq!(kind(write, options(|open| open.read(true).append(true))), ErrorKind::InvalidInput);
        let only_names = OFlags::PATH.bits().cast_signed();
        let named = OpenOptions::new().read(true).custom_flags(only_names).open(&path).unwrap();
        assert_eq!(kind(read, named.into()), ErrorKind::InvalidInput);
        let folder = File::open(dir.path()).unwrap();
        assert_eq!(kind(read, folder.into()), ErrorKind::InvalidInput);
        for about_opening in [read.create_new(true), read.claim(true), read.direct(true)] {
            assert_eq!(kind(about_opening, options(|open| open.read(true))), ErrorKind::InvalidInput);
        }
    }
}
