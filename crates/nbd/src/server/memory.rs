//! Buffers of requests and replies, under one limit.
//!
//! Readers of connections borrow here before they take a payload in or have one read from a device; a connection that finds no
//! room waits, its socket unread. Buffers are kept a while: fresh memory costs a page fault every 4 KiB.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};

use blockmirror_block::AlignedBuf;
use blockmirror_block::sync::Mutex;

use super::connection::Connection;

/// Bytes kept for the next request when nobody uses them.
const KEPT: u64 = 16 << 20;
/// Smallest buffer.
const SMALLEST: usize = 4096;
/// What a connection can always have one of.
const SMALL: usize = 64 << 10;
/// One list per power of two from [`SMALLEST`] to 32 MiB.
const CLASSES: usize = 14;

/// The buffers of one server.
pub(crate) struct Memory {
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    kept: u64,
    free: [Vec<AlignedBuf>; CLASSES],
    waiting: VecDeque<Weak<Connection>>,
}

impl Memory {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// A buffer of `len` bytes with unspecified contents, or `None` if there is no room: then `asked_by` is resumed when there
    /// may be. A small one that is `alone`, all that its connection holds, is always lent: whatever others do, every client
    /// gets on with short requests.
    pub(crate) fn borrow(
        self: &Arc<Self>,
        len: usize,
        alone: bool,
        asked_by: &Arc<Connection>,
    ) -> Option<Loan> {
        let size = len.max(SMALLEST).next_power_of_two();
        let class = (size.trailing_zeros() - SMALLEST.trailing_zeros()) as usize;
        let buf = {
            let mut state = self.state.lock();
            let always = state.used == 0 || (alone && size <= SMALL);
            if !always && state.used.saturating_add(size as u64) > self.limit {
                state.waiting.push_back(Arc::downgrade(asked_by));
                return None;
            }
            state.used += size as u64;
            let buf = state.free.get_mut(class).and_then(Vec::pop);
            if buf.is_some() {
                state.kept -= size as u64;
            }
            buf
        };
        let buf = buf.unwrap_or_else(|| AlignedBuf::new(size));
        Some(Loan { buf, len, class, memory: Arc::clone(self) })
    }

    /// Bytes lent at present.
    pub(crate) fn used(&self) -> u64 {
        self.state.lock().used
    }

    fn give_back(&self, buf: AlignedBuf, class: usize) {
        let size = buf.len() as u64;
        let mut state = self.state.lock();
        state.used -= size;
        if state.kept + size <= KEPT
            && let Some(list) = state.free.get_mut(class)
        {
            list.push(buf);
            state.kept += size;
        }
        // All of them: one that has gone meanwhile must not keep its turn from the others.
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for connection in waiting.iter().filter_map(Weak::upgrade) {
            connection.resume();
        }
    }
}

/// A buffer that goes back when dropped.
pub(crate) struct Loan {
    buf: AlignedBuf,
    len: usize,
    class: usize,
    memory: Arc<Memory>,
}

impl Loan {
    /// Shows only the first `len` bytes; the rest stays lent.
    pub(crate) fn shorten(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Holds just `bytes` from now on; false, unchanged, if they do not fit.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> bool {
        let Some(room) = self.buf.get_mut(..bytes.len()) else { return false };
        room.copy_from_slice(bytes);
        self.len = bytes.len();
        true
    }
}

impl Deref for Loan {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf[..self.len]
    }
}

impl DerefMut for Loan {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buf[..self.len]
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.memory.give_back(std::mem::take(&mut self.buf), self.class);
    }
}
