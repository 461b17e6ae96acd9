//! Why a job did not start, or did not end well.

use std::sync::Arc;

use blockmirror_block::{self as block, BlockDevice};

use crate::granularity::GranularityError;

/// Why a mirror job did not start or did not end well.
///
/// The text is one line with the cause in it. `source()` is therefore `None`, as a report that follows it
/// would print the cause twice; [`device_error`](Self::device_error) is the cause for machines.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The granularity asked for is not one.
    #[error(transparent)]
    Granularity(#[from] GranularityError),
    /// Another option is out of range.
    #[error("{option} {value}: must be {expected}")]
    InvalidOption {
        /// The option's name, in the spelling of the command line.
        option: &'static str,
        /// What was asked.
        value: u64,
        /// What is accepted.
        expected: &'static str,
    },
    /// Source and target differ in length, or the target is shorter where it may be longer.
    #[error(
        "source {source_name} has {source_len} bytes, target {target_name} has {target_len}: {}",
        if *may_be_longer { "it must not be shorter" } else { "they must be equal" }
    )]
    SizeMismatch {
        /// The source's name.
        source_name: String,
        /// Its length in bytes.
        source_len: u64,
        /// The target's name.
        target_name: String,
        /// Its length in bytes.
        target_len: u64,
        /// Whether a longer target would do.
        may_be_longer: bool,
    },
    /// The target is longer, its backing file is not attached, and the source ends inside a cluster whose
    /// rest that file may hold.
    #[error(
        "{name}: what it holds at {} to {} is not known, as its backing file is not attached, and would be lost: \
         the source ends in the same cluster",
        tail.start(), tail.end()
    )]
    HiddenTail {
        /// The target's name.
        name: String,
        /// The bytes that are not known.
        tail: block::ByteRange,
    },
    /// Source and target are one disk.
    #[error("{name} is source and target")]
    SameDevice {
        /// The device that both lead to.
        name: String,
    },
    /// The source of a job without a tap has a tap in it, and the job would miss what is written through it.
    #[error("{name} is a tap: a job that is to see its writes is attached to it")]
    SourceIsTap {
        /// The tap's name.
        name: String,
    },
    /// Blocks must be shared ([`Reflink::Always`](crate::Reflink::Always)), and nothing of the source can be.
    #[error(
        "target {target_name} can share no blocks with source {source_name}: it takes data that is stored as it \
         is, in files of one file system with reflinks"
    )]
    NothingShared {
        /// The source's name.
        source_name: String,
        /// The target's name.
        target_name: String,
    },
    /// The target does not accept writes.
    #[error("target {name} is read-only")]
    TargetReadOnly {
        /// The target's name.
        name: String,
    },
    /// Bitmap and sync mode do not fit together.
    #[error("{why}")]
    SyncBitmap {
        /// What does not fit.
        why: &'static str,
    },
    /// The sync mode lives on what a tap sees.
    #[error("sync modes none, incremental and bitmap need a tap in front of the source")]
    NeedsTap,
    /// The tap has no bitmap of that name.
    #[error("{disk} has no bitmap {name:?}")]
    NoBitmap {
        /// The disk's name.
        disk: String,
        /// The bitmap's name.
        name: String,
    },
    /// The tap has a bitmap of that name already, or as many as it keeps.
    #[error("{disk}: bitmap {name:?} exists already, or is one too many")]
    BitmapExists {
        /// The disk's name.
        disk: String,
        /// The bitmap's name.
        name: String,
    },
    /// A job works from the bitmap, or a caller reads it.
    #[error("{disk}: bitmap {name:?} is in use")]
    BitmapBusy {
        /// The disk's name.
        disk: String,
        /// The bitmap's name.
        name: String,
    },
    /// The disk below the tap refused.
    #[error(transparent)]
    Disk(block::Error),
    /// A pivot, or another caller, has put another disk below the tap since it was drained.
    #[error("{disk}: another disk lies below it since it was drained")]
    DiskChanged {
        /// The name of the disk that lies below now.
        disk: String,
    },
    /// A job runs on this tap, and stands in the way.
    #[error("{disk} is being mirrored")]
    Busy {
        /// The disk's name.
        disk: String,
    },
    /// The source failed, and the policy was to report it.
    #[error("cannot read the source: {0}")]
    Source(block::Error),
    /// The target failed, and the policy was to report it.
    #[error("cannot write the target: {0}")]
    Target(block::Error),
    /// The log of the job ([`LiveLog`](crate::LiveLog)) failed.
    #[error("cannot write the log: {0}")]
    Log(Arc<block::Error>),
    /// The disk has another log, which stays with it.
    #[error("{disk} has the log {log}")]
    LogAttached {
        /// The disk's name.
        disk: String,
        /// The log's name.
        log: String,
    },
    /// A job with a log copies the whole disk.
    #[error("a log goes with sync mode full only")]
    LogSync,
    /// The members of a group pivot together, and each log would have to end before any of them.
    #[error("{disk} has a log, or is to get one: it is no member of a group")]
    LogInGroup {
        /// The disk's name.
        disk: String,
    },
    /// The log cannot be attached while a write is under way, and one does not end.
    #[error("{disk}: a write of the guest does not end")]
    WriteHangs {
        /// The disk's name.
        disk: String,
    },
    /// So many scattered ranges failed under the `ignore` policy that the list of them was full.
    #[error("gave up more than {limit} separate ranges; the last one because: {cause}")]
    TooManyGivenUp {
        /// The cap on the list.
        limit: usize,
        /// The last failure.
        cause: block::Error,
    },
    /// The job was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Another member of the job's group was cancelled or failed, and they end together or not at all.
    #[error("cancelled with its group: {member}: {cause}")]
    Group {
        /// The name of the disk whose job was cancelled or failed.
        member: String,
        /// Why, in one line.
        cause: String,
    },
    /// Two members of a group write to one target.
    #[error("{name} is the target of two members of the group")]
    SharedTarget {
        /// The target's name.
        name: String,
    },
    /// The operating system gave no thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A thread of the job died; what it was doing is unknown.
    #[error("a thread of the job panicked")]
    Panicked,
}

