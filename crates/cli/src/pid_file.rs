//! The file that a server writes its process id to.
//!
//! What must hold: a file that holds anything else than a process id is not overwritten.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};

/// A path to which the process id may be written.
#[derive(Debug)]
pub(crate) struct PidFile {
    given: PathBuf,
    /// From the root: the process may be in another directory when it is removed.
    path: PathBuf,
}

impl PidFile {
    /// That nothing is lost if the process id is written to `path`: no file is there, or one that holds
    /// nothing but a number.
    pub(crate) fn check(path: &Path) -> Outcome<Self> {
        let failed = |why: &dyn std::fmt::Display| Failure::failed(format!("{}: {why}", path.display()));
        let absolute = std::path::absolute(path).map_err(|error| failed(&error))?;
        let this = Self { given: path.to_owned(), path: absolute };
        match std::fs::metadata(path) {
            Ok(found) if !found.is_file() => return Err(failed(&"exists and is not a pid file")),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(this),
            Err(error) => return Err(failed(&error)),
        }
        // As long as a number may be, and a byte more.
        let mut text = Vec::new();
        match File::open(path).and_then(|file| file.take(32).read_to_end(&mut text)) {
            Ok(_) if text.len() < 32 && text.trim_ascii().iter().all(u8::is_ascii_digit) => Ok(this),
            Ok(_) => Err(failed(&"exists and is not a pid file")),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Writes the process id.
    pub(crate) fn write(&self) -> Outcome<()> {
        let write = || writeln!(File::create(&self.path)?, "{}", std::process::id());
        write().map_err(|error| Failure::failed(format!("{}: {error}", self.given.display())))
    }

    /// Removes it. Another process may have done so.
    pub(crate) fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
