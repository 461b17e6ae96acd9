//! The state machine of a job: states, verbs, pauses, speed, error policy. Pure: `now` is an argument.
//!
//! States, verbs and events are those of a mirror job that never becomes ready. Called under the mutex of the
//! job's [handle](crate::JobControl) and of its worker.

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange, ErrorKind};
use blockmirror_ratelimit::RateLimiter;

use crate::error::JobError;
use crate::event::{ErrorAction, Event, IoStatus, Operation};
use crate::options::{JobOptions, OnError};
use crate::state::{JobState, Refused, Verb};

/// The maximum of events kept until they are taken; the oldest are dropped first.
const MAX_EVENTS: usize = 1024;

/// After how many tries a range is left out that fails under the policy `ignore`.
const TRIES: u32 = 3;

/// What the worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The next piece.
    Go,
    /// Ask again after this time, or when the machine has changed.
    Wait(Option<Duration>),
    /// End without finishing.
    Stop,
}

/// What becomes of a piece that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// It is tried again, once the job may go on.
    Again,
    /// The job goes on without it, and fails in the end.
    LeaveOut,
    /// The job fails.
    Abort,
}

#[derive(Debug)]
pub(crate) struct Machine<E> {
    pub(crate) state: JobState,
    pub(crate) io_status: IoStatus,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) moved: u64,
    pub(crate) events: VecDeque<Event>,
    pub(crate) limiter: RateLimiter,
    options: JobOptions,
    asked_to_pause: bool,
    stopped: bool,
    finalize: bool,
    past_commit_point: bool,
    tries: u32,
    pub(crate) result: Option<Result<(), E>>,
}

impl<E: JobError> Machine<E> {
    pub(crate) fn new(len: u64, options: JobOptions) -> Self {
        let mut machine = Self {
            state: JobState::Created,
            io_status: IoStatus::Ok,
            offset: 0,
            len,
            moved: 0,
            events: VecDeque::new(),
            limiter: RateLimiter::new(options.speed),
            options,
            asked_to_pause: false,
            stopped: false,
            finalize: options.auto_finalize,
            past_commit_point: false,
            tries: 0,
            result: None,
        };
        machine.tell(Event::Status(JobState::Created));
        machine.set_state(JobState::Running);
        machine
    }

    fn tell(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn set_state(&mut self, state: JobState) {
        if self.state != state {
            self.state = state;
            self.tell(Event::Status(state));
        }
    }

    fn allow(&self, verb: Verb) -> Result<(), Refused> {
        if self.state.allows(verb) { Ok(()) } else { Err(Refused::State { verb, state: self.state }) }
    }

    /// Whether there will be no event any more.
    pub(crate) fn is_null(&self) -> bool {
        self.state == JobState::Null
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, JobState::Concluded | JobState::Null)
    }

    /// Paused by the user, or stopped by an error policy.
    fn is_paused(&self) -> bool {
        self.asked_to_pause || self.stopped
    }

    pub(crate) fn cancel(&mut self, force: bool) -> Result<(), Refused> {
        let verb = if force { Verb::ForceCancel } else { Verb::Cancel };
        self.allow(verb)?;
        if self.past_commit_point {
            return Err(Refused::State { verb, state: self.state });
        }
        if self.is_paused() && !force {
            return Err(Refused::Paused { verb });
        }
        self.set_state(JobState::Aborting);
        Ok(())
    }

