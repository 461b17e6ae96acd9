//! The writing role: replies are sent, or wait until the socket has room.
//!
//! Entered by the reader with what it made itself, by workers with a reply each, and when epoll says that
//! there is room again.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Connection, State, Unsent};
use crate::server::reply::Reply;
use crate::server::request_decoder::Scratch;

/// Parts handed to the kernel in one call.
const PARTS: usize = 64;

impl Connection {
    /// Queues the reply of a request that ran, and sends it unless another worker writes.
    pub(super) fn reply(self: &Arc<Self>, reply: Reply, held: u64) {
        let (write, unwanted) = {
            let mut state = self.state.lock();
            state.running -= 1;
            state.held -= held;
            let unwanted = state.enqueue(reply);
            self.resume_locked(&mut state);
            let write = !state.writing && !state.blocked;
            state.writing |= write;
            (write, unwanted)
        };
        // Not under the lock: freeing its buffer may resume this very connection.
        drop(unwanted);
        if write {
            self.send_queue();
        }
    }

    /// Sends the replies of requests that the reader ran itself.
    pub(in crate::server) fn send_scratch(self: &Arc<Self>, scratch: &mut Scratch) {
        if scratch.out.is_empty() {
            return;
        }
        {
            let mut state = self.state.lock();
            if state.writing || state.blocked || !state.out.is_empty() || state.broken {
                let bytes = std::mem::take(&mut scratch.out);
                // Bytes of our own: dropping them needs no lock.
                drop(state.enqueue(Reply::bytes(bytes)));
                return;
            }
            state.writing = true;
        }
        let mut sent = 0;
        let result = loop {
            match self.transport.send(&[IoSlice::new(&scratch.out[sent..])]) {
                Ok(n) => sent += n,
                Err(e) => break Err(e),
            }
            if sent == scratch.out.len() {
                break Ok(());
            }
        };
        self.moved.fetch_add(sent as u64, Ordering::Relaxed);
        let rest = match result {
            Ok(()) => Vec::new(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => scratch.out.split_off(sent),
            Err(_) => {
                self.fail();
                Vec::new()
            }
        };
        scratch.out.clear();
        if !rest.is_empty() {
            let mut state = self.state.lock();
            let rest = Reply::bytes(rest);
            state.unsent.add(&rest);
            state.out.push_front(rest);
        }
        self.send_queue();
    }

    /// Sends what is queued, as the holder of the role, until nothing is left or there is no room.
    pub(super) fn send_queue(self: &Arc<Self>) {
        let mut replies = VecDeque::new();
        loop {
            {
                let mut state = self.state.lock();
                if state.broken && !state.out.is_empty() {
                    let unwanted = std::mem::take(&mut state.out);
                    state.unsent = Unsent::default();
                    // Not under the lock: freeing buffers may resume this very connection.
                    drop(state);
                    drop(unwanted);
                    continue;
                }
                if state.out.is_empty() && self.flushed(&mut state) {
                    state.writing = false;
                    self.resume_locked(&mut state);
                    self.close_if_over(state);
                    return;
                }
                if state.blocked {
                    state.writing = false;
                    drop(state);
                    return self.arm();
                }
                std::mem::swap(&mut state.out, &mut replies);
            }
            let before = Unsent::of(&replies);
            let result = self.send_all(&mut replies);
            let left = Unsent::of(&replies);
            let mut state = self.state.lock();
            state.unsent.sent(before, left);
            match result {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    std::mem::swap(&mut state.out, &mut replies);
                    state.out.append(&mut replies);
                    state.writing = false;
                    state.blocked = true;
                    drop(state);
                    return self.arm();
                }
                Err(_) => {
                    drop(state);
                    replies.clear();
                    self.fail();
                }
            }
        }
    }

    /// Whether the transport holds nothing back; otherwise the connection is now blocked, or broken.
    fn flushed(&self, state: &mut State) -> bool {
        if state.broken {
            return true;
        }
        match self.transport.flush() {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                state.blocked = true;
                false
            }
            Err(_) => {
                self.ending.store(true, Ordering::Relaxed);
                state.broken = true;
                self.transport.socket.shutdown();
                true
            }
        }
    }

    fn send_all(&self, replies: &mut VecDeque<Reply>) -> io::Result<()> {
        while !replies.is_empty() {
            let mut sent = {
                let mut parts = Vec::with_capacity(PARTS);
                for reply in replies.iter() {
                    reply.gather(&mut parts, PARTS);
                    if parts.len() >= PARTS {
                        break;
                    }
                }
                if parts.is_empty() { 0 } else { self.transport.send(&parts)? }
            };
            self.moved.fetch_add(sent as u64, Ordering::Relaxed);
            while let Some(reply) = replies.front_mut() {
                match reply.advance(sent) {
                    Some(beyond) => {
                        sent = beyond;
                        replies.pop_front();
                    }
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// Fails: the socket did, and nothing is received or sent any more.
    pub(super) fn fail(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.state.lock().broken = true;
        self.transport.socket.shutdown();
    }
}
