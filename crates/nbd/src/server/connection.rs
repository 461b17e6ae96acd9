//! A connection in the transmission phase: its reader, its writer, and its end.
//!
//! Two roles, each held by at most one worker at a time: *reading* (receiving and decoding requests) and
//! *writing* (sending replies). No worker waits for a role: one with a reply queues it, and the present
//! writer sends it too. Neither role blocks: when the socket would, the role is released and epoll wakes a
//! worker later.
//!
//! What must hold: a connection that is not being read is armed in epoll, backpressured, or ended. It closes
//! once, when it has ended, no request runs and no reply is left.
//!
//! Four ways to end it: [`drain`](Connection::drain) answers what runs; [`abort`](Connection::abort) discards
//! the replies; [`fail`](Connection::fail) follows an error of the socket; [`release`](Connection::release)
//! frees its connection permit.

mod log;
mod output;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange};
use rustix::event::epoll::EventFlags;

use crate::proto::{Command, Errno, Request};

use super::connection_limit::ConnectionPermit;
use super::execute;
use super::export_runtime::{BlockedRequest, ExportRuntime};
use super::memory::{Account, PooledBuf, Waiter};
use super::negotiated_params::{Failure, NegotiatedParams};
use super::options::{MAX_CONNECTION_BYTES, MAX_LOOSE, MAX_RUNNING};
use super::reply::{Encoder, Reply};
use super::request_decoder::{MAX_INLINE, ReadOutcome, RequestDecoder, Scratch};
use super::transport::Transport;
use super::worker_pool::Job;
use log::ConnectionLog;

/// Unsent bytes from which on no further request is read.
const MAX_UNSENT: usize = 4 << 20;
/// Receives in a row after which other connections are served.
const MAX_RECEIVES: usize = 32;

/// The connection of one client.
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) transport: Transport,
    pub(crate) params: NegotiatedParams,
    pub(crate) runtime: Arc<ExportRuntime>,
    pub(crate) account: Arc<Account>,
    /// *Guards* the decoder, for the worker that has the reading role. *Order*: before all others. *Not under
    /// it*: nothing is forbidden, since nothing else waits for it.
    decoder: Mutex<RequestDecoder>,
    /// *Guards* both roles, the queue of replies and the end. *Order*: after `arming`; before the pool's
    /// state. *Not under it*: I/O, dropping a reply (its buffer may resume this very connection).
    state: Mutex<State>,
    /// *Guards* the order of calls of `epoll_ctl`, so that the last one is by the latest state. *Order*:
    /// before `state`. *Not under it*: anything else.
    arming: Mutex<()>,
    /// Bytes moved so far: shows a peer that stalls or is slow.
    moved: AtomicU64,
    /// Whether the rest of a payload is awaited.
    receiving: AtomicBool,
    /// Drained, aborted or failed: long requests give up.
    ending: AtomicBool,
    permit: Mutex<Option<ConnectionPermit>>,
    log: ConnectionLog,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reading {
    /// A worker reads.
    Active,
    /// Epoll waits for the socket.
    Armed,
    /// Not read until requests end, replies are sent or memory is freed.
    Backpressured,
    /// Nothing is read any more.
    Ended,
}

struct State {
    reading: Reading,
    /// Something was freed while a worker read: it tries again before it goes.
    again: bool,
    /// Requests that were read and whose replies are not in the queue yet.
    running: usize,
    /// Bytes of requests that run and replies that wait.
    held: u64,
    out: VecDeque<Reply>,
    unsent: Unsent,
    writing: bool,
    /// The socket has no room for replies; epoll waits for it.
    blocked: bool,
    /// Failed or aborted: replies are discarded.
    broken: bool,
    closed: bool,
}

impl State {
    /// Queues a reply, or returns it if the connection has failed.
    fn enqueue(&mut self, reply: Reply) -> Option<Reply> {
        if self.broken {
            return Some(reply);
        }
        self.unsent.add(&reply);
        self.out.push_back(reply);
        None
    }
}

/// Bytes of replies that wait to be sent.
#[derive(Clone, Copy, Default)]
struct Unsent {
    all: usize,
    /// Those that are in no pooled buffer.
    loose: usize,
}

impl Unsent {
    fn add(&mut self, reply: &Reply) {
        self.all += reply.held();
        self.loose += reply.loose();
    }

