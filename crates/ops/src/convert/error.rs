//! Why a conversion did not start, or did not succeed.

use std::io;
use std::path::PathBuf;

use blockmirror_block as block;
use blockmirror_checkpoint as checkpoint;
use blockmirror_image::{self as image, BackingSettingsError};
use blockmirror_mirror as mirror;

use super::verify::{Mismatch, Verify};

/// Why a [`Convert`](super::Convert) failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// An image was not opened or not made.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A disk failed outside of the copy.
    #[error(transparent)]
    Disk(#[from] block::Error),
    /// The settings of the new target are invalid.
    #[error(transparent)]
    Settings(image::Error),
    /// The settings about the backing file contradict each other.
    #[error("create: {}: {why}", target.display())]
    Backing {
        /// The target.
        target: PathBuf,
        /// What is wrong.
        why: BackingSettingsError,
    },
    /// The settings ask for another size than the source's.
    #[error("create: {}: the target has the size of the source, {len} bytes", target.display())]
    Size {
        /// The target.
        target: PathBuf,
        /// The source's length.
        len: u64,
    },
    /// There is no source.
    #[error("copy: the source is missing")]
    NoSource,
    /// The sources have several formats, and the target's is not given.
    #[error("copy: {}: the sources have several formats, and the target's is not given", target.display())]
    NoFormat {
        /// The target.
        target: PathBuf,
    },
    /// Several sources are copied whole: they share no backing file with a target.
    #[error(
        "copy: {}: several sources cannot be combined with {}",
        target.display(), if *with_backing { "a backing file" } else { "sync mode top" }
    )]
    SeveralSources {
        /// The target.
        target: PathBuf,
        /// Whether the target would get a backing file; otherwise the sync mode is top.
        with_backing: bool,
    },
    /// The persistent bitmaps of the source cannot be copied.
    #[error("copy: {}: {why}", target.display())]
    Bitmaps {
        /// The target.
        target: PathBuf,
        /// Why not.
        why: CopyBitmapsProblem,
    },
    /// A snapshot of several sources is not one of a single image.
    #[error("copy: {}: several sources cannot be combined with a snapshot", target.display())]
    SnapshotOfSeveral {
        /// The target.
        target: PathBuf,
    },
    /// Writing the target would change the source.
    #[error("copy: {}: it is part of the source {}", target.display(), source_path.display())]
    IsSource {
        /// The target, or its data file.
        target: PathBuf,
        /// The image that it is a file of.
        source_path: PathBuf,
    },
    /// The source's backing file cannot be named in the target's header.
    #[error("copy: {}: {}", target.display(), why)]
    BackingName {
        /// The target.
        target: PathBuf,
        /// Why not.
        why: String,
    },
    /// A path cannot be made absolute.
    #[error("look up: {}: {cause}", path.display())]
    LookUp {
        /// The path.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// The target's server has no flush command, and one is required.
    #[error("copy: {}: its server has no flush command", target.display())]
    NoFlush {
        /// The target.
        target: PathBuf,
    },
    /// The checkpoint that was named cannot be kept.
    #[error("copy: {}: it cannot have a checkpoint: {why}", target.display())]
    NoCheckpoint {
        /// The target.
        target: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// An interrupted copy is there, and what it is of has changed. It stays.
    #[error(
        "copy: {}: an interrupted copy cannot be gone on with: {what} ({})",
        target.display(), partial.display()
    )]
    Changed {
        /// The target.
        target: PathBuf,
        /// The temporary file of the interrupted copy.
        partial: PathBuf,
        /// What has changed.
        what: String,
    },
    /// What was copied of the source cannot be read there any more; the copy stays. One that leaves out what
    /// cannot be read goes on with it.
    #[error("copy: {}: an interrupted copy is not gone on with: {cause}", target.display())]
    SourceUnread {
        /// The target.
        target: PathBuf,
        /// Where, and why not.
        cause: block::Error,
    },
    /// The checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The mirror job failed or was cancelled, or a step after it failed; what is copied is kept.
    #[error(transparent)]
    Interrupted(Box<KeptCopy>),
    /// The mirror job was refused; the source was only read, and no target has lost what it held.
    #[error("copy: {0}")]
    Start(mirror::Error),
    /// The mirror job failed, or was cancelled.
    #[error("copy: {}: {cause}{}", target.display(), if *incomplete { "; the target is incomplete" } else { "" })]
    Copy {
        /// The target.
        target: PathBuf,
        /// Why.
        cause: mirror::Error,
        /// Whether the target still exists, with a part of the copy.
        incomplete: bool,
    },
    /// A copy of a part is to be verified by a hash, which is one of the whole disk.
    #[error("copy: {}: {why}, and a hash verifies the whole disk", target.display())]
    NoWholeHash {
        /// The target.
        target: PathBuf,
        /// What is left out.
        why: &'static str,
    },
    /// Blocks must be shared with the source, and the verification sees only what is copied.
    #[error(
        "copy: {}: blocks are to be shared always, and verification mode {} sees only what is copied",
        target.display(), mode.as_str()
    )]
    NotSharedVerified {
        /// The target.
        target: PathBuf,
        /// How it is to be verified.
        mode: Verify,
    },
    /// Some ranges alone are to be copied to a new image, which would have nothing in the others.
    #[error("copy: {}: ranges are copied to an image that exists", target.display())]
    OnlyInto {
        /// The target.
        target: PathBuf,
    },
    /// The copy could not be verified; a new image is gone then.
    #[error(
        "verify: {}: {cause}{}",
        target.display(),
        if *kept { "; the target is kept, and not verified" } else { "" }
    )]
    NotVerified {
        /// The target.
        target: PathBuf,
        /// Why not.
        cause: Box<image::Error>,
        /// Whether the target still exists.
        kept: bool,
    },
    /// The copy was verified, and is not equal to the source.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
}

