//! What shows whether a storage is the same one later: of a file also whether it was written, which a block
//! device and an export do not show.
//!
//! Taken when a chain or a target is opened; a copy that goes on compares it with what an interrupted run has
//! noted.

use std::fmt;

use blockmirror_file::{DeviceStamp, FileStamp};
#[cfg(feature = "nbd")]
use blockmirror_nbd::NbdAddress;

/// Which storage it is. Equal texts are equal stamps.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorageStamp {
    /// A regular file.
    File(FileStamp),
    /// A block device.
    Device(DeviceStamp),
    /// An export of an NBD server: where it is, its name and its length.
    Export(String),
}

impl StorageStamp {
    /// Whether a storage that was written has another stamp.
    pub fn shows_writes(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// The same for a storage that may be written meanwhile.
    #[must_use]
    pub fn identity(self) -> Self {
        match self {
            Self::File(stamp) => Self::File(stamp.identity()),
            other => other,
        }
    }

    #[cfg(feature = "nbd")]
    pub(crate) fn of_export(address: &NbdAddress, export: &str, len: u64) -> Self {
        let server = match address {
            NbdAddress::Tcp { host, port } => format!("host {host:?} port {port}"),
            NbdAddress::Unix(path) => format!("socket {path:?}"),
            // No other address leads to a server by now; its text is as good as a name.
            other => format!("{other:?}"),
        };
        Self::Export(format!("export {export:?} {server} length {len}"))
    }
}

/// One line.
impl fmt::Display for StorageStamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(stamp) => stamp.fmt(f),
            Self::Device(stamp) => stamp.fmt(f),
            Self::Export(text) => f.write_str(text),
        }
    }
}
