//! How the options about opening images become locks, NBD options and reference policies.

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockmirror_image::{AllowedReferences, LockMode, NbdOptions, OpenOptions, ReferencePolicy};

use crate::args::{AccessArgs, ChainArgs, LimitsArgs, LockArgs, Switch};
use crate::failure::{Failure, Outcome};

/// The environment variable that lists directories as `--allow-backing` does, separated by colons.
const ALLOW_BACKING: &str = "BLOCKMIRROR_ALLOW_BACKING";

/// What images may name on the word of the command line and of the environment.
pub(crate) fn allowed(args: &AccessArgs) -> Outcome<AllowedReferences> {
    let beside = args.limits.limits.is_none();
    Ok(allowed_dirs(&args.allow_backing)?.protocols(args.allow_protocols).beside(beside))
}

/// The same for a command that changes a chain.
pub(crate) fn allowed_of_chain(args: &ChainArgs) -> Outcome<AllowedReferences> {
    Ok(allowed_dirs(&args.allow_backing)?.protocols(args.allow_protocols))
}

/// The files in or below `directories`; for reading also what the environment adds: a permission that lasts
/// is not one to write.
pub(crate) fn allowed_dirs(directories: &[PathBuf]) -> Outcome<AllowedReferences> {
    let allowed = directories.iter().fold(AllowedReferences::new(), AllowedReferences::dir);
    let lasting = lasting_directories();
    if lasting.is_err() {
        // An option that is wrong is reported before the environment: that failure has another exit code.
        allowed.policy_for(Path::new("/"))?;
    }
    Ok(lasting?.into_iter().fold(allowed, AllowedReferences::dir_to_read))
}

/// The policy for `image` under `args`.
pub(crate) fn policy(image: &Path, args: &AccessArgs) -> Outcome<ReferencePolicy> {
    Ok(allowed(args)?.policy_for(image)?)
}

/// Whether the environment lists directories.
pub(crate) fn is_narrowed() -> bool {
    std::env::var_os(ALLOW_BACKING).is_some_and(|directories| !directories.is_empty())
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

/// How an image is opened that is only read.
pub(crate) fn of_source(args: &AccessArgs) -> OpenOptions {
    let lock = match lock(args.lock) {
        LockMode::Exclusive if args.force_share => LockMode::Shared,
        lock => lock,
    };
    limited(OpenOptions::new().lock(lock).nbd(nbd(args)), args.limits)
}

/// `options` with the limits for images from strangers, if there are any.
pub(crate) fn limited(options: OpenOptions, args: LimitsArgs) -> OpenOptions {
    match args.limits {
        Some(limits) => options.max_depth(limits.depth).max_virtual_size(limits.size),
        None => options,
    }
}

/// How an image is opened that is written.
pub(crate) fn of_target(args: &AccessArgs) -> OpenOptions {
    OpenOptions::new().lock(lock(args.lock)).nbd(nbd(args))
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
    if !options.open_timeout.is_zero() {
        options.started_server_timeout = options.open_timeout;
    }
    options.io_timeout = args.io_timeout.map(|seconds| Duration::from_secs(seconds.into()));
    options
}
