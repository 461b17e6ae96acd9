//! Why a sandbox was not entered.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a sandbox was not entered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The process has other threads, which would stay outside.
    #[error("sandbox: the process has {0} threads, and only one can be confined")]
    Threads(usize),
    /// Whether it has is not known.
    #[error("sandbox: threads cannot be counted: {0}")]
    CountThreads(io::Error),
    /// The kernel has no Landlock (Linux 5.13), or it is not among its active security modules.
    #[error("sandbox: this kernel has no Landlock: {0}")]
    NoLandlock(landlock::RulesetError),
    /// The kernel refuses the rules about files.
    #[error("sandbox: Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// A file or directory that may be opened cannot be looked up.
    #[error("sandbox: {}: {cause}", path.display())]
    Path {
        /// Its name.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// The kernel has no seccomp, or refuses the filter.
    #[error("sandbox: seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// There is no filter for this kind of processor.
    #[error("sandbox: seccomp: {0}")]
    Machine(seccompiler::BackendError),
    /// A limit of the process cannot be set.
    #[error("sandbox: limit of {what}: {cause}")]
    Resource {
        /// Of what.
        what: &'static str,
        /// Why not.
        cause: io::Error,
    },
}

impl From<seccompiler::BackendError> for SandboxError {
    fn from(error: seccompiler::BackendError) -> Self {
        Self::Machine(error)
    }
}
