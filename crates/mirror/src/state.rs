//! The states and verbs of a mirror job: those of every job.

pub use blockmirror_job::{JobState, Refused, Verb};
