//! The one thread of a server that waits at its listeners, and looks from time to time for clients that have
//! stalled.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockmirror_block::sync::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use zerocopy::IntoBytes;

use super::ServerError;
use super::connection::Connection;
use super::listener::Listener;
use super::memory::RESERVE;
use super::options::MIN_RATE;
use super::server::Shared;

/// How often stalled clients are looked for, while there are clients; more often if they may stall less long.
const ROUND: Duration = Duration::from_secs(5);
/// How long no connection is accepted after the system had no descriptor or memory for one more.
const PAUSE: Duration = Duration::from_millis(100);

/// Wakes the doorman.
#[derive(Clone)]
pub(crate) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn ring(&self) {
        // If the counter is full it has been rung already.
        let _ = rustix::io::write(&*self.0, 1u64.as_bytes());
    }

    fn silence(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }
}

/// The listeners and the thread.
pub(crate) struct Doorman {
    bell: Bell,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    listeners: Vec<Arc<Listener>>,
    thread: Option<JoinHandle<()>>,
    closed: bool,
}

impl Doorman {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = Bell(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?));
        Ok(Self { bell, state: Mutex::default() })
    }

    pub(crate) fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Waits at `listener` too.
    pub(crate) fn add(&self, shared: &Arc<Shared>, listener: Listener) -> Result<(), ServerError> {
        self.start(shared)?;
        let mut state = self.state.lock();
        if state.closed {
            return Err(ServerError::Stopped);
        }
        state.listeners.push(Arc::new(listener));
        drop(state);
        self.bell.ring();
        Ok(())
    }

    /// Starts the thread if it does not run.
    pub(crate) fn start(&self, shared: &Arc<Shared>) -> Result<(), ServerError> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(ServerError::Stopped);
        }
        if state.thread.is_none() {
            let shared = Arc::clone(shared);
            let thread = thread::Builder::new()
                .name("nbd-doorman".into())
                .spawn(move || shared.doorman().work(&shared))
                .map_err(|cause| ServerError::System { what: "start a thread", cause })?;
            state.thread = Some(thread);
        }
        Ok(())
    }

    /// Closes all listeners and has the thread end.
    pub(crate) fn close(&self) {
        let listeners = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.listeners)
        };
        self.bell.ring();
        drop(listeners);
    }

    /// Waits for the end of the thread, after [`close`](Self::close).
    pub(crate) fn join(&self) {
        let thread = self.state.lock().thread.take();
        if let Some(thread) = thread {
            // It has no way to panic; if it did, it has ended as well.
            let _ = thread.join();
        }
    }

    fn work(&self, shared: &Arc<Shared>) {
        let mut stalls = Stalls::default();
        let mut pause_until: Option<Instant> = None;
        loop {
            let listeners = {
                let state = self.state.lock();
                if state.closed {
                    return;
                }
                state.listeners.clone()
            };
            let now = Instant::now();
            if pause_until.is_some_and(|until| until <= now) {
                pause_until = None;
            }
            let open = shared.slots.has_room() && pause_until.is_none();
            let mut fds = vec![PollFd::new(&*self.bell.0, PollFlags::IN)];
            if open {
                fds.extend(listeners.iter().map(|listener| PollFd::new(&**listener, PollFlags::IN)));
            }
            let timeout = match pause_until {
                Some(until) => Some(until.saturating_duration_since(now)),
                None => (shared.connections() > 0).then_some(round(shared)),
            };
            let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
            // An interrupted wait is a round with nothing to do.
            let _ = poll(&mut fds, timeout.as_ref());
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready.first() == Some(&true) {
                self.bell.silence();
            }
            for (listener, _) in listeners.iter().zip(ready.iter().skip(1)).filter(|(_, ready)| **ready) {
                if !let_in(shared, listener) {
                    shared.handshakes.end_oldest();
                    pause_until = Some(Instant::now() + PAUSE);
                }
            }
            stalls.look(shared);
            if shared.connections() == 0 {
                shared.memory.round();
            }
        }
    }
}

/// Lets everybody in who waits, as far as there is room. False if the system has no means for one more.
fn let_in(shared: &Arc<Shared>, listener: &Listener) -> bool {
    while shared.slots.has_room() {
        match listener.accept() {
            Ok(fd) => {
                if matches!(shared.serve(fd), Err(ServerError::System { .. })) {
                    return false;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            // This one has gone again.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Clients that owe bytes, with what they had moved when last looked at, and when that was first seen.
#[derive(Default)]
struct Stalls {
    seen: HashMap<(usize, u64), (u64, Instant)>,
    last: Option<Instant>,
}

impl Stalls {
    fn look(&mut self, shared: &Arc<Shared>) {
        let now = Instant::now();
        let round = round(shared);
        if self.last.is_some_and(|last| now < last + round) {
            return;
        }
        // Only clients that wait since the last round are a reason to ask others for a minimum rate.
        let lacking = self.last.and_then(|last| shared.memory.lacking(last));
        self.last = Some(now);
        let millis = u64::try_from(round.as_millis()).unwrap_or(u64::MAX);
        let least = millis.saturating_mul(MIN_RATE) / 1000;
        let mut slow = Vec::new();
        let before = std::mem::take(&mut self.seen);
        for served in shared.all() {
            for connection in served.connections() {
                let Some(moved) = connection.awaited_progress() else { continue };
                let key = (Arc::as_ptr(&served).addr(), connection.id);
                let then = before.get(&key);
                let since = match then {
                    Some((then, since)) if *then == moved => *since,
                    _ => now,
                };
                if now.duration_since(since) >= shared.options.stall_limit {
                    connection.cut_off();
                    continue;
                }
                self.seen.insert(key, (moved, since));
                let held = connection.account.held();
                if then.is_some_and(|(then, _)| moved - then < least) && held > RESERVE {
                    slow.push((held, connection));
                }
            }
        }
        if let Some(lacking) = lacking {
            cut_off_slow(slow, lacking);
        }
        shared.memory.round();
    }
}

/// Cuts off those of `slow` that hold most, until `lacking` bytes will be given back.
fn cut_off_slow(mut slow: Vec<(u64, Arc<Connection>)>, mut lacking: u64) {
    slow.sort_by_key(|(held, _)| Reverse(*held));
    for (held, connection) in slow {
        if lacking == 0 {
            return;
        }
        connection.cut_off();
        lacking = lacking.saturating_sub(held);
    }
}

/// How long it takes from one look at clients to the next.
fn round(shared: &Shared) -> Duration {
    ROUND.min(shared.options.stall_limit / 12)
}
