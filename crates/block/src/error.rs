//! One error type for all I/O on disks: a kind for machines, and for people the operation, the file, the
//! offset and the cause.
//!
//! Format crates have their own errors for opening and creating; at the [`BlockDevice`](crate::BlockDevice)
//! and [`Storage`](crate::Storage) borders everything is this type.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::Arc;

/// A boxed cause.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// The result of an operation on a disk or a storage.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, coarsely enough to act on.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request reaches past the end of the disk, or past the 64-bit space.
    OutOfBounds,
    /// The device was opened read-only, or refuses writes for the reason in the message.
    ReadOnly,
    /// No space left on the device below (`ENOSPC`, `EDQUOT`).
    NoSpace,
    /// The device below failed.
    Io,
    /// The device cannot do this at all.
    Unsupported,
    /// The bytes on disk contradict the format.
    Corrupt,
    /// The caller asked for something that makes no sense.
    InvalidInput,
    /// An earlier failure left the state unknown; nothing is done any more.
    Poisoned,
    /// Another process or user holds the image.
    Locked,
    /// The file does not exist.
    NotFound,
    /// The file exists already.
    AlreadyExists,
    /// The operating system or a policy does not allow it.
    PermissionDenied,
    /// A named limit would be passed.
    LimitExceeded,
    /// The operation was given up on request.
    Cancelled,
    /// A flush found out that writes since the last good one may be lost. The device is there, and what is
    /// written to it again and flushed will last.
    WritesLost,
    /// The file ends before the place where the data lies: it was cut short. A guest may see zeros there; a
    /// copy would be wrong.
    CutShort,
}

impl ErrorKind {
    /// A short, stable description.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OutOfBounds => "out of bounds",
            Self::ReadOnly => "read-only",
            Self::NoSpace => "no space left",
            Self::Io => "I/O error",
            Self::Unsupported => "not supported",
            Self::Corrupt => "corrupt image",
            Self::InvalidInput => "invalid request",
            Self::Poisoned => "poisoned by an earlier failure",
            Self::Locked => "in use",
            Self::NotFound => "not found",
            Self::AlreadyExists => "exists already",
            Self::PermissionDenied => "not permitted",
            Self::LimitExceeded => "limit exceeded",
            Self::Cancelled => "cancelled",
            Self::WritesLost => "writes may be lost",
            Self::CutShort => "cut short",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed operation. One pointer wide, so that results stay small.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    name: Option<Arc<str>>,
    offset: Option<u64>,
    message: Option<String>,
    source: Option<BoxError>,
    refused: bool,
}

impl Error {
    /// An error of `kind` in `operation` (a verb phrase: `"read"`, `"write L2 table"`).
    pub fn new(kind: ErrorKind, operation: &'static str) -> Self {
        Self(Box::new(Inner {
            kind,
            operation,
            name: None,
            offset: None,
            message: None,
            source: None,
            refused: kind == ErrorKind::NoSpace,
        }))
    }

    /// Wraps an operating-system error, deriving the kind from it.
    pub fn io(operation: &'static str, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self::new(kind, operation).caused_by(error)
    }

    /// The error for a request that reaches past a disk of `len` bytes.
    pub fn out_of_bounds(operation: &'static str, offset: u64, request: u64, len: u64) -> Self {
        Self::new(ErrorKind::OutOfBounds, operation)
            .at(offset)
            .because(format!("{request} bytes at {offset} reach past the end at {len}"))
    }

    /// Names the file or device.
    #[must_use]
    pub fn in_file(mut self, name: impl Into<Arc<str>>) -> Self {
        self.0.name = Some(name.into());
        self
    }

    /// Names the file or device unless a layer below has done so already.
    #[must_use]
    pub fn or_in_file(mut self, name: &Arc<str>) -> Self {
        self.0.name.get_or_insert_with(|| Arc::clone(name));
        self
    }

