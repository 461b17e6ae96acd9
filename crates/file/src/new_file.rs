//! A file that is not there until it is whole.
//!
//! It is written as `.NAME.RANDOM.partial` beside its target and renamed onto it once its bytes are durable, so
//! that an interrupted copy never looks like a finished one, and an existing target stays as it was until then.
//! A process that is killed leaves the partial file behind; one that fails removes it.

use std::fs::{self, File, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{Error, ErrorKind, Result};
use blockmirror_image_lock::ImageLock;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::open::{self, FileOptions};
use crate::storage::{FileKind, FileStorage};

/// What to do about a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail, at the start if it is there by then, at the end otherwise.
    Refuse,
    /// Put the new file in its place, with the owner and permissions of the old one. A symbolic link is
    /// followed: what it leads to is replaced.
    Replace,
}

/// A new file under a temporary name. Dropped without [`persist`](Self::persist) it is removed.
#[derive(Debug)]
#[must_use = "dropping it removes the file"]
pub struct NewFile {
    storage: Arc<FileStorage>,
    partial: PathBuf,
    target: PathBuf,
    existing: Existing,
    /// The file to be replaced, locked as if it were written, so that nobody's open image is pulled away.
    replaced: Option<Replaced>,
    persisted: bool,
}

impl NewFile {
    /// Starts a file that will be called `target`; open for writing, empty, locked as `options` say.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] under [`Existing::Refuse`]; [`ErrorKind::Locked`] if the file to replace is
    /// in use; [`ErrorKind::PermissionDenied`] if it may not be written; [`ErrorKind::InvalidInput`] if what has the name is not a regular file; and whatever creating a
    /// file beside `target` gives.
    pub fn create(target: impl AsRef<Path>, existing: Existing, options: &FileOptions) -> Result<Self> {
        let given = target.as_ref();
        let name: Arc<str> = given.display().to_string().into();
        Self::start(given, existing, options, &name).map_err(|e| e.or_in_file(&name))
    }

    fn start(given: &Path, existing: Existing, options: &FileOptions, name: &Arc<str>) -> Result<Self> {
        let (target, replaced) = match fs::symlink_metadata(given) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => (given.to_owned(), None),
            Err(e) => return Err(Error::io("create", e)),
            Ok(_) if existing == Existing::Refuse => {
                return Err(Error::new(ErrorKind::AlreadyExists, "create"));
            }
            Ok(_) => {
                let target = fs::canonicalize(given).map_err(|e| Error::io("create", e))?;
                let replaced = hold(&target, options)?;
                (target, Some(replaced))
            }
        };
        let mode = if replaced.is_some() { 0o600 } else { 0o666 };
        let (partial, storage) = create_beside(&target, options, name, mode)?;
        // From here on dropping `new` cleans up.
        let new = Self { storage: Arc::new(storage), partial, target, existing, replaced, persisted: false };
        if let Some(old) = &new.replaced {
            new.take_after(&old.file).map_err(|e| Error::io("create", e))?;
        }
        Ok(new)
    }

    /// The open file. It may outlive `self`, and is the target once that is persisted. Its name in messages is
    /// the target's.
    pub fn storage(&self) -> &Arc<FileStorage> {
        &self.storage
    }

    /// The temporary name, for whoever must clean up without running destructors.
    pub fn partial_path(&self) -> &Path {
        &self.partial
    }

    /// Makes the file durable, gives it its name, and makes that durable.
    ///
    /// # Errors
    /// Any; the file is removed, unless only the last step failed: then it has its name, which may not survive
    /// a crash.
    pub fn persist(self) -> Result<()> {
        let name: Arc<str> = self.target.display().to_string().into();
        self.finish().map_err(|e| e.or_in_file(&name))
    }

    fn finish(mut self) -> Result<()> {
        self.storage.sync_all()?;
        match self.existing {
            Existing::Replace => {
                fs::rename(&self.partial, &self.target).map_err(|e| Error::io("rename", e))?;
            }
            Existing::Refuse => {
                rename_new(&self.partial, &self.target).map_err(|e| Error::io("rename", e))?;
            }
        }
        self.persisted = true;
        sync_directory(directory(&self.target)).map_err(|e| Error::io("sync directory", e))
    }

    /// Owner and permissions of the file that will be replaced. Giving files away takes privilege; without it
    /// the new file stays ours.
    fn take_after(&self, old: &File) -> io::Result<()> {
        let meta = old.metadata()?;
        let new = self.storage.file();
        let ours = new.metadata()?;
        if (meta.uid(), meta.gid()) != (ours.uid(), ours.gid()) {
            let _ = std::os::unix::fs::fchown(new, Some(meta.uid()), Some(meta.gid()));
        }
        new.set_permissions(Permissions::from_mode(meta.mode() & 0o777))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.persisted {
            // Nothing can be done about a failure here; the name says what the file is.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// The file to be replaced, and the lock on it.
#[derive(Debug)]
struct Replaced {
    file: File,
    lock: Option<ImageLock>,
}

impl Drop for Replaced {
    fn drop(&mut self) {
        if let Some(lock) = &self.lock {
            lock.release(&self.file);
        }
    }
}

/// Opens and locks the file to be replaced.
fn hold(target: &Path, options: &FileOptions) -> Result<Replaced> {
    let refuse = |e| Error::io("create", e);
    if open::kind_of(&fs::metadata(target).map_err(refuse)?)? != FileKind::Regular {
        return Err(Error::new(ErrorKind::InvalidInput, "create")
            .because("a block device cannot be replaced by a file; write into it instead"));
    }
    // Renaming over it takes leave to write the directory alone; a file that is protected against writing is meant
    // to stay.
    let file = File::options().read(true).write(true).open(target).map_err(refuse)?;
    let lock = open::lock(&file, target, options.lock, true)?;
    Ok(Replaced { file, lock })
}

fn create_beside(
    target: &Path,
    options: &FileOptions,
    name: &Arc<str>,
    mode: u32,
) -> Result<(PathBuf, FileStorage)> {
    let Some(file_name) = target.file_name() else {
        return Err(Error::new(ErrorKind::InvalidInput, "create").because("it does not name a file"));
    };
    // More than enough to get past other files of the kind; fewer would do.
    const TRIES: usize = 64;
    let options = options.create_new(true);
    let mut tries = 0;
    loop {
        let partial = directory(target).join(partial_name(file_name.as_bytes()));
        match options.open_named(&partial, name, mode) {
            Ok(storage) => return Ok((partial, storage)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists && tries < TRIES => tries += 1,
            Err(e) => return Err(e),
        }
    }
}

/// `.NAME.RANDOM.partial`, with NAME cut where the whole would be longer than a file name may be.
fn partial_name(name: &[u8]) -> std::ffi::OsString {
    const NAME_MAX: usize = 255;
    let tail = format!(".{:08x}.partial", RandomState::new().hash_one(std::process::id()) as u32);
    let mut bytes = vec![b'.'];
    bytes.extend_from_slice(&name[..name.len().min(NAME_MAX - 1 - tail.len())]);
    bytes.extend_from_slice(tail.as_bytes());
    std::ffi::OsString::from_vec(bytes)
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Renames without replacing.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A filesystem without the flag: a link never replaces either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        other => other.map_err(io::Error::from),
    }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory)?.sync_all() {
        // Some filesystems cannot, and need not.
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        other => other,
    }
}
