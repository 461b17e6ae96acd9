//! What uses the files that a confined command writes: asked before the process is confined, because from
//! inside other processes cannot be seen, and what cannot be seen would count as not there.
//!
//! Called by [`super::enter`] with names that were typed; no byte of an image is read. What must hold: a file
//! is not replaced while another process, a loop device or a mount has it open, and not written at all while
//! it is in use as a disk.

use std::path::{Path, PathBuf};

use blockmirror_image::{FileHolder, FileId};

use crate::args::TargetArgs;
use crate::failure::{Failure, Outcome};

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// Replaced, if nothing has it open.
    Replaced,
    /// In place, or replaced whatever has it open; not while it is in use as a disk.
    InPlace,
    /// In place, in use or not (`--force`).
    Forced,
}

impl Written {
    /// A target that is made, unless it exists.
    pub(super) fn target(existing: TargetArgs, is_device: bool) -> Self {
        match existing.in_place || existing.atomic || is_device {
            true => Self::existing_image(existing),
            false => Self::Replaced,
        }
    }

    /// A target that exists.
    pub(super) fn existing_image(existing: TargetArgs) -> Self {
        if existing.force { Self::Forced } else { Self::InPlace }
    }
}

/// What is to be looked at before the process is confined.
#[derive(Debug, Default)]
pub(super) struct Unseen {
    written: Vec<(PathBuf, Written)>,
    /// Temporary files of interrupted runs are to be removed, whose names are not known yet.
    pub(super) clean: bool,
}

impl Unseen {
    /// `path` is written as `how` says.
    pub(super) fn add(&mut self, path: &Path, how: Written) {
        self.written.push((path.to_owned(), how));
    }

    /// Fails if one of the files is in use in a way that the command would have to see.
    pub(super) fn check(&self) -> Outcome<()> {
        if self.clean {
            return Err(Failure::usage(
                "--limits: --clean: from the sandbox it cannot be seen what has a temporary file open",
            ));
        }
        for (path, how) in &self.written {
            let Some(holder) = FileId::of(path).and_then(FileHolder::of) else { continue };
            let hint = match (how, holder.forbids_writing()) {
                (Written::Forced, _) if holder != FileHolder::Swap => continue,
                (_, true) => "",
                (Written::Replaced, false) => "; give --in-place, or --atomic to replace it",
                (Written::InPlace | Written::Forced, false) => continue,
            };
            return Err(Failure::failed(format_args!("--limits: {}: {holder}{hint}", path.display())));
        }
        Ok(())
    }
}
