//! Why an image was not opened or made.
//!
//! Reading and writing an open image speaks [`blockmirror_block::Error`]. Each message here is one line that
//! names the operation, the file and the reason.

use std::path::PathBuf;

use thiserror::Error;

use crate::format::UnknownFormat;
use crate::options::OptionError;
use crate::reference::ReferenceError;

/// The result of opening, making or describing an image.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image was not opened, made or described.
///
/// The line has the cause in it, and `source()` is what the line lacks: a report that follows it prints
/// nothing twice.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed, or the bytes in it are refused by their format.
    #[error(transparent)]
    Block(#[from] blockmirror_block::Error),
    /// The image names a file that is not opened.
    #[error("open: {0}")]
    Reference(ReferenceError),
    /// The format was not given, and the file is in one that is not supported.
    #[error("open: {}: it is a {format} image, which is not supported", path.display())]
    ForeignFormat {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: &'static str,
    },
    /// The image names a format for its backing file that is not supported.
    #[error("open: {}: its backing file has an {cause}", path.display())]
    BackingFormat {
        /// The image.
        path: PathBuf,
        /// The format.
        cause: UnknownFormat,
    },
    /// The image keeps its data in another file and does not say in which.
    #[error("open: {}: its data is in an external file that it does not name", path.display())]
    NoDataFile {
        /// The image.
        path: PathBuf,
    },
    /// The image has no internal snapshots, and can have none: it is raw, or keeps its data in another file.
    #[error("snapshot: {}: such an image has no snapshots", path.display())]
    NoSnapshots {
        /// The image.
        path: PathBuf,
    },
    /// Compressed writes were asked for, and the image's format has no compressed data.
    #[error("open: {}: a raw image holds no compressed data", path.display())]
    NotCompressible {
        /// The image.
        path: PathBuf,
    },
    /// What looks like the URI of an export is none.
    #[cfg(feature = "nbd")]
    #[error("open: {}: {cause}", path.display())]
    Uri {
        /// The text.
        path: PathBuf,
        /// What is wrong.
        cause: blockmirror_nbd::UriError,
    },
    /// An option text was not understood.
    #[error("create: {}: {cause}", path.display())]
    Option {
        /// The image to be made.
        path: PathBuf,
        /// What is wrong.
        cause: OptionError,
    },
    /// An image cannot be made like this.
    #[error("create: {}: {why}", path.display())]
    Create {
        /// The image to be made.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The options of an image cannot be changed like this.
    #[error("amend: {}: {why}", path.display())]
    Amend {
        /// The image.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A disk would become shorter, which was not allowed.
    #[error("amend: {}: {size} bytes would cut off the last {} of {old}", path.display(), old - size)]
    WouldShrink {
        /// The image.
        path: PathBuf,
        /// The length that was asked for.
        size: u64,
        /// The length that the disk has, which is more.
        old: u64,
    },
    /// A file that is there already can be replaced or written in place, and either might surprise.
    #[error("create: {}: {why}", path.display())]
    TargetUnclear {
        /// The file.
        path: PathBuf,
        /// Why.
        why: blockmirror_file::Surprise,
    },
    /// A file that is there already would become the data file of a new image, and lose what it holds.
    #[error("create: {}: it exists, and would lose its contents as the data file of {}", path.display(), image.display())]
    DataFileExists {
        /// The file.
        path: PathBuf,
        /// The image to be made.
        image: PathBuf,
    },
    /// A file that is there already would be lost, and might be part of what the new image is to stand on.
    #[error(
        "create: {}: it exists, and may be part of the chain of {}, which cannot be followed: {source}",
        path.display(),
        backing.display()
    )]
    ChainUnknown {
        /// The file.
        path: PathBuf,
        /// The backing file of the new image.
        backing: PathBuf,
        /// Why its chain cannot be followed to the end.
        source: Box<Self>,
    },
    /// A target that is written in place has lost what it held, and the new image is not whole.
    #[error("{source}; the target is incomplete")]
    Incomplete {
        /// What failed.
        source: Box<Self>,
    },
    /// The layers of a chain have L1 tables that are too large together.
    #[error(
        "open: {}: with it the L1 tables of the chain have {bytes} bytes, more than {limit}",
        path.display()
    )]
    ChainTables {
        /// The image whose table no longer fits.
        path: PathBuf,
        /// The bytes of the tables down to it.
        bytes: u64,
        /// The most that is accepted, [`MAX_CHAIN_L1_BYTES`](crate::MAX_CHAIN_L1_BYTES).
        limit: u64,
    },
    /// A directory that files may be opened in cannot be looked up.
    #[error("look up directory: {}: {cause}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
}

impl Error {
    /// [`Error::Incomplete`] if `lost`: what was written in place has lost its old contents.
    #[must_use]
    pub fn incomplete_if(self, lost: bool) -> Self {
        match (lost, self) {
            (true, error @ Self::Incomplete { .. }) | (false, error) => error,
            (true, error) => Self::Incomplete { source: Box::new(error) },
        }
    }

    /// The error of a device or storage that it is made of.
    pub fn device_error(&self) -> Option<&blockmirror_block::Error> {
        match self {
            Self::Block(error) => Some(error),
            Self::Incomplete { source } | Self::ChainUnknown { source, .. } => source.device_error(),
            _ => None,
        }
    }
}

impl From<ReferenceError> for Error {
    fn from(error: ReferenceError) -> Self {
        Self::Reference(error)
    }
}
