//! Which files may be opened: Landlock.
//!
//! A rule holds for the file that a name leads to when the sandbox is entered, not for the name: what takes
//! its place later cannot be opened.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};

use crate::Sandbox;
use crate::error::SandboxError;

pub(crate) fn restrict(sandbox: &Sandbox) -> Result<(), SandboxError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .map_err(SandboxError::NoLandlock)?
        // What later kernels can refuse as well: renames to other directories, truncation, devices' ioctls,
        // TCP, signals to others and their abstract sockets.
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    for path in &sandbox.read {
        ruleset = allow(ruleset, path, AccessFs::ReadFile.into())?;
    }
    for path in &sandbox.write {
        ruleset = allow(ruleset, path, write)?;
    }
    for path in &sandbox.create {
        ruleset = allow(ruleset, path, write | AccessFs::MakeReg | AccessFs::RemoveFile)?;
    }
    for path in &sandbox.rename {
        ruleset = allow(ruleset, path, AccessFs::MakeReg | AccessFs::RemoveFile)?;
    }
    ruleset.restrict_self()?;
    Ok(())
}

/// Allows `access` to what `path` leads to, and what lies below it.
fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, SandboxError> {
    let failed = |cause| SandboxError::Path { path: path.to_owned(), cause };
    let kind = match fs::metadata(path) {
        Ok(found) => found.file_type(),
        // The command says itself what it misses.
        Err(error) if is_missing(&error) => return Ok(ruleset),
        Err(error) => return Err(failed(error)),
    };
    let of_files = AccessFs::from_file(ABI::V5);
    let access = if kind.is_dir() {
        access | AccessFs::ReadDir
    } else if kind.is_block_device() {
        (access & of_files) | AccessFs::IoctlDev
    } else if kind.is_file() {
        access & of_files
    } else {
        // A pipe can have no rule, and nothing else holds an image: the command says so.
        return Ok(ruleset);
    };
    let file = PathFd::new(path).map_err(|error| failed(io::Error::other(error)))?;
    Ok(ruleset.add_rule(PathBeneath::new(file, access))?)
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
