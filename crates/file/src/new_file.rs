//! A file that is not there until it is whole.
//!
//! It is written as `.NAME.RANDOM.partial` beside its target and renamed onto it once its bytes are durable,
//! so that an interrupted copy never looks like a finished one, and an existing target stays as it was until
//! then. A process that is killed leaves the partial file behind ([`crate::leftover`]); one that fails
//! removes it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{Error, ErrorKind, Result};
use blockmirror_image_lock::ImageLock;
use rustix::fs::OFlags;

use crate::carry::carry;
use crate::direct;
use crate::handle::PathHandle;
use crate::id::FileKind;
use crate::location::{Found, Location};
use crate::open::{self, FileOptions};
use crate::partial::{self, with_partial_name};
use crate::storage::FileStorage;

/// What to do about a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Existing {
    /// Fail, at the start if it is there by then, at the end otherwise.
    Refuse,
    /// Put the new file in its place, with everything that the old one carries: owner, mode, ACL, extended
    /// attributes, flags. A symbolic link is followed: what it leads to is replaced.
    Replace,
}

/// A new file under a temporary name. Dropped without [`persist`](Self::persist) it is removed.
#[derive(Debug)]
#[must_use = "dropping it removes the file"]
pub struct NewFile {
    storage: Arc<FileStorage>,
    /// The target in messages.
    name: Arc<str>,
    location: Location,
    partial: OsString,
    partial_path: PathBuf,
    /// The file to be replaced, locked as if it were written, so that no open image is pulled away.
    replaced: Option<Replaced>,
    /// It has its name, or has lost the temporary one, or is kept: there is nothing to be removed.
    persisted: bool,
    /// It stays under its temporary name if it does not get its own.
    kept: bool,
}

impl NewFile {
    /// Starts a file that will be called `target`; open for writing, empty, locked as `options` say.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] under [`Existing::Refuse`]; [`ErrorKind::Locked`] if the file to replace
    /// is in use; [`ErrorKind::PermissionDenied`] if it may not be written; [`ErrorKind::Unsupported`] if the
    /// new file cannot carry what it carries; [`ErrorKind::InvalidInput`] if what has the name is not a
    /// regular file; and whatever creating a file beside `target` gives.
    pub fn create(target: impl AsRef<Path>, existing: Existing, options: &FileOptions) -> Result<Self> {
        let given = target.as_ref();
        let name: Arc<str> = given.display().to_string().into();
        Self::start(given, existing, options, &name).map_err(|e| e.or_in_file(&name))
    }

    fn start(given: &Path, existing: Existing, options: &FileOptions, name: &Arc<str>) -> Result<Self> {
        let (location, found) = Location::find(given)?;
        let replaced = match (found, existing) {
            (Found::Nothing, _) => None,
            (_, Existing::Refuse) => return Err(Error::new(ErrorKind::AlreadyExists, "create")),
            (Found::File(found), Existing::Replace) => {
                Some(Replaced::hold(&location, &found, given, options)?)
            }
            (Found::Descriptor(_), Existing::Replace) => {
                return Err(Error::new(ErrorKind::InvalidInput, "create")
                    .because("an open descriptor cannot be replaced by a file; write into it instead"));
            }
        };
        let new = Self::begin(location, Arc::clone(name), replaced, options, None)?;
        new.take_after_replaced()
            .map_err(|what| Error::new(ErrorKind::Unsupported, "create").because(what))?;
        Ok(new)
    }

    /// Creates the file under its temporary name, or goes on with the one that is to be resumed.
    pub(crate) fn begin(
        location: Location,
        name: Arc<str>,
        replaced: Option<Replaced>,
        options: &FileOptions,
        resume: Option<u32>,
    ) -> Result<Self> {
        // What replaces another file is closed to everyone else until it carries what that one does.
        let mode = if replaced.is_some() { 0o600 } else { 0o666 };
        let (partial, storage) = match resume {
            None => create_beside(&location, options, &name, mode)?,
            Some(number) => partial::reopen(&location, options, &name, number)?,
        };
        let partial_path = location.beside(&partial);
        let (storage, kept) = (Arc::new(storage), resume.is_some());
        Ok(Self { storage, name, location, partial, partial_path, replaced, persisted: false, kept })
    }

