//! The worker threads of one export.
//!
//! All workers wait in one epoll for the sockets of the export's connections, so a request wakes one thread,
//! which reads, runs and answers it. One worker always waits while the limit allows: a worker that begins to
//! work starts another if none is idle. A device that hangs stops its own export only.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockmirror_block::sync::Mutex;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use zerocopy::IntoBytes;

use super::connection::{Connection, Task};
use super::export_runtime::ExportRuntime;
use super::request_decoder::Scratch;

/// The event that says that work is queued or that something changed.
const WAKE: u64 = 0;
/// A worker that had nothing to do for this long ends, if another one waits.
const IDLE: Duration = Duration::from_secs(10);

/// Work that does not come out of a socket.
pub(crate) enum Job {
    /// A request that was read.
    Run(Task),
    /// Go on reading a connection.
    Resume(Arc<Connection>),
}

/// The queue and the threads.
pub(crate) struct WorkerPool {
    epoll: OwnedFd,
    wake: OwnedFd,
    most: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Workers that wait in epoll.
    idle: usize,
    /// One of them has been woken for the queue and has not looked there yet. It wakes the next one if more
    /// is queued: quick requests are then run by a few threads, and slow ones still get one each.
    waking: bool,
    /// Connections whose sockets are waited for.
    connections: usize,
}

enum Next {
    Job(Job),
    Wait(Option<Duration>),
    End,
}

impl WorkerPool {
    pub(crate) fn new(most: usize) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Edge-triggered: each write wakes one worker, and the counter is not read.
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { epoll, wake, most: most.max(1), state: Mutex::default() })
    }

    /// The most threads.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Adds `connection` to the epoll set and has it read first.
    pub(crate) fn register(
        &self,
        runtime: &Arc<ExportRuntime>,
        connection: Arc<Connection>,
    ) -> io::Result<()> {
        // Without events: the first read arms it.
        let data = EventData::new_u64(connection.id);
        epoll::add(&self.epoll, &*connection.transport.socket, data, EventFlags::ONESHOT)?;
        let mut state = self.state.lock();
        state.connections += 1;
        state.jobs.push_back(Job::Resume(connection));
        let call = match self.call_or_start(&mut state, runtime) {
            Err(e) if state.threads == 0 => {
                state.jobs.pop_back();
                state.connections -= 1;
                return Err(e);
            }
            call => call.unwrap_or(false),
        };
        drop(state);
        if call {
            self.wake();
        }
        Ok(())
    }

    /// Removes `connection` from the epoll set.
    pub(crate) fn unregister(&self, connection: &Connection) {
        let _ = epoll::delete(&self.epoll, &*connection.transport.socket);
        let mut state = self.state.lock();
        state.connections -= 1;
        if state.connections == 0 {
            self.wake();
        }
    }

    /// Arms `connection` for one event of `interest`.
    pub(crate) fn arm(&self, connection: &Connection, interest: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(connection.id);
        epoll::modify(&self.epoll, &*connection.transport.socket, data, interest | EventFlags::ONESHOT)?;
        Ok(())
    }

    /// Queues `job` for a worker.
    pub(crate) fn push(&self, runtime: &Arc<ExportRuntime>, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        // If no thread can be started, the one that works now will look at the queue.
        let call = self.call_or_start(&mut state, runtime);
        drop(state);
        if let Ok(true) = call {
            self.wake();
        }
    }

    /// Makes sure that a worker looks at the queue. True if the caller is to [`wake`](Self::wake) a worker,
    /// once the state is not locked any more: it looks there at once.
    fn call_or_start(&self, state: &mut State, runtime: &Arc<ExportRuntime>) -> io::Result<bool> {
        if state.idle > 0 {
            return Ok(!std::mem::replace(&mut state.waking, true));
        }
        if state.threads < self.most {
            start(state, runtime)?;
        }
        Ok(false)
    }

    fn wake(&self) {
        // The counter cannot be full: that would take 2^64 writes.
        let _ = rustix::io::write(&self.wake, 1u64.as_bytes());
    }

    /// The next thing to do. Counts the worker as idle if it is to wait.
    fn next(&self, runtime: &Arc<ExportRuntime>) -> Next {
        let mut state = self.state.lock();
        if let Some(job) = state.jobs.pop_front() {
            // One write may have stood for several jobs, and one thread has to wait for sockets meanwhile.
            let mut call = false;
            if !state.jobs.is_empty() || state.idle == 0 {
                call = self.call_or_start(&mut state, runtime).unwrap_or(false);
            }
            drop(state);
            if call {
                self.wake();
            }
            return Next::Job(job);
        }
        if state.connections == 0 {
            state.threads -= 1;
            if state.threads > 0 {
                self.wake();
            }
            return Next::End;
        }
        state.idle += 1;
        Next::Wait((state.idle > 1).then_some(IDLE))
    }

    /// The worker does not wait any more, perhaps because it was `called` to the queue; if it goes on to work
    /// and no other waits, another one is started.
    fn woken(&self, runtime: &Arc<ExportRuntime>, timed_out: bool, called: bool) -> bool {
        let mut state = self.state.lock();
        state.idle -= 1;
        if called {
            state.waking = false;
        }
        if timed_out && state.idle > 0 && state.jobs.is_empty() {
            state.threads -= 1;
            return false;
        }
        if !timed_out && state.idle == 0 && state.threads < self.most {
            // Without it this worker goes on alone.
            let _ = start(&mut state, runtime);
        }
        true
    }

    fn work(&self, runtime: &Arc<ExportRuntime>) {
        let _calls = runtime.calls.enter();
        let mut scratch = Scratch::default();
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(WAKE) }];
        loop {
            let timeout = match self.next(runtime) {
                Next::Job(Job::Run(task)) => {
                    task.run(&mut scratch);
                    continue;
                }
                Next::Job(Job::Resume(connection)) => {
                    connection.read(&mut scratch);
                    continue;
                }
                Next::Wait(timeout) => timeout,
                Next::End => return,
            };
            let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
            let n = loop {
                match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                    Err(rustix::io::Errno::INTR) => {}
                    other => break other.unwrap_or(0),
                }
            };
            let timed_out = n == 0;
            let data = events[0].data;
            let called = !timed_out && data.u64() == WAKE;
            if !self.woken(runtime, timed_out, called) {
                return;
            }
            if !timed_out && !called {
                let flags = events[0].flags;
                if let Some(connection) = runtime.connection(data.u64()) {
                    connection.on_event(flags, &mut scratch);
                }
            }
        }
    }
}

fn start(state: &mut State, runtime: &Arc<ExportRuntime>) -> io::Result<()> {
    let runtime = Arc::clone(runtime);
    thread::Builder::new().name("nbd-worker".into()).spawn(move || runtime.pool.work(&runtime))?;
    state.threads += 1;
    Ok(())
}
