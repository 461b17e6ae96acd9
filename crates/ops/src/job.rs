//! A job on one thread: the handle of its user and the worker's side.
//!
//! `machine` decides. Here are a short mutex around it, two condition variables, and the thread.

mod machine;

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex, MutexGuard};
use blockmirror_block::{self as block, BlockDevice, ByteRange};
use blockmirror_mirror::{Event, IoStatus, JobState, OnError, Operation, Refused};

pub(crate) use self::machine::Failed;
use self::machine::{Machine, Step};
use crate::error::{Error, ErrorKind};

/// How often blocked calls are cancelled while a cancelled job is waited for: one may have begun since the
/// last time.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);

/// What can be asked of a job. Setters take and return it by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobOptions {
    pub(crate) speed: u64,
    pub(crate) on_error: OnError,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self { speed: 0, on_error: OnError::Report, auto_finalize: true, auto_dismiss: true }
    }
}

impl JobOptions {
    /// Bytes per second; 0, the default, is as fast as it goes.
    #[must_use]
    pub fn speed(mut self, bytes_per_second: u64) -> Self {
        self.speed = bytes_per_second;
        self
    }

    /// What happens when a piece fails. Default: [`OnError::Report`]. With [`OnError::Ignore`] the job goes
    /// on, but fails in the end and leaves the chain as it is.
    #[must_use]
    pub fn on_error(mut self, policy: OnError) -> Self {
        self.on_error = policy;
        self
    }

    /// Whether the chain is changed as soon as all is moved; otherwise the job waits for
    /// [`JobControl::finalize`]. Default: true.
    #[must_use]
    pub fn auto_finalize(mut self, auto: bool) -> Self {
        self.auto_finalize = auto;
        self
    }

    /// Whether a job that is over goes on to [`JobState::Null`] by itself; otherwise it waits for
    /// [`JobControl::dismiss`]. Default: true.
    #[must_use]
    pub fn auto_dismiss(mut self, auto: bool) -> Self {
        self.auto_dismiss = auto;
        self
    }
}

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
struct State {
    machine: Machine,
    ended: Option<Duration>,
    /// What may block, to be ended when the job is cancelled; empty once the job is over, so that nothing is
    /// kept open.
    devices: Vec<Arc<dyn BlockDevice>>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    /// *Guards*: the machine. *Order*: leaf. *Not under it*: I/O.
    state: Mutex<State>,
    /// The thread may have something to do, or has ended.
    changed: Condvar,
    /// There may be events.
    events: Condvar,
}

impl Shared {
    fn now(&self, state: &State) -> Duration {
        state.ended.unwrap_or_else(|| self.started.elapsed())
    }

    /// Reads or changes the machine, and wakes waiting threads.
    fn with_machine<R>(&self, f: impl FnOnce(&mut Machine, Duration) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.now(&state);
        let answer = f(&mut state.machine, now);
        self.changed.notify_all();
        self.events.notify_all();
        answer
    }

    fn cancel_in_flight(&self) {
        let devices = self.state.lock().devices.clone();
        devices.iter().for_each(|device| device.cancel_in_flight());
    }
}

/// Steers and watches a job from any thread. Cheap to clone; harmless once the job is over.
#[derive(Clone, Debug)]
pub struct JobControl {
    shared: Arc<Shared>,
}

impl JobControl {
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
    pub fn failure(&self) -> Option<(ErrorKind, String)> {
        self.shared.with_machine(|machine, _| {
            let error = machine.failure()?;
            Some((error.kind(), error.to_string()))
        })
    }

    /// What kind of error of a device the job fails with, if it is one; as long as [`failure`](Self::failure)
    /// tells.
    pub fn device_failure(&self) -> Option<block::ErrorKind> {
        self.shared.with_machine(|machine, _| Some(machine.failure()?.device_error()?.kind()))
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
    /// [`Refused`], as all verbs: the state does not allow it, or the user has paused the job (then only
    /// force ends it).
    pub fn cancel(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.cancel(false))?;
        self.shared.cancel_in_flight();
        Ok(())
    }

    /// Gives the job up, paused or not.
    ///
    /// # Errors
    /// [`Refused`] if it has ended already.
    pub fn force_cancel(&self) -> Result<(), Refused> {
        self.shared.with_machine(|machine, _| machine.cancel(true))?;
        self.shared.cancel_in_flight();
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

    fn wait(&self, timeout: Option<Duration>) -> bool {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        while !state.machine.is_over() {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            let aborting = state.machine.state == JobState::Aborting;
            let timeout =
                if aborting { Some(left.unwrap_or(CANCEL_INTERVAL).min(CANCEL_INTERVAL)) } else { left };
            state = wait_for(&shared.changed, state, timeout);
            if aborting && !state.machine.is_over() {
                drop(state);
                shared.cancel_in_flight();
                state = shared.state.lock();
            }
        }
        true
    }
}

fn wait_for<'a>(
    condition: &Condvar,
    state: MutexGuard<'a, State>,
    timeout: Option<Duration>,
) -> MutexGuard<'a, State> {
    match timeout {
        None => condition.wait(state),
        Some(timeout) => condition.wait_timeout(state, timeout).0,
    }
}

