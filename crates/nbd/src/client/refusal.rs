//! Requests that a server refuses although it announced them: zeroing and trimming. Kept by the device, one
//! for each kind.
//!
//! A refusal is believed where it cannot be a failure whose request is performed later, after what is written
//! there next: EINVAL is what servers answer for a timeout of their backend, too.

use std::sync::atomic::{AtomicU64, Ordering};

use super::connection_pool::ConnectionPool;
use super::error::ClientError;
use crate::proto::Errno;

/// What is known of one kind of request, until a reconnection, which may lead to another server.
///
/// Each value is the epoch of the connections, and 1; zero: never.
#[derive(Default)]
pub(super) struct Refusal {
    refused: AtomicU64,
    performed: AtomicU64,
}

impl Refusal {
    /// Whether the server is not to be asked.
    pub(super) fn holds(&self, pool: &ConnectionPool) -> bool {
        is_now(&self.refused, pool)
    }

    /// The server does not do such requests.
    pub(super) fn note(&self, pool: &ConnectionPool) {
        self.refused.store(pool.epoch() + 1, Ordering::Relaxed);
    }

    /// The server has performed one.
    pub(super) fn note_performed(&self, pool: &ConnectionPool) {
        if !is_now(&self.performed, pool) {
            self.performed.store(pool.epoch() + 1, Ordering::Relaxed);
        }
    }

    /// Whether `error` says that the server does not do such requests at all: ENOTSUP, and EINVAL if it has
    /// performed none.
    pub(super) fn is_believed(&self, error: &ClientError, pool: &ConnectionPool) -> bool {
        match error {
            ClientError::Server { error: Errno::NOTSUP, .. } => true,
            ClientError::Server { error: Errno::INVAL, .. } => !is_now(&self.performed, pool),
            _ => false,
        }
    }
}

fn is_now(noted: &AtomicU64, pool: &ConnectionPool) -> bool {
    let noted = noted.load(Ordering::Relaxed);
    noted != 0 && noted == pool.epoch() + 1
}
