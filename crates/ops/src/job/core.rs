//! What a job decides: states, verbs, pauses, speed, what an error does. Pure; `now` is an argument.
//!
//! States, verbs and events are those of a mirror job that never becomes ready.

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange, ErrorKind};
use blockmirror_mirror::{ErrorAction, Event, IoStatus, JobState, OnError, Operation, Refused, Verb};
use blockmirror_ratelimit::RateLimiter;

use super::JobOptions;
use crate::error::Error;

/// Events that are kept until they are taken; older ones are dropped first.
const MAX_EVENTS: usize = 1024;

/// A range that failed under the `ignore` policy is left out after so many tries.
const TRIES: u32 = 3;

/// What the thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The next piece.
    Go,
    /// Ask again then, or when something has changed.
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
    Give,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) state: JobState,
    pub(super) io_status: IoStatus,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) moved: u64,
    pub(super) events: VecDeque<Event>,
    pub(super) limiter: RateLimiter,
    options: JobOptions,
    asked_to_pause: bool,
    stopped: bool,
    finalize: bool,
    tries: u32,
    pub(super) result: Option<Result<(), Error>>,
}

impl Core {
    pub(super) fn new(len: u64, options: JobOptions) -> Self {
        let mut core = Self {
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
            tries: 0,
            result: None,
        };
        core.tell(Event::Status(JobState::Created));
        core.become_(JobState::Running);
        core
    }

    fn tell(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn become_(&mut self, state: JobState) {
        if self.state != state {
            self.state = state;
            self.tell(Event::Status(state));
        }
    }

    fn allow(&self, verb: Verb) -> Result<(), Refused> {
        if self.state.allows(verb) { Ok(()) } else { Err(Refused::State { verb, state: self.state }) }
    }

    /// Whether there will be no event any more.
    pub(super) fn is_null(&self) -> bool {
        self.state == JobState::Null
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, JobState::Concluded | JobState::Null)
    }

    pub(super) fn cancel(&mut self, force: bool) -> Result<(), Refused> {
        let verb = if force { Verb::ForceCancel } else { Verb::Cancel };
        self.allow(verb)?;
        if self.asked_to_pause && !force {
            return Err(Refused::Paused { verb });
        }
        self.become_(JobState::Aborting);
        Ok(())
    }

