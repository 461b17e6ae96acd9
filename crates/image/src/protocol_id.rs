//! Which file or export a name leads to, without opening it.
//!
//! Called where the layers of a chain are compared, and where a name may be the URI of an export.

use std::path::Path;

use blockmirror_file::FileId;
#[cfg(feature = "nbd")]
use blockmirror_nbd::{NbdAddress, NbdUri};

/// The name of what is not there and reads as zeros.
pub(crate) const NULL: &str = "null-co://";

/// Identity of a protocol layer, the same by whatever name it was opened. Exports are distinguished by their
/// URIs, so one that is reached in two ways is taken for two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProtocolId {
    File(FileId),
    /// By its address: each is a disk of its own.
    Null(usize),
    #[cfg(feature = "nbd")]
    Export(NbdAddress, String),
}

impl ProtocolId {
    /// What `path` leads to, without opening it; `None` if that could hold no image.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        #[cfg(feature = "nbd")]
        if is_uri(path) {
            return Some(Self::of_export(NbdUri::try_from(path).ok()?));
        }
        FileId::of(path).map(Self::File)
    }

    /// The file, unless it is an export or zeros.
    pub(crate) fn file(&self) -> Option<FileId> {
        match self {
            Self::File(id) => Some(*id),
            Self::Null(_) => None,
            #[cfg(feature = "nbd")]
            Self::Export(..) => None,
        }
    }

    /// Whether a write to one of the two may change what the other reads as, as far as the host knows.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(a), Self::File(b)) => a.overlaps(*b),
            _ => self == other,
        }
    }

    /// Whether its bytes come from a server, which may have them in a file of this host.
    pub(crate) fn may_be_served(&self) -> bool {
        match self {
            Self::File(file) => file.may_be_served(),
            Self::Null(_) => false,
            #[cfg(feature = "nbd")]
            Self::Export(..) => true,
        }
    }

    #[cfg(feature = "nbd")]
    pub(crate) fn of_export(uri: NbdUri) -> Self {
        let address = match uri.address {
            NbdAddress::Unix(path) => NbdAddress::Unix(std::fs::canonicalize(&path).unwrap_or(path)),
            other => other,
        };
        Self::Export(address, uri.export)
    }
}

/// Whether `path` is no path, but names an export of an NBD server (`nbd://host/export` and the like). A file
/// of such a name is reached as `./nbd:..`. Without the feature `nbd` every path is one.
pub fn is_uri(path: impl AsRef<Path>) -> bool {
    #[cfg(feature = "nbd")]
    return NbdUri::looks_like_uri(path.as_ref());
    #[cfg(not(feature = "nbd"))]
    {
        let _ = path;
        false
    }
}
