//! The handle of a job, and what it shares with the worker: a short mutex around the machine, and two
//! condition variables. The machine decides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block as block;
use blockmirror_block::cancel::{CancelScope, CancelSource};
use blockmirror_block::sync::{Condvar, Mutex, MutexGuard};

use crate::error::JobError;
use crate::event::{Event, IoStatus};
use crate::machine::Machine;
use crate::state::{JobState, Refused};

/// Figures of a job, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobProgress {
    /// Where the job stands.
    pub state: JobState,
    /// Whether an error stopped it.
    pub io_status: IoStatus,
    /// Bytes of the disk dealt with. Only grows.
    pub offset: u64,
    /// Bytes of the disk.
    pub len: u64,
    /// Bytes that had to be moved so far.
    pub moved: u64,
    /// Bytes per second it is held to; 0 is as fast as it goes.
    pub speed: u64,
    /// Time since the start.
    pub elapsed: Duration,
}

/// How a job ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// Bytes that had to be moved.
    pub moved: u64,
    /// Time from start to end.
    pub elapsed: Duration,
}

#[derive(Debug)]
pub(crate) struct State<E> {
    pub(crate) machine: Machine<E>,
    pub(crate) ended: Option<Duration>,
}

#[derive(Debug)]
pub(crate) struct Shared<E> {
    pub(crate) started: Instant,
    /// *Guards*: the machine. *Order*: leaf. *Not under it*: I/O.
    pub(crate) state: Mutex<State<E>>,
    /// The thread may have something to do, or has ended.
    pub(crate) changed: Condvar,
    /// There may be events.
    pub(crate) events: Condvar,
    /// Cancels the calls of devices that the thread has made. Others use those devices too.
    pub(crate) calls: CancelSource,
}

impl<E: JobError> Shared<E> {
    pub(crate) fn new(machine: Machine<E>) -> Self {
        Self {
            started: Instant::now(),
            state: Mutex::new(State { machine, ended: None }),
            changed: Condvar::new(),
            events: Condvar::new(),
            calls: CancelSource::new(),
        }
    }

    pub(crate) fn now(&self, state: &State<E>) -> Duration {
        state.ended.unwrap_or_else(|| self.started.elapsed())
    }

    /// The calling thread, the job's, makes its calls of devices from now on. They are cancelled also where
    /// the job was before: a scope that is entered later than that would not be.
    pub(crate) fn enter_calls(&self) -> CancelScope {
        let calls = self.calls.enter();
        if self.with_machine(|machine, _| machine.state == JobState::Aborting) {
            self.calls.cancel();
        }
        calls
    }

    /// Reads or changes the machine, and wakes waiting threads.
    pub(crate) fn with_machine<R>(&self, f: impl FnOnce(&mut Machine<E>, Duration) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.now(&state);
        let answer = f(&mut state.machine, now);
        self.changed.notify_all();
        self.events.notify_all();
        answer
    }
}

/// Controls and watches a job from any thread. Cheap to clone; without effect once the job is over.
#[derive(Debug)]
pub struct JobControl<E> {
    pub(crate) shared: Arc<Shared<E>>,
}

impl<E> Clone for JobControl<E> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<E: JobError> JobControl<E> {
    /// The figures at this moment.
    pub fn progress(&self) -> JobProgress {
        self.shared.with_machine(|machine, now| JobProgress {
            state: machine.state,
            io_status: machine.io_status,
            offset: machine.offset,
            len: machine.len,
            moved: machine.moved,
            speed: machine.limiter.speed(),
            elapsed: now,
        })
    }

    /// Why the job fails or has failed: its kind, and in one line for people. There from
    /// [`Aborting`](JobState::Aborting) on, until the job's `wait` returns it.
    pub fn failure(&self) -> Option<(E::Kind, String)> {
        self.shared.with_machine(|machine, _| machine.with_failure(|error| (error.kind(), error.to_string())))
    }

    /// What kind of error of a device the job fails with, if it is one; as long as [`failure`](Self::failure)
    /// tells.
    pub fn device_failure(&self) -> Option<block::ErrorKind> {
        self.shared
            .with_machine(|machine, _| machine.with_failure(|error| error.device_error().map(|e| e.kind())))?
    }

    /// Takes the events since the last call, oldest first. If they are not taken, only the latest are kept.
    pub fn events(&self) -> Vec<Event> {
        self.shared.with_machine(|machine, _| machine.events.drain(..).collect())
    }

    /// The next event; waits for one for at most `timeout`, for ever if that is `None`. `None` if there was
    /// none, or the job is over (and dismissed) so that there will be none.
    pub fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.shared.state.lock();
        loop {
            if let Some(event) = state.machine.events.pop_front() {
                return Some(event);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if state.machine.is_null() || left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            state = match left {
                None => self.shared.events.wait(state),
                Some(left) => self.shared.events.wait_timeout(state, left).0,
            };
        }
    }

    /// Gives the job up: the chain stays as it is. What was moved already stays where it went, and does no
    /// harm there.
    ///
    /// # Errors
    /// [`Refused`], as all verbs: the state does not allow it, or the job is paused, by the user or by an
    /// error (then only force ends it).
    pub fn cancel(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.cancel(false))?;
        self.shared.calls.cancel();
        Ok(())
    }

    /// Gives the job up, paused or not.
    ///
    /// # Errors
    /// [`Refused`] if it has ended already.
    pub fn force_cancel(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.cancel(true))?;
        self.shared.calls.cancel();
        Ok(())
    }

    /// Begins no further piece until [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Refused`] if it is paused already, or about to end.
    pub fn pause(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.pause())
    }

    /// Goes on after [`pause`](Self::pause), and after an error policy stopped the job.
    ///
    /// # Errors
    /// [`Refused`] if it is not paused.
    pub fn resume(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.resume())
    }

    /// Changes the speed in bytes per second; 0 is as fast as it goes.
    ///
    /// # Errors
    /// [`Refused`] if the job is about to end.
    pub fn set_speed(&self, bytes_per_second: u64) -> Result<(), Refused> {
        self.shared.with_machine(|machine, now| machine.set_speed(now, bytes_per_second))
    }

    /// Lets a job end that was started with `auto_finalize` off.
    ///
    /// # Errors
    /// [`Refused`] unless it waits for that.
    pub fn finalize(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.finalize())
    }

    /// Forgets a job that is over and was started with `auto_dismiss` off.
    ///
    /// # Errors
    /// [`Refused`] unless it is over.
    pub fn dismiss(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.dismiss())
    }

    /// Waits until the job has ended, for at most `timeout`; true if it has.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.wait(Some(timeout))
    }

    pub(crate) fn wait(&self, timeout: Option<Duration>) -> bool {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        while !state.machine.is_over() {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            state = wait_for(&shared.changed, state, left);
        }
        true
    }
}

pub(crate) fn wait_for<'a, E>(
    condition: &Condvar,
    state: MutexGuard<'a, State<E>>,
    timeout: Option<Duration>,
) -> MutexGuard<'a, State<E>> {
    match timeout {
        None => condition.wait(state),
        Some(timeout) => condition.wait_timeout(state, timeout).0,
    }
}
