//! Whole operations on images: convert one to another, and change chains while the guest writes.
//!
//! [`Convert`] is `blockmirror convert` as a library call, [`Bench`] is `blockmirror bench`.
//!
//! | operation | what becomes of the chain |
//! |---|---|
//! | [`Commit`] | an image that is not in use is written down into a layer below it, and emptied |
//! | [`Rebase`], [`RebaseJob`] | an image that is not in use is put on another backing file, or on none |
//! | [`StreamJob`] | what lies below an image is brought up into it; the layers it came from are taken out |
//! | [`CommitJob`] | layers below an overlay are written down into their base; the overlay stands on the base then |
//! | [`commit_active`] | the same from the top, the guest's own image included: a mirror onto the base, with a pivot |
//!
//! [`Convert`], [`Commit`] and [`Rebase`] open files by themselves, under a policy. The others take open
//! devices: which file may be opened is the caller's decision. Stream, rebase and [`CommitJob`] run on one
//! thread each, are controlled through a [`JobControl`], and report states and events in the words of a
//! mirror job; the other commits are mirror jobs.
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//! use blockmirror_image::Format;
//! use blockmirror_ops::Convert;
//!
//! # let dir = tempfile::tempdir()?;
//! # let (source, target) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
//! # std::fs::write(&source, [1; 4096])?;
//! let cancel = AtomicBool::new(false);
//! let outcome = Convert::new(&source, &target)
//!     .target_format(Format::Qcow2)
//!     .run(&cancel, |progress| eprintln!("{} of {} bytes", progress.offset, progress.len))?;
//! assert_eq!(outcome.copy.copied, 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod bench;
mod commit;
mod convert;
mod error;
mod ranges;
mod rebase;
mod stream;

pub use bench::{Bench, BenchError, BenchOutcome, MAX_BENCH_BYTES, MAX_BENCH_DEPTH};
pub use blockmirror_job::{JobError, JobOptions, JobProgress, Outcome};
pub use commit::{Commit, CommitJob, CommitOutcome, OpenCommit, RunningCommit, commit_active};
pub use convert::{
    CheckedConvert, CheckpointOptions, Convert, ConvertError, ConvertJob, ConvertOutcome, ConvertSource,
    CopyBitmaps, CopyBitmapsProblem, DEFAULT_CHECKPOINT_INTERVAL, Interrupted, KeptCopy, Mismatch,
    PreparedConvert, Resumable, ResumeCheck, Space, Verified, Verify,
};
pub use error::{Error, ErrorKind};
pub use ranges::{RangeProblem, RangesError, read_ranges, write_range};
pub use rebase::{OpenRebase, Rebase, RebaseJob};
pub use stream::{Base, StreamJob};

/// The handle of a [`StreamJob`] or a [`CommitJob`].
pub type JobControl = blockmirror_job::JobControl<Error>;

type Job = blockmirror_job::Job<Error>;
type Worker = blockmirror_job::Worker<Error>;