/// [`Error`], coarsely enough to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense; nothing was touched.
    InvalidInput,
    /// Reading the source failed.
    Source,
    /// Writing the target failed.
    Target,
    /// There is no space left on the disk that failed: in practice the target.
    NoSpace,
    /// Writing the log of the job failed.
    Log,
    /// Cancelled on request.
    Cancelled,
    /// Something in the process itself failed.
    Internal,
}

impl Error {
    /// [`Error::SizeMismatch`] of these two.
    pub(crate) fn size_mismatch(
        source: &dyn BlockDevice,
        target: &dyn BlockDevice,
        may_be_longer: bool,
    ) -> Self {
        Self::SizeMismatch {
            source_name: source.name().to_owned(),
            source_len: source.len(),
            target_name: target.name().to_owned(),
            target_len: target.len(),
            may_be_longer,
        }
    }

    /// The failure of a disk that this error is made of.
    pub fn device_error(&self) -> Option<&block::Error> {
        match self {
            Self::Disk(error) | Self::Source(error) | Self::Target(error) => Some(error),
            Self::TooManyGivenUp { cause, .. } => Some(cause),
            Self::Log(error) => Some(error),
            _ => None,
        }
    }

    /// What went wrong, for machines.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Granularity(_)
            | Self::InvalidOption { .. }
            | Self::SizeMismatch { .. }
            | Self::HiddenTail { .. }
            | Self::SameDevice { .. }
            | Self::SourceIsTap { .. }
            | Self::NothingShared { .. }
            | Self::TargetReadOnly { .. }
            | Self::SyncBitmap { .. }
            | Self::NeedsTap
            | Self::NoBitmap { .. }
            | Self::BitmapExists { .. }
            | Self::BitmapBusy { .. }
            | Self::DiskChanged { .. }
            | Self::LogAttached { .. }
            | Self::LogSync
            | Self::LogInGroup { .. }
            | Self::WriteHangs { .. }
            | Self::Disk(_)
            | Self::SharedTarget { .. }
            | Self::Busy { .. } => ErrorKind::InvalidInput,
            Self::Source(error) | Self::Target(error) if error.kind() == block::ErrorKind::NoSpace => {
                ErrorKind::NoSpace
            }
            Self::Source(_) => ErrorKind::Source,
            Self::Log(_) => ErrorKind::Log,
            Self::Target(_) | Self::TooManyGivenUp { .. } => ErrorKind::Target,
            Self::Cancelled | Self::Group { .. } => ErrorKind::Cancelled,
            Self::Thread(_) | Self::Panicked => ErrorKind::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_cause_is_printed_once_and_kept() {
        let disk = block::Error::io("write", std::io::Error::from_raw_os_error(28)).in_file("copy.raw");
        let error = Error::Target(disk);
        let line = "cannot write the target: write: copy.raw: No space left on device (os error 28)";
        assert_eq!(error.to_string(), line);
        assert!(error.source().is_none(), "a report that follows the chain would print it again");
        assert_eq!(error.device_error().map(block::Error::kind), Some(block::ErrorKind::NoSpace));
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let other = Error::Target(block::Error::new(block::ErrorKind::Io, "write"));
        assert_eq!(other.kind(), ErrorKind::Target);
    }
}
