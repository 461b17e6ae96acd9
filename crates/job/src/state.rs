//! The states of a job, the verbs each allows, and the moves between them: the one table.
//!
//! A job moves its state only along [`JobState::can_transition_to`]; every verb of a user is first checked
//! against [`JobState::allows`]. Names are those that management layers know.

use std::fmt;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum JobState {
    /// Set up; nothing was done yet.
    Created,
    /// Moving data, or waiting for its turn to. The target has not been equal to the source yet.
    Running,
    /// Running, but asked to pause or stopped by an error policy. Operations that had begun are finished when
    /// `in_flight` is 0.
    Paused,
    /// The target was equal to the source, and durable; what is written since is copied at once.
    Ready,
    /// Ready, but asked to pause or stopped by an error policy.
    Standby,
    /// The end was asked for and is near.
    Waiting,
    /// Waits for [`Verb::Finalize`], still copying what is written. Should an error policy stop it here,
    /// [`Verb::Resume`] is allowed, too, and `Finalize` refused until then.
    Pending,
    /// Given up or cancelled; the last operations are being waited for.
    Aborting,
    /// Over. The job's `wait` returns the result.
    Concluded,
    /// Over and dismissed.
    Null,
}

/// What a user can ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verb {
    /// End without the pivot and keep the target as a copy if the job is ready; otherwise give the job up.
    Cancel,
    /// Give the job up, at once.
    ForceCancel,
    /// Start nothing new.
    Pause,
    /// Go on.
    Resume,
    /// Another speed.
    SetSpeed,
    /// Another copy mode.
    Change,
    /// End with the pivot.
    Complete,
    /// End now, where the job was started with `auto_finalize` off.
    Finalize,
    /// Forget the job.
    Dismiss,
}

impl JobState {
    /// All of them, in the order of a job's life.
    pub const ALL: [Self; 10] = [
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// The wire name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job in this state can be asked to `verb`.
    pub const fn allows(self, verb: Verb) -> bool {
        use JobState::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match verb {
            Verb::Cancel | Verb::ForceCancel => {
                matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => matches!(self, Pending),
            Verb::Dismiss => matches!(self, Concluded),
        }
    }

    /// Whether a job can go from this state to `next` in one move.
    pub const fn can_transition_to(self, next: Self) -> bool {
        use JobState::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        match self {
            Created => matches!(next, Running | Aborting),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => matches!(next, Running | Aborting),
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => matches!(next, Ready | Aborting),
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Concluded | Aborting),
            Aborting => matches!(next, Concluded),
            Concluded => matches!(next, Null),
            Null => false,
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Cancel,
        Self::ForceCancel,
        Self::Pause,
        Self::Resume,
        Self::SetSpeed,
        Self::Change,
        Self::Complete,
        Self::Finalize,
        Self::Dismiss,
    ];

    /// The verb in one or two words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::ForceCancel => "force-cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Change => "change",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A verb that a job could not follow; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The state does not allow it.
    #[error("a job that is {state} cannot {verb}")]
    State {
        /// What was asked.
        verb: Verb,
        /// The job's state.
        state: JobState,
    },
    /// The job is paused already, or it is paused and only force ends it.
    #[error("the job is paused: cannot {verb}")]
    Paused {
        /// What was asked.
        verb: Verb,
    },
    /// The job is not paused.
    #[error("the job is not paused")]
    NotPaused,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_states_by_nine_verbs() {
        // soft cancel, force cancel, pause, resume, set-speed, change, complete, finalize, dismiss
        let table = [
            (JobState::Created, "cfprsx..."),
            (JobState::Running, "cfprsx..."),
            (JobState::Paused, "cfprsx..."),
            (JobState::Ready, "cfprsxC.."),
            (JobState::Standby, "cfprsxC.."),
            (JobState::Waiting, "cf......."),
            (JobState::Pending, "cf.....F."),
            (JobState::Aborting, "........."),
            (JobState::Concluded, "........D"),
            (JobState::Null, "........."),
        ];
        let mut cells = 0;
        for (state, allowed) in table {
            for (verb, mark) in Verb::ALL.into_iter().zip(allowed.chars()) {
                assert_eq!(state.allows(verb), mark != '.', "{state} {verb}");
                cells += 1;
            }
        }
        assert_eq!(cells, 90);
    }

    #[test]
    fn every_state_is_reached_and_every_state_but_the_last_is_left() {
        for state in JobState::ALL {
            let reached = JobState::ALL.into_iter().any(|from| from.can_transition_to(state));
            assert_eq!(reached, state != JobState::Created, "{state}");
            let left = JobState::ALL.into_iter().any(|next| state.can_transition_to(next));
            assert_eq!(left, state != JobState::Null, "{state}");
        }
        // Ready is never taken back, and nothing follows an end but its own steps.
        for next in JobState::ALL {
            assert!(
                next == JobState::Ready
                    || !JobState::Standby.can_transition_to(next)
                    || next == JobState::Aborting
            );
            assert_eq!(JobState::Aborting.can_transition_to(next), next == JobState::Concluded);
        }
    }
}
