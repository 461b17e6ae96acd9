//! One client in the transmission phase: who reads it, who writes it, and when it ends.
//!
//! Two roles, each held by at most one worker at a time: *reading* (taking bytes in and making requests of
//! them) and *writing* (sending replies). No worker waits for a role: one with a reply puts it into the
//! queue, and the present writer sends it too. Neither role blocks; when the socket has nothing, or no room,
//! the role is given up and epoll wakes a worker later.
//!
//! What must hold: a connection that is not being read is armed, parked until something is given back, or
//! ended. It closes when it has ended, no request runs and no reply is left, once.

mod output;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange};
use rustix::event::epoll::EventFlags;

use crate::proto::{Command, Errno, Request};

use super::execute;
use super::input::{INLINE, Input, Scratch, Turn};
use super::memory::{Account, Loan, Waiter};
use super::options::{MAX_CONNECTION_BYTES, MAX_LOOSE, MAX_RUNNING};
use super::pool::Job;
use super::reply::{Encoder, Reply};
use super::served::{Served, Waiting};
use super::slots::Slot;
use super::terms::{Failure, Terms};
use super::transport::Transport;

/// Unsent bytes from which on no further request is read.
const MAX_UNSENT: usize = 4 << 20;
/// Turns of reading after which other connections are looked at.
const TURNS: usize = 32;

/// One client.
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) transport: Transport,
    pub(crate) terms: Terms,
    pub(crate) served: Arc<Served>,
    pub(crate) account: Arc<Account>,
    input: Mutex<Input>,
    state: Mutex<State>,
    /// Held while the socket is armed, so that the last time is by the latest state; the state is locked
    /// inside it.
    arming: Mutex<()>,
    /// Counts bytes moved, so that a peer that stalls or is slow is noticed.
    moved: AtomicU64,
    /// Whether the rest of a request is awaited.
    receiving: AtomicBool,
    /// Ended from outside, or the socket failed: what is long gives up.
    cut: AtomicBool,
    slot: Mutex<Option<Slot>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reading {
    /// Some worker reads.
    Active,
    /// The socket is waited for.
    Armed,
    /// Until requests end, replies are sent or memory is given back.
    Parked,
    /// Nothing is read any more.
    Ended,
}

struct State {
    reading: Reading,
    /// Something was given back while reading was active: look again before parking.
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
    /// The socket failed: replies are thrown away.
    broken: bool,
    closed: bool,
}

impl State {
    /// Queues a reply, or gives it back if the connection is closed.
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
    /// Those that are in no lent buffer.
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

    /// Takes off what was sent of `before`, of which `left` is left.
    fn sent(&mut self, before: Self, left: Self) {
        self.all = self.all.saturating_sub(before.all.saturating_sub(left.all));
        self.loose = self.loose.saturating_sub(before.loose.saturating_sub(left.loose));
    }

    fn is_much(self) -> bool {
        self.all > MAX_UNSENT || self.loose > MAX_LOOSE
    }
}

/// A request that was read and is to be done.
pub(crate) struct Task {
    pub(crate) connection: Arc<Connection>,
    pub(crate) request: Request,
    /// The payload, or room for the bytes of a read or for the answer to a block status request.
    pub(crate) buf: Option<Loan>,
    pub(crate) held: u64,
    /// It has to wait for another request or job, which says nothing about the device.
    pub(crate) waits: Option<Waiting>,
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
        // Long ones say nothing about those that the reader might do.
        let tells = waits.is_none() && moved <= INLINE;
        let watch = tells.then(|| connection.served.pace(request.command).start_spread());
        let reply = match buf {
            Some(buf) if request.command == Command::Read => execute::read(&connection, &request, buf),
            mut buf => {
                let has_payload = connection.terms.payload_len(&request) > 0;
                let payload = buf.as_deref().filter(|_| has_payload).unwrap_or_default();
                scratch.out.clear();
                execute::run(&connection, &request, payload, &mut scratch.out);
                // A long answer goes where room was set aside for it; the bytes of a write need theirs no
                // more.
                let room = buf.take_if(|room| !moves && room.fill(&scratch.out));
                let reply = match room {
                    Some(room) => Reply::in_room(room),
                    None => Reply::bytes(scratch.out.clone()),
                };
                scratch.out.clear();
                reply
            }
        };
        if let Some(watch) = watch {
            watch.stop(moved);
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
        terms: Terms,
        served: Arc<Served>,
        slot: Slot,
    ) -> Arc<Self> {
        let account = Account::new(&served.memory);
        Arc::new(Self {
            id,
            account,
            transport,
            terms,
            served,
            input: Mutex::default(),
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
            cut: AtomicBool::new(false),
            slot: Mutex::new(Some(slot)),
        })
    }

