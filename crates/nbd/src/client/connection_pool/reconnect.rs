//! How a pool gets connections: the first one of an epoch, made by the request that finds none, and further
//! ones, made by a thread.
//!
//! Called by the pool. Must hold: one attempt at a time; a connection is used only if it leads to the export
//! that was opened, and nothing was cancelled since the attempt began.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use blockmirror_block::sync::MutexGuard;
use blockmirror_block::{ByteRange, cancel};
use tracing::{info, warn};

use super::{ConnectionPool, InUse, RetryState, State};
use crate::client::backoff::backoff;
use crate::client::connect::CancelToken;
use crate::client::connection::Sink;
use crate::client::error::ClientError;
use crate::client::handshake::NegotiatedExport;
use crate::client::requests::Op;
use crate::client::socket::ClientSocket;
use crate::proto::{Command, CommandFlags, TransmissionFlags};

impl ConnectionPool {
    /// How long a request may still wait for a reconnection; `None` if no longer.
    pub(super) fn retry_time_left(&self, state: &State, retry: &RetryState) -> Option<Duration> {
        if state.fail_fast || state.last_failure.as_ref().is_some_and(|e| !e.is_passing()) {
            return None;
        }
        let since = match (retry.lost_at, state.down_since) {
            (Some(mine), Some(all)) => mine.min(all),
            (mine, all) => mine.or(all)?,
        };
        let deadline = since.checked_add(self.connector.options().reconnect_delay)?;
        deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Waits for the backoff and makes one attempt. Its result is in the state.
    pub(super) fn reconnect<'a>(
        self: &'a Arc<Self>,
        mut state: MutexGuard<'a, State>,
        retry: &RetryState,
    ) -> MutexGuard<'a, State> {
        state.connecting = true;
        let mine = state.cancelled;
        let is_over = |state: &State| state.cancelled != mine || state.closed || cancel::is_cancelled();
        state = self.drain_retired(state, &is_over);
        if is_over(&state) {
            // The next caller makes an attempt.
            state.connecting = false;
            self.changed.notify_all();
            return state;
        }
        if let Some(retry_time_left) = self.retry_time_left(&state, retry) {
            let pause = backoff(state.attempts, random()).min(retry_time_left);
            let end = Instant::now() + pause;
            while !is_over(&state) {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = cancel::wait(&self.changed, state, Some(left));
            }
        }
        state.attempts = state.attempts.saturating_add(1);
        let epoch = state.epoch + 1;
        drop(state);
        let cancel = Attempt { pool: Arc::downgrade(self), cancelled: mine };
        let made = self.connector.connect(&cancel, epoch).and_then(|connection| {
            self.same_export(connection.negotiated())?;
            Ok(connection)
        });
        let uri = &self.connector.options().uri;
        match &made {
            Ok(_) => info!(%uri, "connected again"),
            Err(error) => warn!(%uri, %error, "cannot connect again"),
        }
        let mut state = self.state.lock();
        state.connecting = false;
        let mut unused = None;
        match made {
            Ok(connection) if state.cancelled == mine && !state.closed => {
                state.epoch = epoch;
                state.durability.lost(epoch);
                state.connections = vec![Arc::new(connection)];
                state.widened = false;
                state.last_failure = None;
            }
            Ok(connection) => unused = Some(connection),
            // One caller does not wait any more; the next one makes an attempt of its own.
            Err(ClientError::Cancelled) if cancel::is_cancelled() => {}
            Err(error) => {
                state.failures += 1;
                state.last_failure = Some(error);
            }
        }
        self.changed.notify_all();
        if let Some(unused) = unused {
            drop(state);
            unused.close();
            state = self.state.lock();
        }
        state
    }

    /// Fails if a new connection leads to another export than what was opened.
    fn same_export(&self, now: &NegotiatedExport) -> Result<(), ClientError> {
        let first = &self.first;
        let read_only = |n: &NegotiatedExport| n.flags.contains(TransmissionFlags::READ_ONLY);
        // Requests are built for what the first connection could do.
        let used = [
            TransmissionFlags::SEND_FLUSH,
            TransmissionFlags::SEND_FUA,
            TransmissionFlags::SEND_TRIM,
            TransmissionFlags::SEND_WRITE_ZEROES,
            TransmissionFlags::SEND_FAST_ZERO,
        ];
        let missing = used.into_iter().find(|f| first.flags.contains(*f) && !now.flags.contains(*f));
        let changed = if now.size != first.size {
            format!("has {} bytes and no longer {}", now.size, first.size)
        } else if read_only(now) && !read_only(first) {
            "is read-only".to_owned()
        } else if now.min_block > first.min_block {
            format!("has blocks of {} bytes and no longer {}", now.min_block, first.min_block)
        } else if now.max_payload < first.max_payload {
            format!("takes payloads of {} bytes and no longer {}", now.max_payload, first.max_payload)
        } else if let Some(flag) = missing {
            format!("can no longer do {flag:?}")
        } else if now.format < first.format || (first.base.is_some() && now.base.is_none()) {
            "is served with a smaller protocol".to_owned()
        } else {
            return Ok(());
        };
        Err(ClientError::Changed(changed))
    }

    /// Whether the first connection of `epoch` answers a request that is sent now. If it does not, a
    /// connection that was just made may lead to another run of the server, whose flush does not cover what
    /// was written on the first.
    fn first_answers(&self, epoch: u64) -> bool {
        let first = {
            let mut state = self.state.lock();
            // It is a request like any other.
            while state.is_one_alone {
                state = self.changed.wait(state);
            }
            let first = state.connections.first().filter(|first| first.epoch == epoch).map(Arc::clone);
            let Some(connection) = first else { return false };
            state.in_flight += 1;
            InUse { pool: self, connection }
        };
        let mut block = vec![0; self.first.min_block as usize];
        let range = ByteRange::new(0, block.len() as u64);
        let op = Op { command: Command::Read, flags: CommandFlags::NONE, range };
        match first.call(op, &[], Sink::Bytes(&mut block)) {
            Ok(()) => true,
            Err(error) if error.is_answer() => true,
            Err(error) => {
                // The next request must not find the connection lost, and be blamed for it.
                let _ = self.lost(&first, error, &mut self.retry_state());
                false
            }
        }
    }

    /// Whether more connections of `epoch` are wanted, if nothing was cancelled since `cancelled` was read.
    fn is_wanted(&self, epoch: u64, cancelled: u64) -> bool {
        let state = self.state.lock();
        !state.closed && state.cancelled == cancelled && state.epoch == epoch && !state.connections.is_empty()
    }
}

