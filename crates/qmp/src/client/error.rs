//! What can go wrong between a client and its server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::error::QmpError;

/// Why a call of [`Client`](super::Client) failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No server listens at the path, or not for us.
    #[error("cannot connect to {}: {cause}", path.display())]
    Connect {
        /// The path.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Reading or writing the socket failed.
    #[error("{what}: {cause}")]
    Io {
        /// What was waited for or sent.
        what: String,
        /// Why.
        cause: io::Error,
    },
    /// The server did not say in time what was waited for. QEMU serves one client of a monitor at a time: the
    /// greeting waits until the one before has gone.
    #[error("the server did not answer within {limit:?}: {what}")]
    Timeout {
        /// What was waited for: a command, the greeting.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// The server hung up, or this end did after an earlier error.
    #[error("the server hung up")]
    Closed,
    /// The server does not speak QMP, or breaks its rules or the limits.
    #[error("the server does not speak QMP as expected: {what}")]
    Protocol {
        /// What it said.
        what: String,
    },
    /// The server refused the command.
    #[error("{command}: {error}")]
    Command {
        /// The command.
        command: String,
        /// What the server says.
        error: QmpError,
    },
}

impl ClientError {
    /// The server's own error, if that is what it is.
    pub fn refusal(&self) -> Option<&QmpError> {
        match self {
            Self::Command { error, .. } => Some(error),
            _ => None,
        }
    }
}
