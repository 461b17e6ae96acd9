//! Errors of parsing, opening and creating an image.
//!
//! Each says which field or option is wrong, its value, and what would be allowed. Reading and writing an
//! open image speaks [`blockmirror_block::Error`]; an [`enum@Error`] turns into one by `?` or
//! [`Error::in_file`].

use std::sync::Arc;

use blockmirror_block::{Error as BlockError, ErrorKind};
use thiserror::Error;

use crate::limits;
use crate::snapshot_ref::SnapshotRef;

/// The result of parsing, opening or creating an image.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image cannot be parsed, opened or created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The file does not start with the magic number.
    #[error("not a qcow2 image: it starts with {}, not with 51 46 49 fb", hex(.found))]
    NotQcow2 {
        /// The first bytes of the file, at most four.
        found: Vec<u8>,
    },
    /// A version other than 2 and 3.
    #[error("qcow2 version {version} is not supported, only versions 2 and 3 are")]
    Version {
        /// The version the header declares.
        version: u32,
    },
    /// A copy into the image, written in place, was interrupted.
    #[error("a copy into it was interrupted; what it holds is not complete")]
    Unfinished,
    /// The guest data is encrypted.
    #[error("the image is encrypted ({method}); encryption is not supported")]
    Encrypted {
        /// The method, by name.
        method: String,
    },
    /// Incompatible features that this version does not know.
    #[error("the image needs features that are not supported: {}", .names.join(", "))]
    UnknownFeatures {
        /// The bits of the header's field that are not known.
        bits: u64,
        /// Their names from the image's own table, or their numbers.
        names: Vec<String>,
    },
    /// A header field has a value that it cannot have.
    #[error("header field {field} is {value}: {allowed}")]
    HeaderField {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be allowed.
        allowed: String,
    },
    /// A header extension is damaged.
    #[error("header extension {name}: {problem}")]
    Extension {
        /// Which extension.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// An entry of the snapshot table or of the bitmap directory is damaged.
    #[error("{table}, entry {index} at offset {offset}: {problem}")]
    TableEntry {
        /// Which table.
        table: &'static str,
        /// Number of the entry, from 0.
        index: u32,
        /// Where it starts in the file.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The table of a persistent bitmap is damaged.
    #[error("bitmap {bitmap:?}, table at offset {offset}: {problem}")]
    BitmapTable {
        /// The name of the bitmap.
        bitmap: String,
        /// Where the table starts in the file.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// A persistent bitmap cannot be made, changed or read.
    #[error("bitmap {name:?}: {problem}")]
    Bitmap {
        /// Its name.
        name: String,
        /// Why not.
        problem: BitmapProblem,
    },
    /// Something is larger than a named limit.
    #[error("{what} is {value}, more than the limit of {limit}")]
    LimitExceeded {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        value: u64,
        /// How large it may be.
        limit: u64,
    },
    /// The image has no snapshot that is meant.
    #[error("there is no snapshot {wanted}")]
    NoSnapshot {
        /// Which one was asked for.
        wanted: SnapshotRef,
    },
    /// A snapshot was deleted, and what it alone used could not be freed: it leaks.
    #[error("the snapshot is deleted, and its clusters leak: {cause}")]
    SnapshotLeaks {
        /// What failed.
        cause: BlockError,
    },
    /// The image can be read, but must not be written.
    #[error("the image cannot be opened for writing: {0}")]
    NotWritable(WriteRefusal),
    /// A compressed cluster does not decompress to one cluster.
    #[error("damaged compressed cluster: {problem}")]
    Decompress {
        /// What is wrong with it.
        problem: String,
    },
    /// An option for creating an image is invalid, or contradicts another.
    #[error("option {option}: {problem}")]
    Option {
        /// The option's name, as `qemu-img create -o` spells it.
        option: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The storage below failed.
    #[error(transparent)]
    Storage(#[from] BlockError),
}

/// Why an image must not be written, although it can be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteRefusal {
    /// The image is marked corrupt.
    #[error("it is marked corrupt; repair it first")]
    Corrupt,
    /// The image was not closed cleanly, and a repair has left corruptions.
    #[error(
        "it is marked dirty (lazy refcounts, not closed cleanly), and a repair leaves {corruptions} errors"
    )]
    Dirty {
        /// How many.
        corruptions: u64,
    },
    /// The image has internal snapshots that hold something, and refcounts of one bit.
    #[error("it has internal snapshots, and its refcounts of one bit cannot say what they share")]
    SnapshotsUncounted,
}

/// Why a persistent bitmap cannot be made, changed or read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BitmapProblem {
    /// There is none of that name.
    #[error("there is no bitmap of that name")]
    NotFound,
    /// There is one of that name already.
    #[error("there is a bitmap of that name already")]
    Exists,
    /// It was in use and was not stored, so it misses writes.
    #[error("it is inconsistent: it was in use and was not stored; it can only be removed")]
    Inconsistent,
    /// The name is empty, or longer than [`limits::MAX_BITMAP_NAME`].
    #[error("its name has {0} bytes, 1 to {max} are allowed", max = limits::MAX_BITMAP_NAME)]
    NameLength(usize),
    /// The granularity is no power of two, or out of bounds.
    #[error("granularity {0}: a power of two from 512 to 2G is allowed")]
    Granularity(u64),
    /// It would have more bits than [`limits::MAX_BITMAP_BYTES`] hold.
    #[error("it would have {0} bytes of bits, more than the limit of {max}", max = limits::MAX_BITMAP_BYTES)]
    TooFine(u64),
    /// The directory would be larger than its limits.
    #[error("the image has as many bitmaps as its directory can have")]
    TooMany,
    /// The image has version 2, which has no bitmaps.
    #[error("an image of version 2 (compat=0.10) has no bitmaps")]
    Version2,
    /// The disk has no bytes.
    #[error("the disk has no bytes")]
    EmptyDisk,
    /// The bits to merge are those of a disk of another length.
    #[error("the disk has {own} bytes, that of the bits to merge {other}")]
    OtherLength {
        /// Bytes of the disk.
        own: u64,
        /// Bytes of the other one.
        other: u64,
    },
}

