//! Why an operation did not start, or did not end well.

use std::path::PathBuf;

use blockmirror_block as block;
use blockmirror_image as image;
use blockmirror_job::{JobError, Operation};
use blockmirror_mirror as mirror;
use blockmirror_qcow2 as qcow2;

/// Why an operation did not start or did not end well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An image was not opened.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// An image has no backing file.
    #[error("{}: it has no backing file", path.display())]
    NoBacking {
        /// The image.
        path: PathBuf,
    },
    /// An image of this format has no backing file.
    #[error("{}: a {format} image cannot have a backing file", path.display())]
    NotLayered {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: image::Format,
    },
    /// The base is no layer of the image's chain.
    #[error("{}: {} is not in its backing chain", path.display(), base.display())]
    NotInChain {
        /// The image.
        path: PathBuf,
        /// The name of the base.
        base: PathBuf,
    },
    /// An image that has to be written is read-only.
    #[error("{name} is read-only")]
    ReadOnly {
        /// The image's name.
        name: String,
    },
    /// The base is longer than what is committed to it: its last bytes would show where zeros were.
    #[error("{base} has {base_len} bytes, more than the {len} of {name}, which is to be committed to it")]
    BaseLonger {
        /// The base's name.
        base: String,
        /// Its length.
        base_len: u64,
        /// What is committed.
        name: String,
        /// Its length.
        len: u64,
    },
    /// The number of layers makes no sense.
    #[error("{layers} layers cannot be committed, only 1 or more")]
    NoLayers {
        /// What was asked.
        layers: u32,
    },
    /// Reading what is to be moved failed.
    #[error("cannot read: {0}")]
    Read(block::Error),
    /// Writing it to its new place failed.
    #[error("cannot write: {0}")]
    Write(block::Error),
    /// Ranges failed and were left out, as the `ignore` policy wants; the chain was left as it is.
    #[error("parts failed and were left out; the first because: {0}")]
    LeftOut(block::Error),
    /// Ranges failed and were left out, as the `ignore` policy wants; the image keeps what it holds.
    #[error("parts failed and were left out; the first because: {failed}")]
    Incomplete {
        /// Why the first of them failed.
        failed: String,
    },
    /// Everything is committed, but the image could not be emptied. It reads as before.
    #[error("everything is committed, but not all of it is removed from the image: {0}")]
    Empty(block::Error),
    /// The data was moved, but the image could not be put on its new base.
    #[error("cannot change the backing file: {0}")]
    Relink(qcow2::Error),
    /// The mirror job that does the work.
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    /// The operation was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The operating system gave no thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The thread died; what it was doing is unknown.
    #[error("the thread of the job panicked")]
    Panicked,
}

/// [`Error`], coarsely enough to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense; nothing was touched.
    InvalidInput,
    /// A device or an image failed.
    Device,
    /// Cancelled on request.
    Cancelled,
    /// Something of ours.
    Internal,
}

impl Error {
    /// What went wrong, for machines.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ReadOnly { .. }
            | Self::BaseLonger { .. }
            | Self::NoLayers { .. }
            | Self::NoBacking { .. }
            | Self::NotLayered { .. }
            | Self::NotInChain { .. } => ErrorKind::InvalidInput,
            Self::Image(_)
            | Self::Read(_)
            | Self::Write(_)
            | Self::LeftOut(_)
            | Self::Incomplete { .. }
            | Self::Empty(_)
            | Self::Relink(_) => ErrorKind::Device,
            Self::Mirror(error) => match error.kind() {
                mirror::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
                mirror::ErrorKind::Source | mirror::ErrorKind::Target | mirror::ErrorKind::NoSpace => {
                    ErrorKind::Device
                }
                mirror::ErrorKind::Cancelled => ErrorKind::Cancelled,
                _ => ErrorKind::Internal,
            },
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Thread(_) | Self::Panicked => ErrorKind::Internal,
        }
    }

    /// The device's own error, where one failed: its kind tells a lack of space from the rest.
    pub fn device_error(&self) -> Option<&block::Error> {
        match self {
            Self::Read(error) | Self::Write(error) | Self::LeftOut(error) | Self::Empty(error) => Some(error),
            Self::Image(error) => error.device_error(),
            Self::Relink(qcow2::Error::Storage(error)) => Some(error),
            Self::Mirror(error) => error.device_error(),
            _ => None,
        }
    }
}

impl JobError for Error {
    type Kind = ErrorKind;

    fn kind(&self) -> ErrorKind {
        self.kind()
    }

    fn device_error(&self) -> Option<&block::Error> {
        self.device_error()
    }

    fn cancelled() -> Self {
        Self::Cancelled
    }

    fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }

    fn panicked() -> Self {
        Self::Panicked
    }

    fn thread(error: std::io::Error) -> Self {
        Self::Thread(error)
    }

    fn failed(operation: Operation, error: block::Error) -> Self {
        match operation {
            Operation::Read => Self::Read(error),
            Operation::Write => Self::Write(error),
        }
    }

    fn left_out(error: block::Error) -> Self {
        Self::LeftOut(error)
    }
}