    fn of(replies: &VecDeque<Reply>) -> Self {
        let mut unsent = Self::default();
        replies.iter().for_each(|reply| unsent.add(reply));
        unsent
    }

    /// Subtracts what was sent of `before`, of which `left` is left.
    fn sent(&mut self, before: Self, left: Self) {
        self.all = self.all.saturating_sub(before.all.saturating_sub(left.all));
        self.loose = self.loose.saturating_sub(before.loose.saturating_sub(left.loose));
    }

    fn is_much(self) -> bool {
        self.all > MAX_UNSENT || self.loose > MAX_LOOSE
    }
}

/// A request that was decoded and is to be run.
pub(crate) struct Task {
    pub(crate) connection: Arc<Connection>,
    pub(crate) request: Request,
    /// The payload, or room for the bytes of a read or for the answer to a block status request.
    pub(crate) buf: Option<PooledBuf>,
    pub(crate) held: u64,
    /// It waits for another request or job: its time says nothing about the device.
    pub(crate) waits: Option<BlockedRequest>,
}

impl Task {
    pub(crate) fn run(self, scratch: &mut Scratch) {
        let Self { connection, request, buf, held, waits } = self;
        let only_asks = matches!(request.command, Command::Read | Command::BlockStatus | Command::Cache);
        if only_asks && connection.is_broken() {
            drop((buf, waits));
            return connection.reply(Reply::bytes(Vec::new()), held);
        }
        let moves = request.command != Command::BlockStatus;
        let moved = buf.as_ref().filter(|_| moves).map_or(0, |b| b.len() as u64);
        // Long ones say nothing about those that the reader might run.
        let tells = waits.is_none() && moved <= MAX_INLINE;
        let timer = tells.then(|| connection.runtime.dispatch_policy(request.command).start_parallel());
        let reply = match buf {
            Some(buf) if request.command == Command::Read => execute::read(&connection, &request, buf),
            mut buf => {
                let has_payload = connection.params.payload_len(&request) > 0;
                let payload = buf.as_deref().filter(|_| has_payload).unwrap_or_default();
                scratch.out.clear();
                execute::run(&connection, &request, payload, &mut scratch.out);
                // A long answer goes into the buffer that was reserved for it; that of a write is free now.
                let room = buf.take_if(|room| !moves && room.fill(&scratch.out));
                let reply = match room {
                    Some(room) => Reply::in_room(room),
                    None => Reply::bytes(scratch.out.clone()),
                };
                scratch.out.clear();
                reply
            }
        };
        if let Some(timer) = timer {
            timer.stop(moved);
        }
        drop(waits);
        connection.reply(reply, held);
    }
}

impl Waiter for Connection {
    fn resume(self: Arc<Self>) {
        self.resume_reading();
    }
}

impl Connection {
    pub(crate) fn new(
        id: u64,
        transport: Transport,
        params: NegotiatedParams,
        runtime: Arc<ExportRuntime>,
        permit: ConnectionPermit,
    ) -> Arc<Self> {
        let account = Account::new(&runtime.memory);
        Arc::new(Self {
            id,
            account,
            transport,
            params,
            runtime,
            decoder: Mutex::default(),
            state: Mutex::new(State {
                reading: Reading::Active,
                again: false,
                running: 0,
                held: 0,
                out: VecDeque::new(),
                unsent: Unsent::default(),
                writing: false,
                blocked: false,
                broken: false,
                closed: false,
            }),
            arming: Mutex::default(),
            moved: AtomicU64::new(0),
            receiving: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            permit: Mutex::new(Some(permit)),
            log: ConnectionLog::new(),
        })
    }

    pub(crate) fn encoder(&self) -> Encoder {
        Encoder(self.params.format)
    }

    pub(crate) fn device(&self) -> &dyn BlockDevice {
        &*self.runtime.export.device
    }

    /// The export, for requests that read or write data.
    pub(crate) fn export(&self) -> &super::Export {
        &self.runtime.export
    }

