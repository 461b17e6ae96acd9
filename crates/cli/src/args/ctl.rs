//! The command line of `blockmirror ctl`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{OutputArgs, size};

pub(super) const CTL_EXAMPLES: &str = "\
Jobs are named by their ids. The id can be omitted if there is only one job.

Three ways to end a mirror:
  complete                  users of the source switch to the target, without interruption
  complete --keep-source    users stay on the source; the target is a copy of one point in time
  abort                     users stay on the source; the target is unusable

Examples:
  blockmirror ctl /run/qmp.sock jobs
  blockmirror ctl /run/qmp.sock watch
  blockmirror ctl /run/qmp.sock set-speed mirror0 50M
  blockmirror ctl /run/qmp.sock complete --wait mirror0";

/// What `blockmirror ctl` takes.
#[derive(Debug, Args)]
pub(crate) struct CtlArgs {
    /// QMP socket of `blockmirror daemon`, `qemu-storage-daemon` or QEMU
    pub(crate) socket: PathBuf,

    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub(crate) enum CtlCommand {
    /// List the jobs
    Jobs(OutputArgs),
    /// Pause a job; operations in flight are completed
    Pause(JobArgs),
    /// Resume a job after `pause`, or after an error that stopped it
    Resume(JobArgs),
    /// Change the speed limit of a job
    SetSpeed(SetSpeedArgs),
    /// Complete a job that is ready, and wait for its end; a mirror switches to its target
    Complete(CompleteArgs),
    /// Cancel a job, and wait for its end; the target of a mirror is then unusable
    Abort(JobArgs),
    /// Show the progress of jobs until they end; Ctrl-C does not affect them
    ///
    /// The columns are the part done, the job's rate, the rate at which others write to the disk, the bytes
    /// left, and the estimated time left, or that the job does not converge: the disk is written as fast as
    /// it is copied. The exit code is 1 if a job failed or was cancelled.
    Watch(JobArgs),
}

#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Job ids
    #[arg(value_name = "JOB")]
    pub(crate) jobs: Vec<String>,
}

#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub(crate) struct SetSpeedArgs {
    /// Job id
    #[arg(value_name = "JOB")]
    pub(crate) job: Option<String>,

    /// Maximum bytes per second; 0 for no limit
    #[arg(value_parser = size, allow_negative_numbers = true)]
    pub(crate) speed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct CompleteArgs {
    #[command(flatten)]
    pub(crate) jobs: JobArgs,

    /// Keep users on the source, and the target as a copy of one point in time
    #[arg(long)]
    pub(crate) keep_source: bool,

    /// Wait until the job is ready; by default a job that is not ready is refused. A job that waits for
    /// `job-finalize` is finalized
    #[arg(long)]
    pub(crate) wait: bool,
}
