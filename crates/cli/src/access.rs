//! From the options about opening files to a policy.

use std::io;
use std::path::Path;

use blockmirror_image::{Error, ReferencePolicy, directory_of};

use crate::args::AccessArgs;
use crate::failure::Outcome;

/// Files in or below the directory of `image`, and what `--allow-backing` adds.
pub(crate) fn policy(image: &Path, args: &AccessArgs) -> Outcome<ReferencePolicy> {
    let mut policy = ReferencePolicy::beside(image).map_err(no_directory(directory_of(image)))?;
    for directory in &args.allow_backing {
        policy.allow_dir(directory).map_err(no_directory(directory))?;
    }
    Ok(policy)
}

/// The error for a directory that cannot be looked up.
pub(crate) fn no_directory(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Directory { path, source }
}
