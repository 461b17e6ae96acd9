//! Jobs that do one thing and end: `blockdev-create`, and a mirror that cannot begin because its disks differ
//! in length.
//!
//! Must hold, as in QEMU: a pause and a cancel of a job at work are noted, and its state does not show them.
//! A pause ends with the work; a cancel makes the result that of a job that was cancelled.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_mirror::{Event, IoStatus, JobState, Refused, Verb};

use super::{CANCELLED, Figures, JobCommand, JobHandle, JobOptions};

/// A job of one step, which is done to its end whatever is asked meanwhile.
#[derive(Clone, Debug)]
pub(crate) struct SimpleJob(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    auto_finalize: bool,
    auto_dismiss: bool,
    /// The total work, for progress.
    len: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    state: JobState,
    /// Asked for while it works.
    paused: bool,
    cancelled: bool,
    /// Why it fails, from *aborting* on.
    error: Option<String>,
    events: VecDeque<Event>,
}

impl SimpleJob {
    /// A job that has nothing to do.
    pub(crate) fn idle(options: &JobOptions) -> Self {
        let job = Self::new(options, 0);
        job.done(Ok(()));
        job
    }

    /// A job that begins `work` on a thread of its own.
    pub(crate) fn start(
        options: &JobOptions,
        work: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Self {
        let job = Self::new(options, 1);
        let (worker, span) = (job.clone(), options.span.clone());
        let spawned = thread::Builder::new().name(format!("job {}", options.id)).spawn(move || {
            let result = span.in_scope(work);
            worker.done(result);
        });
        if let Err(error) = spawned {
            job.done(Err(format!("cannot start a thread: {error}")));
        }
        job
    }

    /// A job that fails at once.
    pub(crate) fn failed(options: &JobOptions, error: String) -> Self {
        let job = Self::new(options, 0);
        job.done(Err(error));
        job
    }

    fn new(options: &JobOptions, len: u64) -> Self {
        let job = Self(Arc::new(Inner {
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            len,
            state: Mutex::new(State {
                state: JobState::Created,
                paused: false,
                cancelled: false,
                error: None,
                events: VecDeque::new(),
            }),
            changed: Condvar::new(),
        }));
        job.go(&[JobState::Created, JobState::Running]);
        job
    }

    /// Changes state and queues events in one step: a caller that takes the first of them finds the others
    /// there.
    fn step(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.state.lock());
        self.0.changed.notify_all();
    }

    fn go(&self, states: &[JobState]) {
        self.step(|state| state.go(states));
    }

    fn done(&self, result: Result<(), String>) {
        let Inner { auto_finalize, auto_dismiss, .. } = *self.0;
        self.step(|state| match result {
            Ok(()) if state.cancelled => state.abort(auto_dismiss),
            Ok(()) => {
                state.go(&[JobState::Waiting, JobState::Pending]);
                if auto_finalize {
                    state.conclude(None, auto_dismiss);
                } else {
                    state.events.push_back(Event::Pending);
                }
            }
            Err(error) => {
                state.error = Some(error.clone());
                state.go(&[JobState::Aborting]);
                state.conclude(Some(error), auto_dismiss);
            }
        });
    }
}

impl State {
    fn go(&mut self, states: &[JobState]) {
        for state in states {
            self.state = *state;
            self.events.push_back(Event::Status(*state));
        }
    }

    fn abort(&mut self, auto_dismiss: bool) {
        self.error = Some(CANCELLED.to_owned());
        self.go(&[JobState::Aborting]);
        self.end(Event::Cancelled, auto_dismiss);
    }

    fn conclude(&mut self, error: Option<String>, auto_dismiss: bool) {
        self.end(Event::Completed { error }, auto_dismiss);
    }

    fn end(&mut self, event: Event, auto_dismiss: bool) {
        self.events.push_back(event);
        self.go(&[JobState::Concluded]);
        if auto_dismiss {
            self.go(&[JobState::Null]);
        }
    }
}

impl JobHandle for SimpleJob {
    fn figures(&self) -> Figures {
        let over = !matches!(self.0.state.lock().state, JobState::Created | JobState::Running);
        let len = self.0.len;
        Figures {
            offset: if over { len } else { 0 },
            len,
            busy: !over,
            io_status: IoStatus::Ok,
            mirror: None,
        }
    }

    fn request(&self, command: JobCommand) -> Result<(), Refused> {
        let mut inner = self.0.state.lock();
        let (verb, state) = (verb(command), inner.state);
        if !state.allows(verb) {
            return Err(Refused::State { verb, state });
        }
        match command {
            JobCommand::Cancel(false) | JobCommand::Pause if inner.paused => {
                return Err(Refused::Paused { verb });
            }
            JobCommand::Cancel(_) if state == JobState::Pending => inner.abort(self.0.auto_dismiss),
            JobCommand::Cancel(_) => inner.cancelled = true,
            JobCommand::Pause => inner.paused = true,
            JobCommand::Resume if !inner.paused => return Err(Refused::NotPaused),
            JobCommand::Resume => inner.paused = false,
            JobCommand::Finalize => inner.conclude(None, self.0.auto_dismiss),
            JobCommand::Dismiss => inner.go(&[JobState::Null]),
            // For jobs that move data of a node, which this does not while it runs.
            JobCommand::SetSpeed(_) | JobCommand::Change(_) | JobCommand::Complete => {
                return Err(Refused::State { verb, state });
            }
        }
        self.0.changed.notify_all();
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.0.state.lock().error.clone()
    }

    fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut inner = self.0.state.lock();
        loop {
            if let Some(event) = inner.events.pop_front() {
                return Some(event);
            }
            if inner.state == JobState::Null {
                return None;
            }
            inner = match until {
                None => self.0.changed.wait(inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.0.changed.wait_timeout(inner, left).0
                }
            };
        }
    }
}

fn verb(command: JobCommand) -> Verb {
    match command {
        JobCommand::Cancel(false) => Verb::Cancel,
        JobCommand::Cancel(true) => Verb::ForceCancel,
        JobCommand::Pause => Verb::Pause,
        JobCommand::Resume => Verb::Resume,
        JobCommand::SetSpeed(_) => Verb::SetSpeed,
        JobCommand::Change(_) => Verb::Change,
        JobCommand::Complete => Verb::Complete,
        JobCommand::Finalize => Verb::Finalize,
        JobCommand::Dismiss => Verb::Dismiss,
    }
}

#[cfg(test)]
mod tests;
