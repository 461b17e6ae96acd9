//! Why a log is not made, opened or extended.

use blockmirror_block as block;

/// Why a log is not made, opened or extended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Its storage failed.
    #[error(transparent)]
    Storage(#[from] block::Error),
    /// It is no log.
    #[error("{name}: it is no checkpoint")]
    NoCheckpoint {
        /// The storage.
        name: String,
    },
    /// The first bytes are those of a log, and no header is valid: its creation was interrupted.
    #[error("{name}: the checkpoint was not begun")]
    NotBegun {
        /// The storage.
        name: String,
    },
    /// A later version of the format.
    #[error("{name}: it is a checkpoint of version {version}, which is not supported")]
    Version {
        /// The storage.
        name: String,
        /// The version.
        version: u32,
    },
    /// The log of something else: a copy, where a live job's was asked for, or the other way round.
    #[error("{name}: it is a log of kind {kind}, which is of no use here")]
    OtherKind {
        /// The storage.
        name: String,
        /// The kind: 1 a copy, 2 a live job.
        kind: u32,
    },
    /// The log has [ended](crate::ActivityLog::end).
    #[error("{name}: the log has ended")]
    Ended {
        /// The storage.
        name: String,
    },
    /// A part that must be whole is not.
    #[error("{name}: the checkpoint is damaged: {what}")]
    Damaged {
        /// The storage.
        name: String,
        /// The part, and what is wrong with it.
        what: &'static str,
    },
    /// A region is marked with a digest and the log has none, or the other way round.
    #[error("{name}: all of its regions are marked with a digest, or none")]
    NoDigest {
        /// The storage.
        name: String,
    },
    /// The regions, or the identity, are outside of what the format can hold.
    #[error("{name}: no checkpoint can hold {what}")]
    TooLarge {
        /// The storage.
        name: String,
        /// What.
        what: &'static str,
    },
}