impl Error {
    /// What went wrong, for machines.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version { .. }
            | Self::Unfinished
            | Self::Encrypted { .. }
            | Self::UnknownFeatures { .. } => ErrorKind::Unsupported,
            Self::NotQcow2 { .. }
            | Self::HeaderField { .. }
            | Self::Extension { .. }
            | Self::TableEntry { .. }
            | Self::BitmapTable { .. }
            | Self::Decompress { .. } => ErrorKind::Corrupt,
            Self::LimitExceeded { .. } => ErrorKind::LimitExceeded,
            Self::NotWritable(_) => ErrorKind::ReadOnly,
            Self::NoSnapshot { .. } => ErrorKind::NotFound,
            Self::Option { .. } | Self::Bitmap { .. } => ErrorKind::InvalidInput,
            Self::Storage(e) | Self::SnapshotLeaks { cause: e } => e.kind(),
        }
    }

    /// The same as an error of the layers above, naming the file.
    pub fn in_file(self, name: &Arc<str>) -> BlockError {
        BlockError::from(self).or_in_file(name)
    }
}

impl From<WriteRefusal> for Error {
    fn from(refusal: WriteRefusal) -> Self {
        Self::NotWritable(refusal)
    }
}

impl From<Error> for BlockError {
    fn from(error: Error) -> Self {
        let operation = match &error {
            Error::Option { .. } => "create qcow2 image",
            Error::Decompress { .. } => "decompress",
            Error::Bitmap { .. } => "use persistent bitmap",
            Error::NoSnapshot { .. } => "find snapshot",
            Error::SnapshotLeaks { .. } => "delete snapshot",
            _ => "open qcow2 image",
        };
        match error {
            Error::Storage(e) => e,
            other => Self::new(other.kind(), operation).caused_by(other),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "nothing".into();
    }
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_kind_and_figures_on_the_way_up() {
        let e = Error::LimitExceeded { what: "L1 table", value: 99, limit: 32 };
        let up = e.in_file(&Arc::from("a.qcow2"));
        assert_eq!(up.kind(), ErrorKind::LimitExceeded);
        assert_eq!(up.to_string(), "open qcow2 image: a.qcow2: L1 table is 99, more than the limit of 32");
    }

    #[test]
    fn an_error_of_the_storage_passes_through_unchanged() {
        let below = BlockError::new(ErrorKind::NoSpace, "write").in_file("b").at(7);
        let up = Error::from(below).in_file(&Arc::from("a"));
        assert_eq!((up.kind(), up.name(), up.offset()), (ErrorKind::NoSpace, Some("b"), Some(7)));
    }

    #[test]
    fn a_file_that_is_too_short_says_so() {
        assert!(Error::NotQcow2 { found: vec![] }.to_string().contains("nothing"));
    }
}
