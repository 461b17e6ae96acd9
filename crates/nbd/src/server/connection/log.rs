//! What the log says of a connection. The span is entered where something is logged, never for a request.
//!
//! Called by the connection's reader and workers when a request fails, by the acceptor, and at the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tracing::{Span, debug, info, warn};

use crate::proto::{Errno, Request};

use super::Connection;
use crate::server::negotiated_params::Failure;

/// The connection's span, and what was logged in it.
pub(super) struct ConnectionLog {
    /// Entered by the thread of the handshake, which makes the connection.
    span: Span,
    began: Instant,
    /// A device has failed a request: later failures are not worth a warning each.
    warned: AtomicBool,
}

impl ConnectionLog {
    pub(super) fn new() -> Self {
        Self { span: Span::current(), began: Instant::now(), warned: AtomicBool::new(false) }
    }
}

impl Connection {
    /// Logs a failed request: the first one that its device failed as a warning.
    pub(in crate::server) fn log_failure(&self, request: &Request, failure: &Failure) {
        let is_of_device = matches!(failure.errno, Errno::IO | Errno::NOSPC | Errno::NOMEM);
        let first = is_of_device && !self.log.warned.swap(true, Ordering::Relaxed);
        self.log.span.in_scope(|| {
            let Request { command, offset, length, .. } = request;
            let error = &failure.message;
            if first {
                warn!(?command, offset, length, error, "request failed");
            } else {
                debug!(?command, offset, length, error, "request failed");
            }
        });
    }

    /// Logs why the server aborts the connection.
    pub(in crate::server) fn log_abort(&self, why: &str) {
        self.log.span.in_scope(|| warn!("aborted: {why}"));
    }

    /// Logs the end.
    pub(in crate::server) fn log_end(&self) {
        self.log.span.in_scope(|| info!(seconds = self.log.began.elapsed().as_secs_f64(), "disconnected"));
    }
}
