//! From the options about opening files to a policy.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmirror_image::{Error, LockMode, NbdOptions, ReferencePolicy, directory_of};

use crate::args::{AccessArgs, LockArgs, Switch};
use crate::failure::{Failure, Outcome};

/// The environment variable that lists directories as `--allow-backing` does, separated by colons.
const ALLOW_BACKING: &str = "BLOCKMIRROR_ALLOW_BACKING";

/// Files in or below the directory of `image`, and what `--allow-backing` adds.
pub(crate) fn policy(image: &Path, args: &AccessArgs) -> Outcome<ReferencePolicy> {
    let mut policy = policy_with(image, &args.allow_backing)?;
    if args.allow_protocols {
        policy.allow_protocols();
    }
    Ok(policy)
}

/// Files in or below the directory of `image`, and those in or below `allowed`; for reading also what the
/// environment adds: a permission that lasts is not one to write.
pub(crate) fn policy_with(image: &Path, allowed: &[PathBuf]) -> Outcome<ReferencePolicy> {
    let mut policy = ReferencePolicy::beside(image).map_err(no_directory(directory_of(image)))?;
    for directory in allowed {
        policy.allow_dir(directory).map_err(no_directory(directory))?;
    }
    for directory in lasting_directories()? {
        policy.allow_dir_to_read(&directory).map_err(no_directory(&directory))?;
    }
    Ok(policy)
}

/// The directories that the environment lists. A permission that lasts names directories that are not there
/// on each host, or not yet: those are left out.
pub(crate) fn lasting_directories() -> Outcome<Vec<PathBuf>> {
    let mut all = Vec::new();
    let lasting = std::env::var_os(ALLOW_BACKING).unwrap_or_default();
    for directory in std::env::split_paths(&lasting).filter(|directory| !directory.as_os_str().is_empty()) {
        if !directory.is_absolute() {
            return Err(Failure::usage(format_args!(
                "{ALLOW_BACKING}: {}: it is not an absolute path",
                directory.display()
            )));
        }
        if directory.is_dir() {
            all.push(directory);
        }
    }
    Ok(all)
}

/// How the files of an image are locked that is only read.
pub(crate) fn lock_of_source(args: &AccessArgs) -> LockMode {
    match lock(args.lock) {
        LockMode::Exclusive if args.force_share => LockMode::Shared,
        lock => lock,
    }
}

/// How files that are written are locked.
pub(crate) fn lock(args: LockArgs) -> LockMode {
    match args.lock {
        Switch::On => LockMode::Exclusive,
        Switch::Off => LockMode::Off,
    }
}

/// How NBD servers are connected to.
pub(crate) fn nbd(args: &AccessArgs) -> NbdOptions {
    let mut options = NbdOptions::new();
    options.connections = args.connections;
    options.reconnect_delay = Duration::from_secs(args.reconnect_delay.into());
    options.open_timeout = Duration::from_secs(args.open_timeout.into());
    options.io_timeout = args.io_timeout.map(|seconds| Duration::from_secs(seconds.into()));
    options
}

/// The error for a directory that cannot be looked up.
pub(crate) fn no_directory(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Directory { path, cause }
}
