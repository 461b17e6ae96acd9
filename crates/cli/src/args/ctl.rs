//! The command line of `blockmirror ctl`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{OutputArgs, size};

pub(super) const CTL_EXAMPLES: &str = "\
A job is named by its id, and need not be named where it is the only one.

The three ends of a mirror:
  complete                  who uses the source goes over to the target, and notices nothing
  complete --keep-source    the target stays as a copy of one instant, and users stay on the source
  abort                     the target is of no use

Examples:
  blockmirror ctl /run/qmp.sock jobs
  blockmirror ctl /run/qmp.sock watch
  blockmirror ctl /run/qmp.sock set-speed mirror0 50M
  blockmirror ctl /run/qmp.sock complete --wait mirror0";

/// What `blockmirror ctl` takes.
#[derive(Debug, Args)]
pub(crate) struct CtlArgs {
    /// The socket of a QMP monitor: of `blockmirror daemon`, of `qemu-storage-daemon` or of a QEMU
    pub(crate) socket: PathBuf,

    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub(crate) enum CtlCommand {
    /// List the jobs
    Jobs(OutputArgs),
    /// Pause a job; what is in flight is finished
    Pause(JobArgs),
    /// Let a job go on, after `pause` or after an error that stopped it
    Resume(JobArgs),
    /// Change how fast a job may go
    SetSpeed(SetSpeedArgs),
    /// End a job that is ready, and wait until it has ended; a mirror goes over to its target
    Complete(CompleteArgs),
    /// Give a job up, and wait until it has ended; the target of a mirror is of no use then
    Abort(JobArgs),
    /// Show how far jobs are until they end; Ctrl-C leaves them alone
    ///
    /// The figures are the part that is done, what the job does a second, what others write to the disk a
    /// second, what is left, and when nothing will be left, or that it is not converging: that the disk is
    /// written as fast as it is copied. The exit code is 1 if a job failed or was given up.
    Watch(JobArgs),
}

#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Ids of the jobs
    #[arg(value_name = "JOB")]
    pub(crate) jobs: Vec<String>,
}

#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub(crate) struct SetSpeedArgs {
    /// Id of the job
    #[arg(value_name = "JOB")]
    pub(crate) job: Option<String>,

    /// Most bytes per second; 0 for no limit
    #[arg(value_parser = size, allow_negative_numbers = true)]
    pub(crate) speed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct CompleteArgs {
    #[command(flatten)]
    pub(crate) jobs: JobArgs,

    /// Leave everybody on the source, and the target as a copy of one instant
    #[arg(long)]
    pub(crate) keep_source: bool,

    /// Wait until the job is ready; without this a job that is not is refused. A job that waits for
    /// `job-finalize` is finalized
    #[arg(long)]
    pub(crate) wait: bool,
}