    pub(crate) fn encoder(&self) -> Encoder {
        Encoder(self.terms.mode)
    }

    pub(crate) fn device(&self) -> &dyn BlockDevice {
        &*self.served.export.device
    }

    /// What the client's requests for data go to.
    pub(crate) fn export(&self) -> &super::Export {
        &self.served.export
    }

    /// Reads for the client. Where a file below was cut short it reads zeros, as behind QEMU's server.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> blockmirror_block::Result<()> {
        self.served.export.read_at(buf, offset)
    }

    pub(crate) fn size(&self) -> u64 {
        self.terms.size
    }

    /// Whether `range` was data when last looked up. It may be zero by now, which does no harm.
    pub(crate) fn is_known_data(&self, range: ByteRange) -> bool {
        self.served.known_data.lock().contains_range(range)
    }

    pub(crate) fn remember_data(&self, range: ByteRange) {
        *self.served.known_data.lock() = range;
    }

    pub(crate) fn forget_data(&self, range: ByteRange) {
        let mut known = self.served.known_data.lock();
        if known.overlaps(range) {
            *known = ByteRange::default();
        }
    }

    /// That a long request is still waited for.
    pub(crate) fn still_wanted(&self) -> Result<(), Failure> {
        if self.cut.load(Ordering::Relaxed) {
            return Err(Failure::new(Errno::SHUTDOWN, "the connection was cut off"));
        }
        Ok(())
    }

    /// A worker was woken for this connection; epoll does not wait for it any more.
    pub(crate) fn on_event(self: &Arc<Self>, events: EventFlags, scratch: &mut Scratch) {
        // Neither direction is open any more: what the client still asks for is dropped.
        let failed = events.intersects(EventFlags::HUP | EventFlags::ERR);
        if failed {
            self.break_off();
        }
        let (read, write) = {
            let mut state = self.state.lock();
            let waits = matches!(state.reading, Reading::Armed | Reading::Parked);
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

    /// Waits for the socket events that no worker handles. Called after each change of the state that calls
    /// for it, not under the lock of the state: a worker may wake at once, and would have to wait for it. The
    /// end of the client is waited for also while nothing is read but requests run.
    fn arm(&self) {
        let _arming = self.arming.lock();
        let interest = {
            let state = self.state.lock();
            let mut interest = match state.reading {
                Reading::Armed => Some(EventFlags::IN),
                Reading::Parked if !state.broken => Some(EventFlags::empty()),
                Reading::Ended if state.running > 0 && !state.broken => Some(EventFlags::empty()),
                _ => None,
            };
            if state.blocked {
                interest = Some(interest.unwrap_or(EventFlags::empty()) | EventFlags::OUT);
            }
            interest
        };
        if interest.is_some_and(|interest| self.served.pool.arm(self, interest).is_err()) {
            // Nothing would ever wake up for it again.
            self.break_off();
        }
    }

    /// Reads, as the holder of the role, until there is nothing more, or it must wait, or others had better
    /// have a turn.
    pub(crate) fn read(self: &Arc<Self>, scratch: &mut Scratch) {
        let mut turns = 0;
        loop {
            let turn = {
                let mut input = self.input.lock();
                let turn = input.turn(self, scratch);
                self.receiving.store(input.awaits_payload(), Ordering::Relaxed);
                turn
            };
            self.send_scratch(scratch);
            turns += 1;
            // The last request is done by this worker, after the socket has been armed so that another one
            // reads on.
            let last = match turn {
                Turn::More if turns < TURNS => {
                    self.hand_over(scratch);
                    continue;
                }
                Turn::More => {
                    // Behind everything else that is queued.
                    let last = scratch.tasks.pop();
                    self.hand_over(scratch);
                    self.served.pool.push(&self.served, Job::Resume(Arc::clone(self)));
                    last
                }
                Turn::Drained => {
                    let last = scratch.tasks.pop();
                    self.hand_over(scratch);
                    {
                        let mut state = self.state.lock();
                        state.reading = Reading::Armed;
                        state.again = false;
                    }
                    self.arm();
                    last
                }
                Turn::Wait => {
                    self.hand_over(scratch);
                    let mut state = self.state.lock();
                    if std::mem::take(&mut state.again) {
                        continue;
                    }
                    state.reading = Reading::Parked;
                    drop(state);
                    self.arm();
                    None
                }
                Turn::End => {
                    let last = scratch.tasks.pop();
                    self.hand_over(scratch);
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

    fn hand_over(&self, scratch: &mut Scratch) {
        for task in scratch.tasks.drain(..) {
            self.served.pool.push(&self.served, Job::Run(task));
        }
    }

    /// Something was given back: reading may go on.
    fn resume_reading(self: &Arc<Self>) {
        self.resume_locked(&mut self.state.lock());
    }

    fn resume_locked(self: &Arc<Self>, state: &mut State) {
        match state.reading {
            Reading::Parked => {
                state.reading = Reading::Active;
                self.served.pool.push(&self.served, Job::Resume(Arc::clone(self)));
            }
            Reading::Active => state.again = true,
            Reading::Armed | Reading::Ended => {}
        }
    }

    /// Whether a request that holds `bytes` may be taken in now; if so it counts until its reply is queued.
    /// One that `waits` had better not be taken in if many do, as long as something else will have reading go
    /// on.
    pub(crate) fn admit(&self, bytes: u64, waits: bool) -> bool {
        let mut state = self.state.lock();
        if waits && state.running > 0 && self.served.many_wait() {
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

    /// A request that was admitted is not done after all.
    pub(crate) fn withdraw(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.running -= 1;
        state.held -= bytes;
    }

    /// Whether replies pile up, so that nothing more should be read.
    pub(crate) fn is_congested(&self) -> bool {
        self.state.lock().unsent.is_much()
    }

    /// Whether nothing more is to be read: ended from outside, or replies cannot be sent.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Whether replies are thrown away, because the socket failed or the client was cut off.
    fn is_broken(&self) -> bool {
        self.state.lock().broken
    }

    /// Receives into `buf` and notes that bytes move.
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
        self.served.close(self);
    }

    /// No further request is read; those that run are answered.
    pub(crate) fn finish(self: &Arc<Self>) {
        self.cut.store(true, Ordering::Relaxed);
        self.transport.socket.shutdown_read();
        self.resume_reading();
    }

    /// Cuts the client off: replies are thrown away.
    pub(crate) fn cut_off(self: &Arc<Self>) {
        self.cut.store(true, Ordering::Relaxed);
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

    /// Makes room for another connection, though a worker may hold on to this one a little longer.
    pub(crate) fn leave(&self) {
        let slot = self.slot.lock().take();
        drop(slot);
    }

    /// Requests that run.
    pub(crate) fn running(&self) -> usize {
        self.state.lock().running
    }

    /// How many bytes have moved, if some are awaited; `None` if the peer owes nothing.
    pub(crate) fn awaited_progress(&self) -> Option<u64> {
        let blocked = self.state.lock().blocked;
        (blocked || self.receiving.load(Ordering::Relaxed)).then(|| self.moved.load(Ordering::Relaxed))
    }
}