/// What a conversion with a checkpoint has copied before it failed or was cancelled. It is kept under its
/// temporary name, and another conversion with the same checkpoint goes on from there.
#[derive(Debug, thiserror::Error)]
#[error("{cause}; {done} of {len} bytes are kept in {}", partial.display())]
#[non_exhaustive]
pub struct KeptCopy {
    /// The target.
    pub target: PathBuf,
    /// Why the copy ended, or did not get its name.
    pub cause: Box<ConvertError>,
    /// The temporary file.
    pub partial: PathBuf,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Bytes of the disk that need not be copied again.
    pub done: u64,
    /// Bytes of the disk.
    pub len: u64,
}

/// Why bitmaps cannot be copied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CopyBitmapsProblem {
    /// There are several sources.
    #[error("bitmaps are copied from a single source only")]
    SeveralSources,
    /// A snapshot is converted, and the bitmaps say what has changed on the disk.
    #[error("bitmaps are of the disk, and a snapshot is to be converted")]
    Snapshot,
    /// The source, or the target, is in a format without bitmaps.
    #[error("a {0} image has no bitmaps")]
    Format(image::Format),
    /// The target is a qcow2 image of version 2.
    #[error("an image of version 2 (compat=0.10) has no bitmaps")]
    Version2,
    /// A bitmap of the source misses writes.
    #[error("bitmap {0:?} of the source is inconsistent")]
    Inconsistent(String),
    /// The target has a bitmap of that name already.
    #[error("it has a bitmap {0:?} already")]
    Exists(String),
    /// The target has another length than the source, whose bits would not fit.
    #[error("its length is not that of the source, and bitmaps are to be copied")]
    OtherLength,
}

impl ConvertError {
    /// A job that was refused for a target that exists and is in `format`: the message names that, where the
    /// lengths do not fit.
    pub(super) fn refused(mut cause: mirror::Error, format: image::Format) -> Self {
        if let mirror::Error::SizeMismatch { target_name, .. } = &mut cause {
            *target_name = format!("{target_name} ({format})");
        }
        Self::Start(cause)
    }

    /// The error of a disk or a file that it is made of.
    pub fn device_error(&self) -> Option<&block::Error> {
        match self {
            Self::Image(error) | Self::Settings(error) => error.device_error(),
            Self::Disk(error) | Self::SourceUnread { cause: error, .. } => Some(error),
            Self::Start(cause) | Self::Copy { cause, .. } => cause.device_error(),
            Self::NotVerified { cause, .. } => cause.device_error(),
            Self::Interrupted(kept) => kept.cause.device_error(),
            Self::Checkpoint(checkpoint::Error::Storage(error)) => Some(error),
            _ => None,
        }
    }

    /// Whether the conversion was cancelled.
    pub fn is_cancelled(&self) -> bool {
        let of_disk = |error: &block::Error| error.kind() == block::ErrorKind::Cancelled;
        match self {
            Self::Start(cause) | Self::Copy { cause, .. } => cause.kind() == mirror::ErrorKind::Cancelled,
            Self::Interrupted(kept) => kept.cause.is_cancelled(),
            Self::Disk(error) => of_disk(error),
            Self::Image(error) => error.device_error().is_some_and(of_disk),
            Self::NotVerified { cause, .. } => cause.device_error().is_some_and(of_disk),
            _ => false,
        }
    }
}