    /// Adds the byte offset.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset = Some(offset);
        self
    }

    /// Adds an explanation, with the figures in it.
    #[must_use]
    pub fn because(mut self, message: impl Into<String>) -> Self {
        self.0.message = Some(message.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says whether [`was_refused`](Self::was_refused).
    #[must_use]
    pub fn refused(mut self, refused: bool) -> Self {
        self.0.refused = refused;
        self
    }

    /// Whether what was refused is not performed later either: a device has answered so. Of other failures
    /// (the peer is lost, the caller is cancelled, the medium fails) this is not known. For want of space it
    /// is so unless the device says otherwise.
    pub fn was_refused(&self) -> bool {
        self.0.refused
    }

    /// The error that this one wraps, printed or not.
    pub fn cause(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|s| s.as_ref() as &(dyn StdError + 'static))
    }

    /// What went wrong, for machines.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The operation that failed.
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The file or device it failed on, if known.
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// The byte offset it failed at, if it has one.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The explanation, if there is one.
    pub fn message(&self) -> Option<&str> {
        self.0.message.as_deref()
    }
}

/// One line: `write: disk.qcow2 at 65536: <why>`. The cause is part of the line only when there is no
/// explanation of our own; it stays reachable through `source()`.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        f.write_str(e.operation)?;
        if let Some(name) = &e.name {
            write!(f, ": {name}")?;
        }
        if let Some(offset) = e.offset {
            write!(f, " at {offset}")?;
        }
        match (&e.message, &e.source) {
            (Some(message), _) => write!(f, ": {message}"),
            (None, Some(source)) => write!(f, ": {source}"),
            (None, None) => write!(f, ": {}", e.kind),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {self}", self.0.kind)?;
        if let Some(source) = &self.0.source {
            write!(f, "; {source:?}")?;
        }
        f.write_str(")")
    }
}

impl StdError for Error {
    /// The cause, if the line does not print it already: a report that follows the chain would print it
    /// twice.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.message.as_ref().and_then(|_| self.cause())
    }
}

/// For callers that speak `std::io`. The kind is the nearest one; the error is the payload
/// ([`get_ref`](io::Error::get_ref)), so the line stays.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::OutOfBounds | ErrorKind::InvalidInput => io::ErrorKind::InvalidInput,
            ErrorKind::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            ErrorKind::NoSpace => io::ErrorKind::StorageFull,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::Corrupt => io::ErrorKind::InvalidData,
            ErrorKind::CutShort => io::ErrorKind::UnexpectedEof,
            ErrorKind::Locked => io::ErrorKind::ResourceBusy,
            ErrorKind::NotFound => io::ErrorKind::NotFound,
            ErrorKind::AlreadyExists => io::ErrorKind::AlreadyExists,
            ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
            // Not `Interrupted`: callers of `std::io` try that again.
            ErrorKind::Io
            | ErrorKind::Poisoned
            | ErrorKind::LimitExceeded
            | ErrorKind::Cancelled
            | ErrorKind::WritesLost => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_operation_file_offset_and_cause() {
        let e = Error::io("read", io::Error::from_raw_os_error(5)).in_file("disk.raw").at(512);
        assert_eq!(e.to_string(), "read: disk.raw at 512: Input/output error (os error 5)");
        assert_eq!(e.kind(), ErrorKind::Io);
        assert!(e.source().is_none(), "the line has the cause in it");
        assert_eq!(
            e.cause().and_then(|cause| cause.downcast_ref()).and_then(io::Error::raw_os_error),
            Some(5)
        );
        let explained = e.because("the disk is gone");
        assert_eq!(explained.to_string(), "read: disk.raw at 512: the disk is gone");
        assert!(explained.source().is_some(), "the line does not have it");
    }

    #[test]
    fn std_callers_keep_kind_and_line() {
        let error = Error::io("write", io::Error::from_raw_os_error(28)).in_file("disk.raw");
        let line = error.to_string();
        let io = io::Error::from(error);
        assert_eq!((io.kind(), io.to_string()), (io::ErrorKind::StorageFull, line));
        // And back again, as from a `Read` over a disk.
        assert_eq!(Error::io("read", io).kind(), ErrorKind::NoSpace);
        let cancelled = io::Error::from(Error::new(ErrorKind::Cancelled, "read"));
        assert_ne!(cancelled.kind(), io::ErrorKind::Interrupted, "std would try again for ever");
    }

    #[test]
    fn kinds_come_from_the_system_error() {
        assert_eq!(Error::io("write", io::Error::from_raw_os_error(28)).kind(), ErrorKind::NoSpace);
        assert_eq!(Error::out_of_bounds("read", 8, 4, 10).kind(), ErrorKind::OutOfBounds);
    }
}
