//! Temporary files that killed runs left behind.
//!
//! Asked by [`crate::target`]. A file counts as left behind if its name has the form that [`crate::new_file`] gives, and
//! no process has it locked or open.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockmirror_block::{Error, Result};
use rustix::fs::OFlags;

use crate::holders;
use crate::location::Location;
use crate::new_file::{RANDOM_DIGITS, partial_affixes};
use crate::open::{FileOptions, lock};

/// A temporary file that a killed run left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    name: OsString,
    path: PathBuf,
    allocated: u64,
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

    /// Removes it, unless it is in use by now.
    pub(crate) fn remove(&self, location: &Location) -> Result<()> {
        let removed = |e| Error::io("remove", e).in_file(self.path.display().to_string());
        match abandoned(location, &self.name) {
            // The lock is held until the name is gone.
            Some((_, _file)) => location.remove(&self.name).map_err(removed),
            None => Ok(()),
        }
    }
}

/// Those of the file at `location`; none if the directory may not be read.
pub(crate) fn find(location: &Location) -> Vec<Leftover> {
    let (prefix, suffix) = partial_affixes(location.name().as_bytes());
    let is_partial = |name: &OsString| {
        let random = name.as_bytes().strip_prefix(&*prefix).and_then(|rest| rest.strip_suffix(suffix));
        random.is_some_and(|random| random.len() == RANDOM_DIGITS && random.iter().all(u8::is_ascii_hexdigit))
    };
    let mut names: Vec<_> = location.names().into_iter().filter(is_partial).collect();
    names.sort();
    let found = names.into_iter().filter_map(|name| {
        let (allocated, _) = abandoned(location, &name)?;
        let path = location.beside(&name);
        Some(Leftover { name, path, allocated })
    });
    found.collect()
}

/// The file `name`, open and locked, and its allocated bytes, if no one uses it.
fn abandoned(location: &Location, name: &OsStr) -> Option<(u64, std::fs::File)> {
    let path = location.beside(name);
    let meta = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
    if holders::find(&meta).is_some() {
        return None;
    }
    let file = location.open(name, OFlags::NONBLOCK, 0).ok()?;
    lock(&file, &path, FileOptions::new().lock, true).ok()?;
    Some((meta.blocks().saturating_mul(512), file))
}