/// The worker's side of a job.
#[derive(Debug)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    left_out: Option<block::Error>,
}

impl Worker {
    /// Waits until the next piece may be begun; the most bytes it should have, at least `unit`.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(crate) fn next_step(&self, unit: u64, most: u64) -> Result<u64, Error> {
        self.wait(|machine, now| machine.next_step(now))?;
        let quota = self.shared.with_machine(|machine, _| machine.limiter.quota());
        let units = quota.min(most) / unit.max(1) * unit.max(1);
        Ok(units.max(unit))
    }

    /// A piece of `bytes` is done, of which `moved` had to be moved.
    pub(crate) fn done(&self, bytes: u64, moved: u64) {
        self.shared.with_machine(|machine, now| machine.done(now, bytes, moved));
    }

    /// A piece failed: whether it is to be tried again (true) or left out (false).
    ///
    /// # Errors
    /// The job fails.
    pub(crate) fn failed(
        &mut self,
        operation: Operation,
        range: ByteRange,
        error: block::Error,
    ) -> Result<bool, Error> {
        match self.shared.with_machine(|machine, _| machine.failed(operation, range, &error)) {
            Failed::Again => Ok(true),
            Failed::LeaveOut => {
                self.left_out.get_or_insert(error);
                Ok(false)
            }
            Failed::Abort if operation == Operation::Read => Err(Error::Read(error)),
            Failed::Abort => Err(Error::Write(error)),
        }
    }

    /// All pieces are done: waits until the last step may be taken.
    ///
    /// # Errors
    /// [`Error::Cancelled`], or [`Error::LeftOut`] if something was.
    pub(crate) fn last_step(&mut self) -> Result<(), Error> {
        if let Some(error) = self.left_out.take() {
            return Err(Error::LeftOut(error));
        }
        self.wait(|machine, _| machine.last_step())
    }

    fn wait(&self, ask: impl Fn(&mut Machine, Duration) -> Step) -> Result<(), Error> {
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        loop {
            let now = shared.now(&state);
            let step = ask(&mut state.machine, now);
            shared.events.notify_all();
            match step {
                Step::Go => return Ok(()),
                Step::Stop => return Err(Error::Cancelled),
                Step::Wait(timeout) => state = wait_for(&shared.changed, state, timeout),
            }
        }
    }
}

/// A running job. Dropping it cancels it and waits for its thread.
#[derive(Debug)]
pub(crate) struct Job {
    control: JobControl,
    thread: Option<JoinHandle<()>>,
}

impl Job {
    /// Starts `work` on a disk of `len` bytes. `devices` are what it may block on.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(crate) fn start(
        name: &str,
        len: u64,
        options: JobOptions,
        devices: Vec<Arc<dyn BlockDevice>>,
        work: impl FnOnce(&mut Worker) -> Result<(), Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let state = State { machine: Machine::new(len, options), ended: None, devices };
        let shared = Arc::new(Shared {
            started: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            events: Condvar::new(),
        });
        let control = JobControl { shared: Arc::clone(&shared) };
        let run = move || {
            let mut worker = Worker { shared: Arc::clone(&shared), left_out: None };
            // A device that panics must end the job, not hang its waiters. What `work` holds goes with it,
            // before the end of the job is reported.
            let result = panic::catch_unwind(AssertUnwindSafe(|| work(&mut worker)));
            let result = result.unwrap_or(Err(Error::Panicked));
            let mut state = shared.state.lock();
            state.devices.clear();
            // Whatever error a call that was ended returns, the reason is that the job was cancelled.
            let cancelled = state.machine.state == JobState::Aborting;
            state.machine.conclude(if cancelled { Err(Error::Cancelled) } else { result });
            state.ended = Some(shared.started.elapsed());
            drop(state);
            shared.changed.notify_all();
            shared.events.notify_all();
        };
        let thread = thread::Builder::new().name(name.into()).spawn(run).map_err(Error::Thread)?;
        Ok(Self { control, thread: Some(thread) })
    }

    pub(crate) fn control(&self) -> &JobControl {
        &self.control
    }

    pub(crate) fn wait(mut self) -> Result<Outcome, Error> {
        self.join();
        self.control.shared.with_machine(|machine, elapsed| {
            machine.result.take().unwrap_or(Err(Error::Panicked))?;
            Ok(Outcome { moved: machine.moved, elapsed })
        })
    }

    fn join(&mut self) {
        self.control.wait(None);
        if let Some(thread) = self.thread.take() {
            // A panic was caught, and is the result.
            let _ = thread.join();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // Refused if it is over, which is as good.
            let _ = self.control.force_cancel();
            self.join();
        }
    }
}
