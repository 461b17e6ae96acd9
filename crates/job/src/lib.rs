//! Jobs as QEMU knows them: the states, verbs and events that all jobs share, and a job on one thread.
//!
//! ```text
//!   user ---- JobControl ----+                        +---- Worker ---- the work of the job
//!             verbs, events, |     one short mutex    |     next step, done, failed,
//!             progress       +------- Machine -------+      last step, commit point
//! ```
//!
//! | part | what it is |
//! |---|---|
//! | [`JobState`], [`Verb`] | the table of states, of the verbs each allows, and of the moves between them |
//! | [`Event`] | what a user hears of |
//! | [`Job`], [`JobControl`], [`Worker`] | a job whose work is one function on one thread |
//! | [`JobError`] | what the error type of an operation gives to its job |
//! | [`testing`] | the conformance suite that each kind of job passes |
//!
//! A mirror is not a [`Job`]: its threads take their steps from its own core. It shares the states, verbs
//! and events, so that a management layer sees one kind of job.
//!
//! This crate knows nothing of images and of what a job moves.
//!
//! ```
//! use blockmirror_job::{JobState, Verb};
//!
//! assert!(JobState::Ready.allows(Verb::Complete) && !JobState::Running.allows(Verb::Complete));
//! assert!(JobState::Ready.can_transition_to(JobState::Standby));
//! assert!(!JobState::Ready.can_transition_to(JobState::Running));
//! ```

#![forbid(unsafe_code)]

mod error;
mod event;
mod handle;
mod machine;
mod options;
mod state;
pub mod testing;
mod worker;

pub use error::JobError;
pub use event::{CopyMode, ErrorAction, Event, IoStatus, ModeReason, Operation};
pub use handle::{JobControl, JobProgress, Outcome};
pub use options::{JobOptions, OnError};
pub use state::{JobState, Refused, Verb};
pub use worker::{Job, Worker};
