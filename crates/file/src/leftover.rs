//! Temporary files that killed runs left behind.
//!
//! Asked by [`crate::target`]. A file counts as left behind if its name has the form that [`crate::new_file`]
//! gives, it is ours, and no process has it locked or open.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::process::geteuid;

use crate::holders;
use crate::id::FileId;
use crate::location::Location;
use crate::new_file::{PARTIAL_LENGTHS, RANDOM_DIGITS, partial_affixes};
use crate::open::{FileOptions, lock};

/// A temporary file that a killed run left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    name: OsString,
    path: PathBuf,
    file: FileId,
    allocated: u64,
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

    /// Why it was not removed although that was wanted.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Removes it, unless it is in use by now. That it stays is no reason not to go on.
    pub(crate) fn remove(&mut self, location: &Location) {
        self.failure = match unlocked(location, &self.name) {
            // The lock is held until the name is gone.
            Some((meta, _file)) if FileId::of_metadata(&meta) == Some(self.file) => {
                location.remove(&self.name).err().map(|e| e.to_string())
            }
            _ => Some("it is in use".to_owned()),
        };
    }
}

/// As many as are looked at: anyone may make files of such names in a directory that is everyone's.
const MOST: usize = 16;

/// Those of the file at `location` that the user of this process owns; none if the directory may not be read.
pub(crate) fn find(location: &Location) -> Vec<Leftover> {
    let affixes = PARTIAL_LENGTHS.map(|longest| partial_affixes(location.name().as_bytes(), longest));
    let is_partial = |name: &[u8]| {
        affixes.iter().any(|(prefix, suffix)| {
            let random = name.strip_prefix(&**prefix).and_then(|rest| rest.strip_suffix(*suffix));
            random.is_some_and(|random| {
                random.len() == RANDOM_DIGITS && random.iter().all(u8::is_ascii_hexdigit)
            })
        })
    };
    let mut names = location.names(is_partial);
    names.sort();
    let found = names.into_iter().filter_map(|name| {
        // Not kept open: this process would be found to have it open.
        let (meta, _) = unlocked(location, &name)?;
        let path = location.beside(&name);
        let (file, allocated) = (FileId::of_metadata(&meta)?, meta.blocks().saturating_mul(512));
        Some(Leftover { name, path, file, allocated, failure: None })
    });
    let mut found: Vec<_> = found.take(MOST).collect();
    let open = holders::open_files(&found.iter().map(|leftover| leftover.file).collect());
    found.retain(|left| !open.contains(&left.file) && holders::loop_device(left.file).is_none());
    found
}

/// The file `name` of ours, open and locked, and what the kernel says about it, unless another has it locked.
fn unlocked(location: &Location, name: &OsStr) -> Option<(Metadata, File)> {
    let path = location.beside(name);
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let there = rustix::fs::statat(location.directory(), name, flags).ok()?;
    // Looked at before it is opened, which has effects on other kinds of files.
    let is_file = FileType::from_raw_mode(there.st_mode) == FileType::RegularFile;
    if !is_file || there.st_uid != geteuid().as_raw() {
        return None;
    }
    let file = location.open(name, OFlags::NONBLOCK, 0).ok()?;
    let meta = file.metadata().ok()?;
    lock(&file, &path, FileOptions::new().lock, true).ok()?;
    Some((meta, file))
}
