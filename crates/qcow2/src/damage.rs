//! Proof that the image's metadata is damaged: the operation that meets it fails, and the image is marked
//! corrupt.
//!
//! Made by the map of metadata (`overlap`) and by the check of refcounts (`verify`), as the cause of the
//! error that they return. The operation that called them hands its result to `Qcow2::note_damage`, which
//! alone marks the image.

use blockmirror_block::{Error, ErrorKind};
use thiserror::Error as ThisError;

use crate::context::ImageContext;
use crate::offset::{GuestCluster, HostOffset};
use crate::overlap_checks::MetadataKind;

/// What is damaged. The cause of an [`Error`] of kind [`ErrorKind::Corrupt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Damage {
    /// A guest cluster that would be written is mapped to a host cluster that holds metadata.
    #[error("the write would hit {0}; it was refused, and the image is marked corrupt")]
    Overlap(MetadataKind),
    /// An entry maps a host cluster whose refcount is zero.
    #[error(
        "the cluster is mapped by guest cluster {}, but its refcount is 0; the image is marked corrupt",
        .0.0
    )]
    MappedUncounted(GuestCluster),
    /// A snapshot uses a host cluster whose refcount is zero.
    #[error("a snapshot uses the cluster, but its refcount is 0; the image is marked corrupt")]
    SnapshotUncounted,
    /// The refcount of a cluster that holds an L2 table is zero.
    #[error(
        "the cluster holds the L2 table of guest cluster {}, but its refcount is 0; \
         the image is marked corrupt",
        .0.0
    )]
    TableUncounted(GuestCluster),
}

impl Damage {
    /// The damage that caused `error`, if any did.
    pub fn of(error: &Error) -> Option<Self> {
        error.cause()?.downcast_ref().copied()
    }

    /// The error of an operation that met it at `at`.
    pub(crate) fn met(self, ctx: &ImageContext, at: HostOffset) -> Error {
        let operation = match self {
            Self::Overlap(_) => "write over metadata",
            Self::MappedUncounted(_) | Self::SnapshotUncounted | Self::TableUncounted(_) => "check refcounts",
        };
        Error::new(ErrorKind::Corrupt, operation).in_file(ctx.name.clone()).at(at.0).caused_by(self)
    }
}