    /// Reads for the client. Where a file below was cut short it reads zeros, as behind QEMU's server.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> blockmirror_block::Result<()> {
        self.runtime.export.read_at(buf, offset)
    }

    pub(crate) fn size(&self) -> u64 {
        self.params.size
    }

    /// Whether `range` was data when last looked up. It may be zero by now, which does no harm.
    pub(crate) fn is_known_data(&self, range: ByteRange) -> bool {
        self.runtime.known_data.lock().contains_range(range)
    }

    pub(crate) fn remember_data(&self, range: ByteRange) {
        *self.runtime.known_data.lock() = range;
    }

    pub(crate) fn forget_data(&self, range: ByteRange) {
        let mut known = self.runtime.known_data.lock();
        if known.overlaps(range) {
            *known = ByteRange::default();
        }
    }

    /// Fails if the connection is ending, so that long requests give up.
    pub(crate) fn check_ending(&self) -> Result<(), Failure> {
        if self.ending.load(Ordering::Relaxed) {
            return Err(Failure::new(Errno::SHUTDOWN, "the connection was cut off"));
        }
        Ok(())
    }

    /// A worker was woken for this connection; epoll does not wait for it any more.
    pub(crate) fn on_event(self: &Arc<Self>, events: EventFlags, scratch: &mut Scratch) {
        // Neither direction is open any more: pending requests are dropped.
        let failed = events.intersects(EventFlags::HUP | EventFlags::ERR);
        if failed {
            self.fail();
        }
        let (read, write) = {
            let mut state = self.state.lock();
            let waits = matches!(state.reading, Reading::Armed | Reading::Backpressured);
            let read = failed && waits || state.reading == Reading::Armed && events.contains(EventFlags::IN);
            if read {
                state.reading = Reading::Active;
            }
            let write = state.blocked && (failed || events.contains(EventFlags::OUT));
            if write {
                state.blocked = false;
                state.writing = true;
            }
            drop(state);
            self.arm();
            (read, write)
        };
        if write {
            self.send_queue();
        }
        if read {
            self.read(scratch);
        }
    }

    /// Arms epoll for the socket events that no worker handles. Called after each change of the state that
    /// needs it, not under the lock of the state: a worker may wake at once, and would wait for that. While
    /// requests run, a hang-up is noticed even if nothing is read.
    fn arm(&self) {
        let _arming = self.arming.lock();
        let interest = {
            let state = self.state.lock();
            let mut interest = match state.reading {
                Reading::Armed => Some(EventFlags::IN),
                Reading::Backpressured if !state.broken => Some(EventFlags::empty()),
                Reading::Ended if state.running > 0 && !state.broken => Some(EventFlags::empty()),
                _ => None,
            };
            if state.blocked {
                interest = Some(interest.unwrap_or(EventFlags::empty()) | EventFlags::OUT);
            }
            interest
        };
        if interest.is_some_and(|interest| self.runtime.pool.arm(self, interest).is_err()) {
            // No event would ever come for it again.
            self.fail();
        }
    }

    /// Reads, as the holder of the role, until the socket would block, the connection is backpressured, or
    /// other connections are due.
    pub(crate) fn read(self: &Arc<Self>, scratch: &mut Scratch) {
        let mut receives = 0;
        loop {
            let outcome = {
                let mut decoder = self.decoder.lock();
                let outcome = decoder.read_some(self, scratch);
                self.receiving.store(decoder.awaits_rest(), Ordering::Relaxed);
                outcome
            };
            self.send_scratch(scratch);
            receives += 1;
            // This worker runs the last request itself, after the socket has been armed for another one.
            let last = match outcome {
                ReadOutcome::More if receives < MAX_RECEIVES => {
                    self.queue_tasks(scratch);
                    continue;
                }
                ReadOutcome::More => {
                    // Behind all that is queued.
                    let last = scratch.tasks.pop();
                    self.queue_tasks(scratch);
                    self.runtime.pool.push(&self.runtime, Job::Resume(Arc::clone(self)));
                    last
                }
                ReadOutcome::WouldBlock => {
                    let last = scratch.tasks.pop();
                    self.queue_tasks(scratch);
                    {
                        let mut state = self.state.lock();
                        state.reading = Reading::Armed;
                        state.again = false;
                    }
                    self.arm();
                    last
                }
                ReadOutcome::Backpressured => {
                    self.queue_tasks(scratch);
                    let mut state = self.state.lock();
                    // If it has failed meanwhile, epoll does not wait for it, and its end is read now.
                    if std::mem::take(&mut state.again) || state.broken {
                        continue;
                    }
                    state.reading = Reading::Backpressured;
                    drop(state);
                    self.arm();
                    None
                }
                ReadOutcome::End => {
                    let last = scratch.tasks.pop();
                    self.queue_tasks(scratch);
                    let mut state = self.state.lock();
                    state.reading = Reading::Ended;
                    self.close_if_over(state);
                    self.arm();
                    last
                }
            };
            if let Some(task) = last {
                task.run(scratch);
            }
            return;
        }
    }

    fn queue_tasks(&self, scratch: &mut Scratch) {
        for task in scratch.tasks.drain(..) {
            self.runtime.pool.push(&self.runtime, Job::Run(task));
        }
    }

    /// Something was freed: reading may go on.
    fn resume_reading(self: &Arc<Self>) {
        self.resume_locked(&mut self.state.lock());
    }

    fn resume_locked(self: &Arc<Self>, state: &mut State) {
        match state.reading {
            Reading::Backpressured => {
                state.reading = Reading::Active;
                self.runtime.pool.push(&self.runtime, Job::Resume(Arc::clone(self)));
            }
            Reading::Active => state.again = true,
            Reading::Armed | Reading::Ended => {}
        }
    }

    /// Whether a request that holds `bytes` is admitted now; it then counts until its reply is queued. One
    /// that `waits` for another is not admitted while many do, unless nothing else would resume reading.
    pub(crate) fn admit(&self, bytes: u64, waits: bool) -> bool {
        let mut state = self.state.lock();
        if waits && state.running > 0 && self.runtime.many_blocked() {
            return false;
        }
        let fits = state.held == 0 || state.held.saturating_add(bytes) <= MAX_CONNECTION_BYTES;
        if state.running >= MAX_RUNNING || !fits || state.unsent.is_much() {
            return false;
        }
        state.running += 1;
        state.held += bytes;
        true
    }

    /// A request that was admitted is not run after all.
    pub(crate) fn withdraw(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.running -= 1;
        state.held -= bytes;
    }

    /// Whether so many replies are unsent that nothing more is read.
    pub(crate) fn is_backpressured(&self) -> bool {
        self.state.lock().unsent.is_much()
    }

    /// Whether nothing more is to be read: drained, aborted or failed.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Whether replies are discarded: aborted or failed.
    fn is_broken(&self) -> bool {
        self.state.lock().broken
    }

    /// Receives into `buf` and counts the bytes.
    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.transport.recv(buf)?;
        self.moved.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }

    /// Closes if nothing is read any more, nothing runs and nothing is to be sent.
    fn close_if_over(&self, mut state: blockmirror_block::sync::MutexGuard<'_, State>) {
        let over = state.reading == Reading::Ended
            && state.running == 0
            && !state.writing
            && !state.blocked
            && (state.out.is_empty() || state.broken);
        if !over || state.closed {
            return;
        }
        state.closed = true;
        drop(state);
        self.runtime.close(self);
    }

    /// Drains: no further request is read; those that run are answered.
    pub(crate) fn drain(self: &Arc<Self>) {
        self.ending.store(true, Ordering::Relaxed);
        self.transport.socket.shutdown_read();
        self.resume_reading();
    }

    /// Aborts: replies are discarded.
    pub(crate) fn abort(self: &Arc<Self>) {
        self.ending.store(true, Ordering::Relaxed);
        let write = {
            let mut state = self.state.lock();
            state.broken = true;
            let write = state.blocked && !state.writing;
            if write {
                state.blocked = false;
                state.writing = true;
            }
            write
        };
        self.transport.socket.shutdown();
        if write {
            self.send_queue();
        }
        self.resume_reading();
    }

    /// Releases the connection permit, although a worker may hold the connection a little longer.
    pub(crate) fn release(&self) {
        let permit = self.permit.lock().take();
        drop(permit);
    }

    /// Requests that run.
    pub(crate) fn running(&self) -> usize {
        self.state.lock().running
    }

    /// Bytes moved so far, if the peer owes some; `None` if it does not.
    pub(crate) fn awaited_progress(&self) -> Option<u64> {
        let blocked = self.state.lock().blocked;
        (blocked || self.receiving.load(Ordering::Relaxed)).then(|| self.moved.load(Ordering::Relaxed))
    }
}
