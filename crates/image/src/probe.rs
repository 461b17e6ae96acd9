//! Finding out which format an open storage is in. Called where no format was given.

use std::path::Path;

use blockmirror_block::Storage;

use crate::error::{Error, Result};
use crate::format::{Detected, Format, PROBE_LEN, detect};

/// Finds out the format of `storage`, which messages call `path`.
///
/// # Errors
/// [`Error::ForeignFormat`] if it is recognised and not supported.
pub(crate) fn probe(storage: &dyn Storage, path: &Path) -> Result<Format> {
    let mut head = [0; PROBE_LEN];
    storage.read_at(&mut head, 0)?;
    match detect(&head) {
        Detected::Known(format) => Ok(format),
        Detected::Foreign(format) => Err(Error::ForeignFormat { path: path.to_owned(), format }),
    }
}
