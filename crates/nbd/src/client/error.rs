//! Why a client cannot do something: the cause inside of [`blockmirror_block::Error`].
//!
//! One failure may go to many callers (a lost connection ends all its requests), so errors are cheap to
//! clone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::ErrorKind;
use thiserror::Error;

use crate::proto::{Errno, OptionCode, OptionReply, ProtoError};

/// What went wrong between client and server. Reach it with `cause()` from a [`blockmirror_block::Error`].
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No server listens there, or the way there is blocked.
    #[error("cannot connect: {0}")]
    Connect(Arc<io::Error>),
    /// Connecting and the handshake took longer than the limit.
    #[error("the server did not finish the handshake within {0:?}")]
    TimedOut(Duration),
    /// The server did not answer a request within the limit that was set for that.
    #[error("the server did not answer within {0:?}")]
    NoAnswer(Duration),
    /// The connection broke.
    #[error("the connection was lost: {0}")]
    Lost(Arc<io::Error>),
    /// The server sent what the protocol does not allow.
    #[error("the server broke the protocol: {0}")]
    Violation(String),
    /// The server sent bytes that are not what the protocol says.
    #[error("the server broke the protocol: {0}")]
    Proto(ProtoError),
    /// The server does not grant what was asked for in the handshake.
    #[error("the server refuses {}: {}", option_name(*option), refusal(*reply, message))]
    Refused {
        /// What was asked for.
        option: OptionCode,
        /// Its answer.
        reply: OptionReply,
        /// Its words; may be empty.
        message: String,
    },
    /// The server lacks something that this client does not do without.
    #[error("the server {0}")]
    Unsuitable(String),
    /// Credentials or encryption.
    #[error("TLS: {0}")]
    Tls(String),
    /// After a reconnection the export was another than before.
    #[error("after reconnecting the export {0}")]
    Changed(String),
    /// Writes that were done but not flushed may have gone with a lost connection. Reported once, by the
    /// flush calls that should have covered them.
    #[error("the connection was lost: what was written since the last flush may be lost")]
    UnflushedLost,
    /// The server answered a request with an error.
    #[error("the server reports {error}{}{message}", if message.is_empty() { "" } else { ": " })]
    Server {
        /// The number.
        error: Errno,
        /// Its words; may be empty.
        message: String,
        /// The request was sent before, on a connection that was lost: what the server does with that one is
        /// not known.
        repeated: bool,
    },
    /// Cancelled.
    #[error("given up on request")]
    Cancelled,
}

impl From<ProtoError> for ClientError {
    fn from(error: ProtoError) -> Self {
        Self::Proto(error)
    }
}

impl ClientError {
    pub(crate) fn lost(error: io::Error) -> Self {
        Self::Lost(Arc::new(error))
    }

    /// Whether a retry on another connection may succeed.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Connect(_) | Self::TimedOut(_) | Self::NoAnswer(_) | Self::Lost(_) => true,
            // A server that starts again may not have its exports yet.
            Self::Refused { .. } => true,
            Self::Server { error, .. } => *error == Errno::SHUTDOWN,
            Self::Violation(_) | Self::Proto(_) | Self::Unsuitable(_) | Self::Tls(_) => false,
            Self::Changed(_) | Self::UnflushedLost | Self::Cancelled => false,
        }
    }

    /// Whether it is the server's answer to one request, and the connection is good. A server that shuts down
    /// answers so too, which ends the connection.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(self, Self::Server { error, .. } if *error != Errno::SHUTDOWN)
    }

    /// The answer to a request that was sent before, on a connection that was lost, if it is `repeated`.
    pub(crate) fn with_repeated(mut self, is_repeated: bool) -> Self {
        if let Self::Server { repeated, .. } = &mut self {
            *repeated = is_repeated;
        }
        self
    }

    /// Whether nothing of the request is performed later: the server has no space, and the request is on no
    /// connection that was lost. No other answer says so. Behind the server there may be a network, too, and
    /// qemu-nbd and nbdkit answer EINVAL for each error that the protocol does not have (a timeout, a reset
    /// connection).
    pub(crate) fn is_definite(&self) -> bool {
        matches!(self, Self::Server { error: Errno::NOSPC, repeated: false, .. })
    }

    /// The kind of the error of the device.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Server { error, .. } => error.kind(),
            Self::Cancelled => ErrorKind::Cancelled,
            Self::UnflushedLost => ErrorKind::WritesLost,
            Self::Connect(error) => match error.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                _ => ErrorKind::Io,
            },
            Self::Refused { reply: OptionReply::ErrUnknown, .. } => ErrorKind::NotFound,
            Self::Refused { reply: OptionReply::ErrPolicy | OptionReply::ErrTlsReqd, .. } => {
                ErrorKind::PermissionDenied
            }
            Self::Unsuitable(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        }
    }
}

fn option_name(option: OptionCode) -> String {
    match option {
        OptionCode::Go | OptionCode::Info | OptionCode::ExportName => "the export".into(),
        OptionCode::StartTls => "TLS".into(),
        other => format!("{other:?}"),
    }
}

fn refusal(reply: OptionReply, message: &str) -> String {
    let what = match reply {
        OptionReply::ErrUnsup => "it does not know the request",
        OptionReply::ErrPolicy => "its policy does not allow it",
        OptionReply::ErrInvalid => "it takes the request for invalid",
        OptionReply::ErrPlatform => "it cannot do that where it runs",
        OptionReply::ErrTlsReqd => "it wants TLS first (nbds://)",
        OptionReply::ErrUnknown => "it has none of that name",
        OptionReply::ErrShutdown => "it is shutting down",
        OptionReply::ErrTooBig => "the request is too long for it",
        other => return format!("{other:?}: {message}"),
    };
    if message.is_empty() { what.to_owned() } else { format!("{what}: {message}") }
}
