//! The requests in flight on one connection. Pure; the connection holds them under its lock.
//!
//! A request whose caller has *given it up* stays until its reply has come, which is received and dropped. If
//! it changes bytes, the server may do so until then: a later change of the same bytes must not be sent
//! before, and a read would be older than what it changes. They wait at a *barrier*, an entry that is sent to
//! no server and is done when those requests are.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use blockmirror_block::ByteRange;
use blockmirror_block::sync::Condvar;

use super::error::ClientError;
use crate::proto::{Command, CommandFlags};

/// What a reply may bring beyond its bytes: errors with their texts, descriptors of block status.
const DROPPED_BYTES: u64 = 64 << 20;
/// Bytes of a hole chunk, of which each byte of a read may have one.
const HOLE_BYTES: u64 = 12;

/// A request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) command: Command,
    pub(crate) flags: CommandFlags,
    /// The bytes of the export that it is about; empty for a flush.
    pub(crate) range: ByteRange,
}

impl Op {
    /// Whether it changes bytes of the export.
    pub(crate) fn changes(&self) -> bool {
        matches!(self.command, Command::Write | Command::WriteZeroes | Command::Trim)
    }
}

/// What a reply brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expects {
    Nothing,
    Bytes,
    Status,
}

/// A request that has no complete reply yet.
#[derive(Debug)]
pub(crate) struct PendingRequest {
    pub(crate) wake: Arc<Condvar>,
    /// Its caller sleeps on `wake`.
    pub(crate) waiting: bool,
    pub(crate) expects: Expects,
    /// The first error of the reply.
    pub(crate) error: Option<ClientError>,
    pub(crate) errors: u32,
    pub(crate) done: bool,
    /// When the reply must be there.
    deadline: Option<Instant>,
    given_up: Option<GivenUp>,
    /// Of a barrier: how many requests it waits for.
    barrier: Option<usize>,
}

/// What is left of a request whose caller has given it up.
#[derive(Debug)]
struct GivenUp {
    op: Op,
    /// How many bytes its reply may still bring.
    may_bring: u64,
    barriers: Vec<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Requests {
    pending: HashMap<u64, PendingRequest>,
    last_cookie: u64,
    /// Condition variables for later requests.
    spare: Vec<Arc<Condvar>>,
}

impl Requests {
    /// Adds a request; its cookie.
    pub(crate) fn add(&mut self, expects: Expects, deadline: Option<Instant>) -> u64 {
        self.last_cookie += 1;
        let request = PendingRequest {
            wake: self.spare.pop().unwrap_or_default(),
            waiting: false,
            expects,
            error: None,
            errors: 0,
            done: false,
            deadline,
            given_up: None,
            barrier: None,
        };
        self.pending.insert(self.last_cookie, request);
        self.last_cookie
    }

    pub(crate) fn get_mut(&mut self, cookie: u64) -> Option<&mut PendingRequest> {
        self.pending.get_mut(&cookie)
    }

    /// The caller of `cookie` is about to sleep on the condition returned.
    pub(crate) fn sleep(&mut self, cookie: u64) -> Arc<Condvar> {
        let request = self.pending.get_mut(&cookie);
        request.map_or_else(Arc::default, |request| {
            request.waiting = true;
            Arc::clone(&request.wake)
        })
    }

    /// The request that the server may answer with `cookie`.
    pub(crate) fn unanswered(&mut self, cookie: u64) -> Option<&mut PendingRequest> {
        self.get_mut(cookie).filter(|request| !request.done && request.barrier.is_none())
    }

    pub(crate) fn remove(&mut self, cookie: u64) {
        if let Some(request) = self.pending.remove(&cookie) {
            self.spare.push(request.wake);
        }
    }

    /// When the first of the replies must be there.
    pub(crate) fn first_deadline(&self) -> Option<Instant> {
        self.pending.values().filter_map(|request| request.deadline).min()
    }

    /// The reply to `cookie` is complete. Wakes its caller, unless that is the calling one, `mine`.
    pub(crate) fn answered(&mut self, mine: u64, cookie: u64) {
        let Some(request) = self.pending.get_mut(&cookie) else { return };
        let Some(given_up) = request.given_up.take() else {
            request.done = true;
            if cookie != mine {
                request.wake.notify_one();
            }
            return;
        };
        self.remove(cookie);
        for barrier in given_up.barriers {
            if let Some(waits) = self.pending.get_mut(&barrier)
                && let Some(left) = &mut waits.barrier
            {
                *left = left.saturating_sub(1);
                waits.done = *left == 0;
                waits.wake.notify_one();
            }
        }
    }

    /// The caller of `cookie`, which is `op`, does not wait for the reply any more.
    pub(crate) fn give_up(&mut self, cookie: u64, op: Op) {
        match self.pending.get_mut(&cookie) {
            Some(request) if request.barrier.is_none() => {
                let may_bring = op.range.len().saturating_mul(1 + HOLE_BYTES).saturating_add(DROPPED_BYTES);
                request.given_up = Some(GivenUp { op, may_bring, barriers: Vec::new() });
            }
            _ => self.remove(cookie),
        }
    }

    /// How many requests were given up and are not answered.
    pub(crate) fn given_up(&self) -> usize {
        self.pending.values().filter(|request| request.given_up.is_some()).count()
    }

    /// The op of `cookie` if it was given up, of which the reply brings `bytes` more.
    pub(crate) fn drop_bytes(&mut self, cookie: u64, bytes: u64) -> Result<(), ClientError> {
        let given_up = self.pending.get_mut(&cookie).and_then(|request| request.given_up.as_mut());
        let Some(given_up) = given_up else { return Ok(()) };
        let left = given_up.may_bring.checked_sub(bytes.saturating_add(1));
        given_up.may_bring =
            left.ok_or_else(|| ClientError::Violation(format!("a reply to request {cookie} without end")))?;
        Ok(())
    }

    /// A barrier behind the requests that were given up and of which `is_before` is true; `None` if there are
    /// none.
    pub(crate) fn add_barrier(
        &mut self,
        is_before: impl Fn(&Op) -> bool,
        deadline: Option<Instant>,
    ) -> Option<u64> {
        let is_before =
            |request: &PendingRequest| request.given_up.as_ref().is_some_and(|given| is_before(&given.op));
        let before = self.pending.values().filter(|request| is_before(request)).count();
        if before == 0 {
            return None;
        }
        let barrier = self.add(Expects::Nothing, deadline);
        for request in self.pending.values_mut().filter(|request| is_before(request)) {
            if let Some(given_up) = &mut request.given_up {
                given_up.barriers.push(barrier);
            }
        }
        if let Some(request) = self.pending.get_mut(&barrier) {
            request.barrier = Some(before);
        }
        Some(barrier)
    }

    /// Wakes a waiting caller, to read.
    pub(crate) fn wake_one(&self) {
        if let Some(next) = self.pending.values().find(|request| request.waiting && !request.done) {
            next.wake.notify_one();
        }
    }

    /// Wakes all callers.
    pub(crate) fn wake_all(&self) {
        for request in self.pending.values() {
            request.wake.notify_all();
        }
    }
}

impl PendingRequest {
    /// Bytes of the read that was given up.
    pub(crate) fn given_up(&self) -> Option<u64> {
        self.given_up.as_ref().map(|given_up| given_up.op.range.len())
    }
}
