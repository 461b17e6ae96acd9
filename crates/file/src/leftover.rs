//! Temporary files that killed runs left behind.
//!
//! Asked by [`crate::target`]. A file counts as left behind if its name has the form that [`crate::partial`]
//! gives, it is ours, and no process has it locked or open. Beside it there may be a sidecar, which says how
//! far it has come.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::holders;
use crate::id::FileId;
use crate::location::Location;
use crate::open::{FileOptions, lock};
use crate::partial::{self, PARTIAL_LENGTHS, RANDOM_DIGITS, SIDECAR_SUFFIX, partial_affixes};

/// A temporary file that a killed run left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    name: OsString,
    path: PathBuf,
    file: FileId,
    allocated: u64,
    /// The name of its sidecar, if it has one that is ours.
    sidecar: Option<OsString>,
    sidecar_path: Option<PathBuf>,
    removed: bool,
    failure: Option<String>,
}

impl Leftover {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of storage that it takes.
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// The number by which [`TargetOptions::resume`](crate::TargetOptions::resume) and
    /// [`TargetOptions::discard`](crate::TargetOptions::discard) name it.
    pub fn number(&self) -> u32 {
        partial::number(&self.name)
    }

    /// The file beside it that says how far it has come, if there is one.
    pub fn sidecar_path(&self) -> Option<&Path> {
        self.sidecar_path.as_deref()
    }

    /// Whether it was removed.
    pub fn is_removed(&self) -> bool {
        self.removed
    }

    /// Why it was not removed although that was wanted.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Removes it, unless it is in use by now. That it stays is no reason not to go on.
    pub(crate) fn remove(&mut self, location: &Location) {
        self.failure = match unlocked(location, &self.name) {
            // The lock is held until the name is gone.
            Some((meta, _file)) if FileId::of_metadata(&meta) == Some(self.file) => {
                let removed = location.remove(&self.name);
                let sidecar = self.sidecar.as_ref().filter(|_| removed.is_ok());
                let removed = removed.and_then(|()| sidecar.map_or(Ok(()), |name| location.remove(name)));
                removed.err().map(|e| e.to_string())
            }
            _ => Some("it is in use".to_owned()),
        };
        self.removed = self.failure.is_none();
    }
}

/// As many as are looked at: anyone may make files of such names in a directory that is everyone's.
const MOST: usize = 16;

/// Those of the file at `location` that the user of this process owns; none if the directory may not be read.
pub(crate) fn find(location: &Location) -> Vec<Leftover> {
    let all: BTreeSet<_> = names(location).into_iter().collect();
    // A sidecar is found with its file; one without is a leftover by itself.
    let sidecars: BTreeSet<_> = all.iter().map(|name| partial::sidecar_name(name)).collect();
    let mut names: Vec<_> = all.iter().filter(|name| !sidecars.contains(*name)).cloned().collect();
    // What can be gone on with must be among those that are looked at.
    names.sort_by_key(|name| !all.contains(&partial::sidecar_name(name)));
    let found = names.into_iter().filter_map(|name| {
        // Not kept open: this process would be found to have it open.
        let (meta, _) = unlocked(location, &name)?;
        let path = location.beside(&name);
        let (file, allocated) = (FileId::of_metadata(&meta)?, meta.blocks().saturating_mul(512));
        let sidecar =
            Some(partial::sidecar_name(&name)).filter(|sidecar| partial::is_ours(location, sidecar));
        let sidecar_path = sidecar.as_ref().map(|sidecar| location.beside(sidecar));
        Some(Leftover { name, path, file, allocated, sidecar, sidecar_path, removed: false, failure: None })
    });
    let mut found: Vec<_> = found.take(MOST).collect();
    let open = holders::open_files(&found.iter().map(|leftover| leftover.file).collect());
    found.retain(|left| !open.contains(&left.file) && holders::loop_device(left.file).is_none());
    found
}

/// A temporary file for the name at `location` that a run of the same user has locked or open, but for the
/// one with the number `except`.
pub(crate) fn in_use(location: &Location, except: Option<u32>) -> Option<PathBuf> {
    let is_other = |name: &OsString| {
        partial::is_partial(name) && partial::is_ours(location, name) && Some(partial::number(name)) != except
    };
    let names: Vec<_> = names(location).into_iter().filter(is_other).collect();
    // Without its lock, one may be open all the same.
    let found = names.iter().map(|name| unlocked(location, name).map(|(meta, _)| FileId::of_metadata(&meta)));
    let found: Vec<_> = found.collect();
    let open = holders::open_files(&found.iter().flatten().flatten().copied().collect());
    let in_use = names.iter().zip(found).find(|(name, found)| match found {
        // Or gone by now.
        None => partial::is_ours(location, name),
        Some(file) => file.is_some_and(|file| open.contains(&file)),
    });
    in_use.map(|(name, _)| location.beside(name))
}

/// The temporary names, and those of sidecars, that belong to the name at `location`.
fn names(location: &Location) -> Vec<OsString> {
    let affixes = PARTIAL_LENGTHS.map(|longest| partial_affixes(location.name().as_bytes(), longest));
    location.names(|name: &[u8]| {
        affixes.iter().any(|(prefix, suffix)| {
            let rest = name.strip_prefix(&**prefix);
            let random =
                rest.and_then(|rest| rest.strip_suffix(*suffix).or(rest.strip_suffix(SIDECAR_SUFFIX)));
            random.is_some_and(|random| {
                random.len() == RANDOM_DIGITS && random.iter().all(u8::is_ascii_hexdigit)
            })
        })
    })
}

/// The file `name` of ours, open and locked, and what the kernel says about it, unless another has it locked.
fn unlocked(location: &Location, name: &OsStr) -> Option<(Metadata, File)> {
    let path = location.beside(name);
    if !partial::is_ours(location, name) {
        return None;
    }
    let file = location.open(name, OFlags::NONBLOCK, 0).ok()?;
    let meta = file.metadata().ok()?;
    lock(&file, &path, FileOptions::new().lock, true).ok()?;
    Some((meta, file))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn one_with_a_sidecar_is_among_those_that_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..=MOST {
            fs::write(dir.path().join(format!(".d.{number:08x}.partial")), "").unwrap();
        }
        fs::write(dir.path().join(format!(".d.{MOST:08x}.resume")), "").unwrap();
        let (location, _) = Location::find(&dir.path().join("d")).unwrap();
        let found = find(&location);
        assert_eq!(found.len(), MOST);
        assert!(found[0].sidecar_path().is_some(), "{found:?}");
    }
}