    pub(super) fn pause(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Pause)?;
        if self.asked_to_pause {
            return Err(Refused::Paused { verb: Verb::Pause });
        }
        self.asked_to_pause = true;
        self.become_(JobState::Paused);
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Resume)?;
        if !self.asked_to_pause && !self.stopped {
            return Err(Refused::NotPaused);
        }
        self.asked_to_pause = false;
        self.stopped = false;
        self.io_status = IoStatus::Ok;
        self.become_(JobState::Running);
        Ok(())
    }

    pub(super) fn set_speed(&mut self, now: Duration, speed: u64) -> Result<(), Refused> {
        self.allow(Verb::SetSpeed)?;
        self.limiter.set_speed(now, speed);
        Ok(())
    }

    pub(super) fn finalize(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Finalize)?;
        self.finalize = true;
        Ok(())
    }

    pub(super) fn dismiss(&mut self) -> Result<(), Refused> {
        self.allow(Verb::Dismiss)?;
        self.become_(JobState::Null);
        Ok(())
    }

    /// Why the job fails, or has failed, until the result is taken.
    pub(super) fn failure(&self) -> Option<&Error> {
        match &self.result {
            Some(result) => result.as_ref().err(),
            None => (self.state == JobState::Aborting).then_some(&Error::Cancelled),
        }
    }

    /// Whether the next piece may be begun at `now`.
    pub(super) fn turn(&self, now: Duration) -> Turn {
        match self.state {
            JobState::Aborting => Turn::Stop,
            JobState::Paused => Turn::Wait(None),
            _ => match self.limiter.delay(now) {
                Duration::ZERO => Turn::Go,
                delay => Turn::Wait(Some(delay)),
            },
        }
    }

    /// A piece is done: `bytes` of the disk, of which `moved` were data that had to be moved.
    pub(super) fn done(&mut self, now: Duration, bytes: u64, moved: u64) {
        self.tries = 0;
        self.offset += bytes;
        self.moved += moved;
        self.limiter.account(now, moved);
    }

    /// A piece failed.
    pub(super) fn failed(&mut self, operation: Operation, range: ByteRange, error: &block::Error) -> Failed {
        if self.state == JobState::Aborting {
            return Failed::Give;
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
            _ => (ErrorAction::Report, Failed::Give),
        };
        self.tell(Event::Error { operation, action, range, message: error.to_string() });
        if action == ErrorAction::Stop {
            self.stopped = true;
            if self.io_status == IoStatus::Ok {
                self.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            }
            self.become_(JobState::Paused);
        }
        what
    }

    /// All pieces are done: whether the last step may be taken.
    pub(super) fn turn_to_end(&mut self) -> Turn {
        match self.state {
            JobState::Aborting => return Turn::Stop,
            JobState::Paused => return Turn::Wait(None),
            JobState::Pending => {}
            _ => {
                self.become_(JobState::Waiting);
                self.become_(JobState::Pending);
                if !self.finalize {
                    self.tell(Event::Pending);
                }
            }
        }
        if self.finalize { Turn::Go } else { Turn::Wait(None) }
    }

    /// The thread is about to end.
    pub(super) fn conclude(&mut self, result: Result<(), Error>) {
        let event = match &result {
            Ok(()) => Event::Completed { error: None },
            Err(Error::Cancelled) => Event::Cancelled,
            Err(error) => Event::Completed { error: Some(error.to_string()) },
        };
        if result.is_err() {
            self.become_(JobState::Aborting);
        }
        self.tell(event);
        self.become_(JobState::Concluded);
        if self.options.auto_dismiss {
            self.become_(JobState::Null);
        }
        self.result = Some(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn core(options: JobOptions) -> Core {
        Core::new(1 << 20, options)
    }

    fn statuses(core: &mut Core) -> Vec<&'static str> {
        core.events
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
        let mut core = core(JobOptions::default());
        core.done(NOW, 1 << 20, 0);
        assert_eq!(core.turn_to_end(), Turn::Go);
        core.conclude(Ok(()));
        assert_eq!(
            statuses(&mut core),
            ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]
        );
    }

    #[test]
    fn a_job_may_wait_to_be_finalized_and_dismissed() {
        let mut core = core(JobOptions::default().auto_finalize(false).auto_dismiss(false));
        assert!(core.finalize().is_err());
        assert_eq!(core.turn_to_end(), Turn::Wait(None));
        assert_eq!(core.turn_to_end(), Turn::Wait(None));
        core.finalize().unwrap();
        assert_eq!(core.turn_to_end(), Turn::Go);
        core.conclude(Ok(()));
        assert!(!core.is_null());
        core.dismiss().unwrap();
        assert_eq!(
            statuses(&mut core),
            ["created", "running", "waiting", "pending", "PENDING", "COMPLETED", "concluded", "null"]
        );
    }

    #[test]
    fn a_cancelled_job_stops_and_says_so() {
        let mut core = core(JobOptions::default());
        core.pause().unwrap();
        assert_eq!(core.cancel(false), Err(Refused::Paused { verb: Verb::Cancel }));
        assert_eq!(core.turn(NOW), Turn::Wait(None));
        core.cancel(true).unwrap();
        assert_eq!(core.turn(NOW), Turn::Stop);
        core.conclude(Err(Error::Cancelled));
        assert!(core.pause().is_err() && core.cancel(true).is_err());
        assert_eq!(
            statuses(&mut core),
            ["created", "running", "paused", "aborting", "CANCELLED", "concluded", "null"]
        );
    }

    #[test]
    fn what_an_error_does_follows_the_policy() {
        let range = ByteRange::at(0, 1);
        let io = block::Error::new(ErrorKind::Io, "read");
        for (policy, error, want) in [
            (OnError::Report, io, Failed::Give),
            (OnError::Stop, no_space(), Failed::Again),
            (OnError::Enospc, no_space(), Failed::Again),
            (OnError::Enospc, block::Error::new(ErrorKind::Io, "read"), Failed::Give),
            (OnError::Ignore, no_space(), Failed::Again),
        ] {
            let mut core = core(JobOptions::default().on_error(policy));
            assert_eq!(core.failed(Operation::Read, range, &error), want, "{policy:?}");
        }
        let mut core = core(JobOptions::default().on_error(OnError::Enospc));
        core.failed(Operation::Read, range, &no_space());
        assert_eq!((core.state, core.io_status), (JobState::Paused, IoStatus::NoSpace));
        assert_eq!(core.turn(NOW), Turn::Wait(None));
        core.resume().unwrap();
        assert_eq!((core.turn(NOW), core.io_status), (Turn::Go, IoStatus::Ok));
        assert_eq!(core.resume(), Err(Refused::NotPaused));
        assert_eq!(statuses(&mut core), ["created", "running", "ERROR stop", "paused", "running"]);
    }

    #[test]
    fn an_ignored_range_is_left_out_in_the_end() {
        let mut core = core(JobOptions::default().on_error(OnError::Ignore));
        let fail = |core: &mut Core| core.failed(Operation::Read, ByteRange::at(0, 1), &no_space());
        assert_eq!(
            [fail(&mut core), fail(&mut core), fail(&mut core)],
            [Failed::Again, Failed::Again, Failed::LeaveOut]
        );
        core.done(NOW, 1, 0);
        assert_eq!(fail(&mut core), Failed::Again);
    }

    #[test]
    fn the_speed_counts_what_was_moved() {
        let mut core = core(JobOptions::default().speed(1000));
        core.done(NOW, 1 << 19, 0);
        assert_eq!(core.turn(NOW), Turn::Go);
        core.done(NOW, 1 << 19, 500);
        assert_eq!(core.turn(NOW), Turn::Wait(Some(Duration::from_millis(500))));
        core.set_speed(NOW, 0).unwrap();
        assert_eq!(core.turn(NOW), Turn::Go);
    }
}