    pub(crate) fn pause(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Pause)?;
        if self.is_paused() {
            return Err(Refused::Paused { verb: Verb::Pause });
        }
        self.asked_to_pause = true;
        self.set_state(JobState::Paused);
        Ok(())
    }

    pub(crate) fn resume(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Resume)?;
        if !self.is_paused() {
            return Err(Refused::NotPaused);
        }
        self.asked_to_pause = false;
        self.stopped = false;
        self.io_status = IoStatus::Ok;
        self.set_state(JobState::Running);
        Ok(())
    }

    pub(crate) fn set_speed(&mut self, now: Duration, speed: u64) -> Result<(), Refused> {
        self.allow(Verb::SetSpeed)?;
        self.limiter.set_speed(now, speed);
        Ok(())
    }

    pub(crate) fn finalize(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Finalize)?;
        self.finalize = true;
        Ok(())
    }

    pub(crate) fn dismiss(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Dismiss)?;
        self.set_state(JobState::Null);
        Ok(())
    }

    /// Why the job fails, or has failed, until the result is taken.
    pub(crate) fn with_failure<R>(&self, f: impl FnOnce(&E) -> R) -> Option<R> {
        match &self.result {
            Some(result) => result.as_ref().err().map(f),
            None => (self.state == JobState::Aborting).then(|| f(&E::cancelled())),
        }
    }

    /// Whether the next piece may be begun at `now`.
    pub(crate) fn next_step(&self, now: Duration) -> Step {
        match self.state {
            JobState::Aborting => Step::Stop,
            JobState::Paused => Step::Wait(None),
            _ => match self.limiter.delay(now) {
                Duration::ZERO => Step::Go,
                delay => Step::Wait(Some(delay)),
            },
        }
    }

    /// A piece is done: `bytes` of the disk, of which `moved` were data that had to be moved.
    pub(crate) fn done(&mut self, now: Duration, bytes: u64, moved: u64) {
        self.tries = 0;
        self.offset += bytes;
        self.moved += moved;
        self.limiter.account(now, moved);
    }

    /// A piece failed.
    pub(crate) fn failed(&mut self, operation: Operation, range: ByteRange, error: &block::Error) -> Failed {
        if self.state == JobState::Aborting {
            return Failed::Abort;
        }
        let no_space = error.kind() == ErrorKind::NoSpace;
        let (action, what) = match self.options.on_error {
            OnError::Ignore => {
                self.tries += 1;
                let last = self.tries == TRIES;
                (ErrorAction::Ignore, if last { Failed::LeaveOut } else { Failed::Again })
            }
            OnError::Stop => (ErrorAction::Stop, Failed::Again),
            OnError::Enospc | OnError::Auto if no_space => (ErrorAction::Stop, Failed::Again),
            _ => (ErrorAction::Report, Failed::Abort),
        };
        self.tell(Event::Error { operation, action, range, message: error.to_string() });
        if action == ErrorAction::Stop {
            self.stopped = true;
            if self.io_status == IoStatus::Ok {
                self.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            }
            self.set_state(JobState::Paused);
        }
        what
    }

    /// All pieces are done: whether the last step may be taken.
    pub(crate) fn last_step(&mut self) -> Step {
        match self.state {
            JobState::Aborting => return Step::Stop,
            JobState::Paused => return Step::Wait(None),
            JobState::Pending => {}
            _ => {
                self.set_state(JobState::Waiting);
                self.set_state(JobState::Pending);
                if !self.finalize {
                    self.tell(Event::Pending);
                }
            }
        }
        if self.finalize { Step::Go } else { Step::Wait(None) }
    }

    /// What others see of the job changes from here on: a job that is cancelled stops before it, and later it
    /// cannot be cancelled.
    pub(crate) fn pass_commit_point(&mut self) -> Step {
        if self.state == JobState::Aborting {
            return Step::Stop;
        }
        self.past_commit_point = true;
        Step::Go
    }

    /// The thread is about to end.
    pub(crate) fn conclude(&mut self, result: Result<(), E>) {
        let event = match &result {
            Ok(()) => Event::Completed { error: None },
            Err(error) if error.is_cancelled() => Event::Cancelled,
            Err(error) => Event::Completed { error: Some(error.to_string()) },
        };
        if result.is_err() {
            self.set_state(JobState::Aborting);
        }
        self.tell(event);
        self.set_state(JobState::Concluded);
        if self.options.auto_dismiss {
            self.set_state(JobState::Null);
        }
        self.result = Some(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::testing::TestError;

    const NOW: Duration = Duration::ZERO;

    fn machine(options: JobOptions) -> Machine<TestError> {
        Machine::new(1 << 20, options)
    }

    fn statuses(machine: &mut Machine<TestError>) -> Vec<&'static str> {
        machine
            .events
            .drain(..)
            .map(|event| match event {
                Event::Status(state) => state.name(),
                Event::Pending => "PENDING",
                Event::Completed { error: None } => "COMPLETED",
                Event::Completed { .. } => "FAILED",
                Event::Cancelled => "CANCELLED",
                Event::Error { action: ErrorAction::Stop, .. } => "ERROR stop",
                Event::Error { .. } => "ERROR",
                _ => "?",
            })
            .collect()
    }

    fn no_space() -> block::Error {
        block::Error::new(ErrorKind::NoSpace, "write")
    }

    #[test]
    fn the_order_of_a_life() {
        let mut machine = machine(JobOptions::default());
        machine.done(NOW, 1 << 20, 0);
        assert_eq!(machine.last_step(), Step::Go);
        machine.conclude(Ok(()));
        assert_eq!(
            statuses(&mut machine),
            ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]
        );
    }

    #[test]
    fn a_job_may_wait_to_be_finalized_and_dismissed() {
        let mut machine = machine(JobOptions::default().auto_finalize(false).auto_dismiss(false));
        assert!(machine.finalize().is_err());
        assert_eq!(machine.last_step(), Step::Wait(None));
        assert_eq!(machine.last_step(), Step::Wait(None));
        machine.finalize().unwrap();
        assert_eq!(machine.last_step(), Step::Go);
        machine.conclude(Ok(()));
        assert!(!machine.is_null());
        machine.dismiss().unwrap();
        assert_eq!(
            statuses(&mut machine),
            ["created", "running", "waiting", "pending", "PENDING", "COMPLETED", "concluded", "null"]
        );
    }

    #[test]
    fn a_cancelled_job_stops_and_says_so() {
        let mut machine = machine(JobOptions::default());
        machine.pause().unwrap();
        assert_eq!(machine.cancel(false), Err(Refused::Paused { verb: Verb::Cancel }));
        assert_eq!(machine.next_step(NOW), Step::Wait(None));
        machine.cancel(true).unwrap();
        assert_eq!(machine.next_step(NOW), Step::Stop);
        machine.conclude(Err(TestError::Cancelled));
        assert!(machine.pause().is_err() && machine.cancel(true).is_err());
        assert_eq!(
            statuses(&mut machine),
            ["created", "running", "paused", "aborting", "CANCELLED", "concluded", "null"]
        );
    }

    #[test]
    fn a_job_is_cancelled_before_its_commit_point_or_not_at_all() {
        let mut machine = machine(JobOptions::default());
        assert_eq!((machine.last_step(), machine.pass_commit_point()), (Step::Go, Step::Go));
        for force in [false, true] {
            let refused = machine.cancel(force).unwrap_err();
            assert!(matches!(refused, Refused::State { state: JobState::Pending, .. }), "{refused}");
        }
        machine.conclude(Ok(()));
        let mut cancelled = self::machine(JobOptions::default());
        assert_eq!(cancelled.last_step(), Step::Go);
        cancelled.cancel(false).unwrap();
        assert_eq!(cancelled.pass_commit_point(), Step::Stop);
    }

    #[test]
    fn what_an_error_does_follows_the_policy() {
        let range = ByteRange::at(0, 1);
        let io = block::Error::new(ErrorKind::Io, "read");
        for (policy, error, want) in [
            (OnError::Report, io, Failed::Abort),
            (OnError::Stop, no_space(), Failed::Again),
            (OnError::Enospc, no_space(), Failed::Again),
            (OnError::Enospc, block::Error::new(ErrorKind::Io, "read"), Failed::Abort),
            (OnError::Ignore, no_space(), Failed::Again),
        ] {
            let mut machine = machine(JobOptions::default().on_error(policy));
            assert_eq!(machine.failed(Operation::Read, range, &error), want, "{policy:?}");
        }
        let mut machine = machine(JobOptions::default().on_error(OnError::Enospc));
        machine.failed(Operation::Read, range, &no_space());
        assert_eq!((machine.state, machine.io_status), (JobState::Paused, IoStatus::NoSpace));
        assert_eq!(machine.next_step(NOW), Step::Wait(None));
        machine.resume().unwrap();
        assert_eq!((machine.next_step(NOW), machine.io_status), (Step::Go, IoStatus::Ok));
        assert_eq!(machine.resume(), Err(Refused::NotPaused));
        assert_eq!(statuses(&mut machine), ["created", "running", "ERROR stop", "paused", "running"]);
    }

    #[test]
    fn an_ignored_range_is_left_out_in_the_end() {
        let mut machine = machine(JobOptions::default().on_error(OnError::Ignore));
        let fail = |machine: &mut Machine<TestError>| {
            machine.failed(Operation::Read, ByteRange::at(0, 1), &no_space())
        };
        assert_eq!(
            [fail(&mut machine), fail(&mut machine), fail(&mut machine)],
            [Failed::Again, Failed::Again, Failed::LeaveOut]
        );
        machine.done(NOW, 1, 0);
        assert_eq!(fail(&mut machine), Failed::Again);
    }

    #[test]
    fn the_speed_counts_what_was_moved() {
        let mut machine = machine(JobOptions::default().speed(1000));
        machine.done(NOW, 1 << 19, 0);
        assert_eq!(machine.next_step(NOW), Step::Go);
        machine.done(NOW, 1 << 19, 500);
        assert_eq!(machine.next_step(NOW), Step::Wait(Some(Duration::from_millis(500))));
        machine.set_speed(NOW, 0).unwrap();
        assert_eq!(machine.next_step(NOW), Step::Go);
    }
}
