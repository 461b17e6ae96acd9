//! A job under test together with the events that it has emitted, and the ways to each state.

use std::time::Duration;

use super::subject::{Disk, Features, Kind, Setup, Subject};
use crate::{ErrorAction, Event, JobState, OnError, Refused, Verb};

/// Long enough that only a hang reaches it.
const HANG: Duration = Duration::from_secs(60);

/// A job that starts and ends by itself as far as it can.
pub(super) const PLAIN: Setup =
    Setup { auto_finalize: true, auto_dismiss: true, on_error: OnError::Report, disk: Disk::Sound };

/// Where a job can be held. `created` and `waiting` are passed in one step with what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Running,
    PausedByUser,
    StoppedByError,
    Ready,
    Standby,
    Pending,
    Aborting,
    Concluded,
    Null,
}

impl Stage {
    const ALL: [Self; 9] = [
        Self::Running,
        Self::PausedByUser,
        Self::StoppedByError,
        Self::Ready,
        Self::Standby,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// Those that a kind can be held in.
    pub(super) fn of(features: Features) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |stage| match stage {
            Self::Running | Self::Concluded | Self::Null => true,
            Self::PausedByUser | Self::Aborting => features.interruptible,
            Self::StoppedByError => features.on_error,
            Self::Ready | Self::Standby => features.ready,
            Self::Pending => features.finalizes,
        })
    }

    pub(super) fn state(self) -> JobState {
        match self {
            Self::Running => JobState::Running,
            Self::PausedByUser | Self::StoppedByError => JobState::Paused,
            Self::Ready => JobState::Ready,
            Self::Standby => JobState::Standby,
            Self::Pending => JobState::Pending,
            Self::Aborting => JobState::Aborting,
            Self::Concluded => JobState::Concluded,
            Self::Null => JobState::Null,
        }
    }

    pub(super) fn is_paused(self) -> bool {
        matches!(self, Self::PausedByUser | Self::StoppedByError | Self::Standby)
    }
}

/// See the module's documentation.
pub(super) struct Life {
    subject: Box<dyn Subject>,
    events: Vec<Event>,
}

impl Drop for Life {
    fn drop(&mut self) {
        // The end of the job waits for what is held.
        self.subject.unblock();
    }
}

impl Life {
    pub(super) fn start(kind: &dyn Kind, setup: Setup) -> Self {
        Self { subject: kind.start(setup), events: Vec::new() }
    }

    /// A job that is held at `stage`.
    pub(super) fn at(kind: &dyn Kind, stage: Stage) -> Self {
        let held = Setup { disk: Disk::Blocks, ..PLAIN };
        match stage {
            Stage::Running => Self::start(kind, held),
            Stage::PausedByUser => Self::start(kind, held).asked(Verb::Pause),
            Stage::StoppedByError => {
                let setup = Setup { disk: Disk::Fails, on_error: OnError::Stop, ..PLAIN };
                Self::start(kind, setup).until(&Event::Status(JobState::Paused))
            }
            Stage::Ready => Self::start(kind, PLAIN).until(&Event::Ready),
            Stage::Standby => Self::start(kind, PLAIN).until(&Event::Ready).asked(Verb::Pause),
            Stage::Pending => Self::start(kind, Setup { auto_finalize: false, ..PLAIN })
                .complete(kind)
                .until(&Event::Pending),
            Stage::Aborting => Self::start(kind, held).asked(Verb::ForceCancel),
            Stage::Concluded => Self::start(kind, Setup { auto_dismiss: false, ..PLAIN })
                .complete(kind)
                .until(&Event::Status(JobState::Concluded)),
            Stage::Null => Self::at(kind, Stage::Concluded).asked(Verb::Dismiss),
        }
    }

    /// Asks for the end of a job that becomes ready; one of another kind ends by itself.
    pub(super) fn complete(self, kind: &dyn Kind) -> Self {
        if kind.features().ready { self.until(&Event::Ready).asked(Verb::Complete) } else { self }
    }

    pub(super) fn asked(self, verb: Verb) -> Self {
        let asked = self.request(verb);
        assert_eq!(asked, Ok(()), "{verb}, after {:?}", self.names());
        self
    }

    pub(super) fn request(&self, verb: Verb) -> Result<(), Refused> {
        self.subject.request(verb)
    }

    pub(super) fn state(&self) -> JobState {
        self.subject.state()
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.subject.failure()
    }

    pub(super) fn unblocked(self) -> Self {
        self.subject.unblock();
        self
    }

    /// Takes events up to and with `last`.
    pub(super) fn until(mut self, last: &Event) -> Self {
        while self.events.last() != Some(last) {
            let event = self.subject.next_event(HANG);
            let Some(event) = event else { panic!("no {last:?} after {:?}", self.names()) };
            self.events.push(event);
        }
        self
    }

    /// Takes the events that there are already.
    pub(super) fn drained(mut self) -> Self {
        self.events.extend(std::iter::from_fn(|| self.subject.next_event(Duration::ZERO)));
        self
    }

    /// Takes all events of a job that ends: the states after its end are queued together with it.
    pub(super) fn until_over(mut self) -> Self {
        while !self.events.iter().any(|event| matches!(event, Event::Completed { .. } | Event::Cancelled)) {
            let event = self.subject.next_event(HANG);
            let Some(event) = event else { panic!("no end after {:?}", self.names()) };
            self.events.push(event);
        }
        self.drained()
    }

    pub(super) fn events(&self) -> &[Event] {
        &self.events
    }

    /// The events in a word each: states as they are, others in capitals.
    pub(super) fn names(&self) -> Vec<&'static str> {
        self.events.iter().map(name).collect()
    }
}

fn name(event: &Event) -> &'static str {
    match event {
        Event::Status(state) => state.name(),
        Event::Ready => "READY",
        Event::Pending => "PENDING",
        Event::Completed { error: None } => "COMPLETED",
        Event::Completed { error: Some(_) } => "FAILED",
        Event::Cancelled => "CANCELLED",
        Event::CopyMode { .. } => "COPY_MODE",
        Event::Error { action: ErrorAction::Report, .. } => "ERROR report",
        Event::Error { action: ErrorAction::Stop, .. } => "ERROR stop",
        Event::Error { .. } => "ERROR",
    }
}
