//! Whole operations on chains of images, while the guest writes.
//!
//! | operation | what becomes of the chain |
//! |---|---|
//! | [`StreamJob`] | what lies below an image is brought up into it; the layers it came from are taken out |
//! | [`CommitJob`] | layers below an overlay are written down into their base; the overlay stands on the base then |
//! | [`commit_active`] | the same from the top, the guest's own image included: a mirror onto the base, with a pivot |
//!
//! The first two run on one thread each, are steered through a [`JobControl`], and tell states and events in
//! the words of a mirror job. The third is a mirror job. Devices are handed in: who may open which file is
//! not decided here.

#![forbid(unsafe_code)]

mod commit;
mod error;
mod job;
mod stream;

pub use commit::{CommitJob, commit_active};
pub use error::{Error, ErrorKind};
pub use job::{JobControl, JobOptions, JobProgress, Outcome};
pub use stream::{Base, StreamJob};