    /// The open file. It may outlive `self`, and is the target once that is persisted. Its name in messages
    /// is the target's.
    pub fn storage(&self) -> &Arc<FileStorage> {
        &self.storage
    }

    /// The temporary name, for callers that must clean up without running destructors.
    pub fn partial_path(&self) -> &Path {
        &self.partial_path
    }

    /// The number in the temporary name, by which a later run finds it.
    pub fn number(&self) -> u32 {
        partial::number(&self.partial)
    }

    /// The name of a file beside the temporary one that says how far it has come.
    pub fn sidecar_path(&self) -> PathBuf {
        self.location.beside(&partial::sidecar_name(&self.partial))
    }

    /// Whether dropping it leaves it under its temporary name, for a later run to go on with. By default it
    /// does not, unless it was resumed.
    pub fn keep(&mut self, keep: bool) {
        self.kept = keep;
    }

    /// Whether it takes the place of a file that has its name already.
    pub fn replaces(&self) -> bool {
        self.replaced.is_some()
    }

    /// Makes the file durable, gives it its name, and makes that durable.
    ///
    /// # Errors
    /// Any; the file is removed, unless only the last step failed: then it has its name, which may not
    /// survive a crash.
    pub fn persist(mut self) -> Result<()> {
        self.make_durable()?;
        self.take_name()?;
        self.sync_name()
    }

    /// The first step of [`persist`](Self::persist), for several files that belong together: makes its bytes
    /// durable, and what it carries.
    ///
    /// # Errors
    /// Any.
    pub fn make_durable(&self) -> Result<()> {
        self.sync_and_carry().map_err(|e| e.or_in_file(&self.name))
    }

    fn sync_and_carry(&self) -> Result<()> {
        self.storage.sync_all()?;
        let Some(old) = &self.replaced else { return Ok(()) };
        // Copying takes long: what was taken away from the old file meanwhile must not come back with the new
        // one.
        let ctime = |file: &File| file.metadata().map(|meta| (meta.ctime(), meta.ctime_nsec())).ok();
        let before = ctime(self.storage.file());
        carry(&old.file, self.storage.file())
            .map_err(|what| Error::new(ErrorKind::Unsupported, "rename").because(what))?;
        if ctime(self.storage.file()) != before {
            self.storage.sync_all()?;
        }
        Ok(())
    }

    /// Fails if another file has taken the name of the one to replace.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] then.
    pub fn check_name(&self) -> Result<()> {
        let checked = self.replaced.as_ref().map_or(Ok(()), |old| old.check(&self.location));
        checked.map_err(|e| e.or_in_file(&self.name))
    }

    /// The second step: gives the file its name.
    ///
    /// # Errors
    /// Any; the file does not have its name then.
    pub fn take_name(&mut self) -> Result<()> {
        self.check_name()?;
        let renamed = self.rename();
        // After an exchange that could not be undone another file has the temporary name, and keeps it.
        self.persisted = renamed.is_ok() || self.has_lost_partial_name();
        renamed.map_err(|e| e.or_in_file(&self.name))
    }

    fn has_lost_partial_name(&self) -> bool {
        let file = self.storage.file().metadata();
        file.is_ok_and(|file| self.location.is_called_otherwise(&self.partial, &file))
    }

    fn rename(&self) -> Result<()> {
        let old = self.replaced.as_ref().map(|old| old.file.metadata()).transpose();
        let old = old.map_err(|e| Error::io("rename", e))?;
        self.location.rename_here(&self.partial, old.as_ref())
    }

    /// Takes the name back, so that dropping it removes the file, unless it has replaced another or the name
    /// leads to another by now.
    pub fn take_back_name(&mut self) {
        if self.persisted && self.replaced.is_none() {
            let file = self.storage.file().metadata();
            self.persisted = !file.is_ok_and(|file| self.location.rename_away(&self.partial, &file));
        }
    }

    /// The third step: makes the name durable.
    ///
    /// # Errors
    /// Any; the name may not survive a crash.
    pub fn sync_name(&self) -> Result<()> {
        if !self.storage.syncs() {
            return Ok(());
        }
        let synced = self.location.sync(self.storage.file());
        synced.map_err(|e| Error::io("sync directory", e).or_in_file(&self.name))
    }

