//! Backing files that are no plain files: `blkdebug:CONFIG:IMAGE` and `null-co://`.
//!
//! They stand in headers of test images. Called on the way down a chain; a caller that does not allow
//! protocols gets what any other name gets, a refusal.
//!
//! What must hold: each file that such a name leads to is judged as a file that the image names, the one with
//! the rules too.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use blockmirror_block::{Error as BlockError, ErrorKind, Storage};
use blockmirror_file::{FileOptions, LockMode};
use blockmirror_filter::{BlkdebugOptions, MAX_CONFIG_BYTES};

use crate::error::Result;
use crate::protocol_id::NULL;
use crate::reference::{ReferenceError, ReferencePolicy, Resolved, Role};

/// What the name of a backing file leads to.
pub(crate) enum BackingTarget {
    File(Resolved),
    /// Zeros.
    Null,
    /// A file with fault injection.
    Blkdebug {
        rules: Option<Box<Resolved>>,
        image: Resolved,
    },
}

impl BackingTarget {
    /// Decides about `name` in the header of `image`.
    pub(crate) fn authorize(
        policy: &ReferencePolicy,
        image: &Path,
        name: &OsStr,
    ) -> Result<Self, ReferenceError> {
        let resolve = |name: &[u8]| policy.resolve(image, Role::Backing, OsStr::from_bytes(name));
        if !policy.allows_protocols() {
            return resolve(name.as_bytes()).map(Self::File);
        }
        if name == NULL {
            return Ok(Self::Null);
        }
        let parts = name.as_bytes().strip_prefix(b"blkdebug:");
        let parts = parts.and_then(|rest| Some(rest.split_at(rest.iter().position(|byte| *byte == b':')?)));
        let Some((rules, below)) = parts else { return resolve(name.as_bytes()).map(Self::File) };
        Ok(Self::Blkdebug {
            rules: (!rules.is_empty()).then(|| resolve(rules).map(Box::new)).transpose()?,
            image: resolve(&below[1..])?,
        })
    }

    /// The path that names in its own header are relative to.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(file) | Self::Blkdebug { image: file, .. } => &file.path,
            Self::Null => Path::new(NULL),
        }
    }
}

/// The rules in `file`.
pub(crate) fn read_rules(file: &Resolved) -> Result<BlkdebugOptions> {
    let open = FileOptions::new().lock(LockMode::Off).open_handle(&file.handle, &file.path)?;
    let wrong = |why: &dyn std::fmt::Display| {
        BlockError::new(ErrorKind::InvalidInput, "read rules")
            .in_file(file.path.display().to_string())
            .because(why.to_string())
    };
    let len = open.len()?;
    if len > MAX_CONFIG_BYTES {
        return Err(wrong(&format_args!("the file is longer than {MAX_CONFIG_BYTES} bytes")).into());
    }
    let mut text = vec![0; len as usize];
    open.read_at(&mut text, 0)?;
    let text = std::str::from_utf8(&text).map_err(|error| wrong(&error))?;
    let mut options = BlkdebugOptions::default();
    options.parse_config(text).map_err(|error| wrong(&error))?;
    Ok(options)
}
