//! Why an image could not be locked.

use std::io;
use std::path::PathBuf;

use blockmirror_block::{Error, ErrorKind};
use thiserror::Error as ThisError;

use crate::{Holder, Permission};

/// Why an image could not be locked.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum LockError {
    /// Another user of the image has a permission that we do not share.
    #[error("lock: {}: locked by {}, which {}", path.display(), name(holder.as_ref()), permission.held())]
    Held {
        /// The image.
        path: PathBuf,
        /// What the other one does.
        permission: Permission,
        /// The other one, where it could be found.
        holder: Option<Holder>,
    },
    /// Another user of the image does not share a permission that we want.
    #[error("lock: {}: locked by {}, which {}", path.display(), name(holder.as_ref()), permission.forbidden())]
    NotShared {
        /// The image.
        path: PathBuf,
        /// What the other one forbids.
        permission: Permission,
        /// The other one, where it could be found.
        holder: Option<Holder>,
    },
    /// The system failed.
    #[error("lock: {}: {cause}", path.display())]
    System {
        /// The image.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

fn name(holder: Option<&Holder>) -> String {
    holder.map_or_else(|| "another process".to_owned(), ToString::to_string)
}

impl LockError {
    /// Who is in the way, where that could be found out.
    pub fn holder(&self) -> Option<&Holder> {
        match self {
            Self::Held { holder, .. } | Self::NotShared { holder, .. } => holder.as_ref(),
            Self::System { .. } => None,
        }
    }
}

/// What a user of an image wants and another one does not leave. The cause of an [`Error`] of kind
/// [`ErrorKind::Locked`], in the words of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
#[error("Failed to get {}\"{}\" lock", if *.shared { "shared " } else { "" }, permission.qemu_name())]
#[non_exhaustive]
pub struct LockConflict {
    /// The permission.
    pub permission: Permission,
    /// Whether it is one that the other one has and we do not share; otherwise we want it, and the other one
    /// does not share it.
    pub shared: bool,
}

impl LockError {
    fn conflict(&self) -> Option<LockConflict> {
        match self {
            Self::Held { permission, .. } => Some(LockConflict { permission: *permission, shared: true }),
            Self::NotShared { permission, .. } => {
                Some(LockConflict { permission: *permission, shared: false })
            }
            Self::System { .. } => None,
        }
    }
}

impl From<LockError> for Error {
    fn from(e: LockError) -> Self {
        let conflict = e.conflict();
        let (path, kind, reason) = match &e {
            LockError::Held { path, permission, holder } => {
                (path, ErrorKind::Locked, Some((holder, permission.held())))
            }
            LockError::NotShared { path, permission, holder } => {
                (path, ErrorKind::Locked, Some((holder, permission.forbidden())))
            }
            LockError::System { path, .. } => (path, ErrorKind::Io, None),
        };
        let mut error = Self::new(kind, "lock").in_file(path.display().to_string());
        if let Some((holder, does)) = reason {
            error = error.because(format!("locked by {}, which {does}", name(holder.as_ref())));
        }
        match (e, conflict) {
            (LockError::System { cause, .. }, _) => error.caused_by(cause),
            (_, Some(conflict)) => error.caused_by(conflict),
            _ => error,
        }
    }
}
