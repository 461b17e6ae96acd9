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

impl From<LockError> for Error {
    fn from(e: LockError) -> Self {
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
        match e {
            LockError::System { cause, .. } => error.caused_by(cause),
            // The line says all of it.
            _ => error,
        }
    }
}
