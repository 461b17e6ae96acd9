//! Options of `mirror` and `convert` about verifying what was copied.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Whether and how a copy is verified.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Verify the copy before a new target gets its name. The target is flushed, opened anew and read past
    /// the host's page cache: with O_DIRECT, or where the file system refuses that, once its cached pages are
    /// dropped; an NBD target is read from its server after a FLUSH. What differs is listed, the target is
    /// kept, and the exit code is 5
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Verifying")]
    pub(crate) verify: Option<VerifyMode>,

    /// With --verify: write the ranges that differ to FILE, one JSON object per line (`start`, `length`), for
    /// --only. FILE must not exist; it is empty if nothing differs
    #[arg(long, value_name = "FILE", requires = "verify", help_heading = "Verifying")]
    pub(crate) ranges: Option<PathBuf>,

    /// With -n: copy only the ranges in FILE, as `compare --ranges` and --verify write them
    #[arg(long, value_name = "FILE", requires = "no_create", help_heading = "Copying")]
    pub(crate) only: Option<PathBuf>,
}

/// How a copy is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyMode {
    /// read each write back after a flush. Proves that the medium took what was written, not that it can be
    /// found again
    Readback,
    /// hash the source while it is copied, then the target. Proves that the target holds what was read of
    /// the source; prints the hash that `blockmirror hash` prints of both
    Hash,
    /// read source and target again and compare them. Proves that both read the same when the copy ends
    Full,
}
