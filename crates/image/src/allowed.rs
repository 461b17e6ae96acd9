//! Which files images may name, before it is known which image is opened.
//!
//! A caller collects what its user allows once, and makes a [`ReferencePolicy`] for each image from it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::reference::ReferencePolicy;

/// The files that any image may name, besides those in or below its own directory.
#[derive(Clone, Debug, Default)]
pub struct AllowedReferences {
    dirs: Vec<PathBuf>,
    dirs_to_read: Vec<PathBuf>,
    files: Vec<PathBuf>,
    protocols: bool,
    not_beside: bool,
}

impl AllowedReferences {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Also files in or below `directory`.
    #[must_use]
    pub fn dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.dirs.push(directory.into());
        self
    }

    /// Also files in or below `directory`, for reading.
    #[must_use]
    pub fn dir_to_read(mut self, directory: impl Into<PathBuf>) -> Self {
        self.dirs_to_read.push(directory.into());
        self
    }

    /// Also this file, wherever it lies.
    #[must_use]
    pub fn file(mut self, file: impl Into<PathBuf>) -> Self {
        self.files.push(file.into());
        self
    }

    /// Whether files in or below the image's own directory are among them; by default they are. Where images
    /// of several owners lie in one directory they should not be.
    #[must_use]
    pub fn beside(mut self, allow: bool) -> Self {
        self.not_beside = !allow;
        self
    }

    /// Whether `blkdebug:CONFIG:IMAGE` and `null-co://` are backing files, too.
    #[must_use]
    pub fn protocols(mut self, allow: bool) -> Self {
        self.protocols = allow;
        self
    }

    /// The policy for the image `image`.
    ///
    /// # Errors
    /// [`Error::Directory`] if a directory cannot be looked up.
    pub fn policy_for(&self, image: &Path) -> Result<ReferencePolicy> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |cause| Error::Directory { path, cause }
        };
        let mut policy = match self.not_beside {
            true => ReferencePolicy::deny(),
            false => ReferencePolicy::beside(image).map_err(failed(crate::reference::directory_of(image)))?,
        };
        for directory in &self.dirs {
            policy.allow_dir(directory).map_err(failed(directory))?;
        }
        for directory in &self.dirs_to_read {
            policy.allow_dir_to_read(directory).map_err(failed(directory))?;
        }
        for file in &self.files {
            policy.allow_file(file);
        }
        if self.protocols {
            policy.allow_protocols();
        }
        Ok(policy)
    }
}
