//! From the options about opening files to a policy.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmirror_image::{Error, NbdOptions, ReferencePolicy, directory_of};

use crate::args::AccessArgs;
use crate::failure::Outcome;

/// Files in or below the directory of `image`, and what `--allow-backing` adds.
pub(crate) fn policy(image: &Path, args: &AccessArgs) -> Outcome<ReferencePolicy> {
    policy_with(image, &args.allow_backing)
}

/// Files in or below the directory of `image`, and those in or below `allowed`.
pub(crate) fn policy_with(image: &Path, allowed: &[PathBuf]) -> Outcome<ReferencePolicy> {
    let mut policy = ReferencePolicy::beside(image).map_err(no_directory(directory_of(image)))?;
    for directory in allowed {
        policy.allow_dir(directory).map_err(no_directory(directory))?;
    }
    Ok(policy)
}

/// How NBD servers are connected to.
pub(crate) fn nbd(args: &AccessArgs) -> NbdOptions {
    let mut options = NbdOptions::new();
    options.connections = args.connections;
    options.reconnect_delay = Duration::from_secs(args.reconnect_delay.into());
    options.open_timeout = Duration::from_secs(args.open_timeout.into());
    options
}

/// The error for a directory that cannot be looked up.
pub(crate) fn no_directory(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Directory { path, source }
}