/// A connection attempt of a pool.
struct Attempt {
    pool: Weak<ConnectionPool>,
    cancelled: u64,
}

impl CancelToken for Attempt {
    fn is_cancelled(&self) -> bool {
        cancel::is_cancelled()
            || self.pool.upgrade().is_none_or(|pool| {
                let state = pool.state.lock();
                state.closed || state.cancelled != self.cancelled
            })
    }

    fn register(&self, socket: &Arc<ClientSocket>) {
        let Some(pool) = self.pool.upgrade() else { return socket.shut_down() };
        let mut state = pool.state.lock();
        if state.closed || state.cancelled != self.cancelled {
            return socket.shut_down();
        }
        state.sockets.retain(|socket| socket.strong_count() > 0);
        state.sockets.push(Arc::downgrade(socket));
    }
}

/// Makes up to `more` further connections of `epoch`; stops at the first that fails.
pub(super) fn widen(pool: &Weak<ConnectionPool>, epoch: u64, cancelled: u64, more: u16) {
    for _ in 0..more {
        let Some(pool) = pool.upgrade().filter(|pool| pool.is_wanted(epoch, cancelled)) else { return };
        let cancel = Attempt { pool: Arc::downgrade(&pool), cancelled };
        let Ok(connection) = pool.connector.connect(&cancel, epoch) else { return };
        let same = pool.same_export(connection.negotiated()).is_ok() && pool.first_answers(epoch);
        let mut state = pool.state.lock();
        let wanted = state.epoch == epoch && !state.connections.is_empty() && !state.closed;
        if same && wanted {
            state.connections.push(Arc::new(connection));
        } else {
            drop(state);
            connection.close();
            return;
        }
    }
}

/// A number for jitter.
pub(super) fn random() -> u32 {
    let bits = RandomState::new().build_hasher().finish();
    (bits >> 32) as u32
}