    /// Leaves the file under its temporary name, which is returned; what has its name is as it was.
    pub fn leave(mut self) -> PathBuf {
        self.persisted = true;
        self.partial_path.clone()
    }

    /// Carries over what the file to be replaced carries.
    ///
    /// # Errors
    /// What cannot be carried over.
    pub(crate) fn take_after_replaced(&self) -> Result<(), String> {
        self.replaced.as_ref().map_or(Ok(()), |old| carry(&old.file, self.storage.file()))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.persisted && !self.kept {
            remove(&self.location, &self.partial);
        }
    }
}

/// Removes a temporary file. Where that fails nothing more can be done: the name says what the file is, and
/// the next run finds it.
fn remove(location: &Location, partial: &OsStr) {
    if location.remove(partial).is_err() {
        let _ = location.remove(partial);
    }
}

/// The file to be replaced, and the lock on it.
#[derive(Debug)]
pub(crate) struct Replaced {
    file: File,
    /// It must not have more names than its own in the end.
    sole: bool,
    lock: Option<ImageLock>,
}

impl Replaced {
    /// Opens and locks the file `found` at `location`.
    pub(crate) fn hold(
        location: &Location,
        found: &PathHandle,
        given: &Path,
        options: &FileOptions,
    ) -> Result<Self> {
        if found.check_kind()? != FileKind::Regular {
            return Err(Error::new(ErrorKind::InvalidInput, "create")
                .because("a block device cannot be replaced by a file; write into it instead"));
        }
        // Renaming over it takes leave to write the directory alone; a file that is protected against writing
        // is meant to stay.
        let file = found.open(true, OFlags::NONBLOCK).map_err(|e| Error::io("create", e))?;
        location.check_leads_to(found.metadata(), "create")?;
        let lock = open::lock(&file, given, options.lock, true)?;
        Ok(Self { file, sole: false, lock })
    }

    /// It is not replaced if it gets further names meanwhile, which would keep the old contents.
    pub(crate) fn sole(mut self, sole: bool) -> Self {
        self.sole = sole;
        self
    }

    /// Whether it may be replaced now.
    fn check(&self, location: &Location) -> Result<()> {
        let held = self.file.metadata().map_err(|e| Error::io("rename", e))?;
        location.check_leads_to(&held, "rename")?;
        if self.sole && held.nlink() > 1 {
            return Err(Error::new(ErrorKind::AlreadyExists, "rename").because(
                "the file to replace has got further hard links, which would keep the old contents",
            ));
        }
        Ok(())
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        if let Some(lock) = &self.lock {
            lock.release(&self.file);
        }
    }
}

fn create_beside(
    location: &Location,
    options: &FileOptions,
    name: &Arc<str>,
    mode: u32,
) -> Result<(OsString, FileStorage)> {
    let options = options.create_new(true);
    let flags = OFlags::CREATE | OFlags::EXCL | options.flags();
    for _ in 0..partial::TRIES {
        let opened = with_partial_name(location.name(), |partial| location.open(partial, flags, mode));
        let (partial, file) = opened.map_err(|e| direct::explain(e, options.direct, "create"))?;
        match options.adopt(file, Path::new(&**name), name) {
            // A run that cleans up has taken it for an old one before it was locked.
            Ok(storage) if storage.file().metadata().is_ok_and(|meta| meta.nlink() == 0) => {}
            Ok(storage) => return Ok((partial, storage)),
            // A run that looks for old ones has it locked for that moment.
            Err(e) if e.kind() == ErrorKind::Locked => remove(location, &partial),
            Err(e) => {
                remove(location, &partial);
                return Err(e);
            }
        }
    }
    Err(Error::new(ErrorKind::AlreadyExists, "create"))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What is written before its owner and mode are carried over must not be readable for other users.
    #[test]
    fn a_successor_is_closed_until_it_carries_the_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let (location, found) = Location::find(&path).unwrap();
        let Found::File(found) = found else { panic!("{found:?}") };
        let replaced = Replaced::hold(&location, &found, &path, &FileOptions::new()).unwrap();
        let new = NewFile::begin(location, "disk".into(), Some(replaced), &FileOptions::new(), None).unwrap();
        let mode = || new.storage.file().metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        new.take_after_replaced().unwrap();
        assert_eq!(mode(), 0o666);
    }
}
