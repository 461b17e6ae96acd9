//! Limits of what is opened, for images from strangers: how deep a chain is, how long a disk.

use std::path::Path;

use blockmirror_block::{Error as BlockError, ErrorKind};

use super::OpenOptions;
use crate::error::Result;

impl OpenOptions {
    /// How many images a chain may have.
    #[must_use]
    pub fn max_depth(mut self, images: u32) -> Self {
        self.max_depth = images;
        self
    }

    /// The longest disk that an image of the chain may have; a longer one is refused. Checks and inspections
    /// count it, too.
    #[must_use]
    pub fn max_virtual_size(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_virtual_size = bytes.into();
        self
    }

    pub(crate) fn given_max_virtual_size(&self) -> Option<u64> {
        self.max_virtual_size
    }

    /// Whether a disk of `bytes`, that of the image `path`, is not too long.
    pub(crate) fn check_virtual_size(&self, bytes: u64, path: &Path) -> Result<()> {
        let Some(limit) = self.max_virtual_size.filter(|limit| bytes > *limit) else { return Ok(()) };
        let why = format!("its disk has {bytes} bytes, more than the limit of {limit}");
        let error = BlockError::new(ErrorKind::LimitExceeded, "open");
        Err(error.in_file(path.display().to_string()).because(why).into())
    }
}
