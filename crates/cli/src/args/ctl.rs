//! The command line of `blockmirror ctl`.

mod start;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{OutputArgs, size};
use start::{COMMIT_EXAMPLES, MIRROR_EXAMPLES, SNAPSHOT_EXAMPLES, STREAM_EXAMPLES};

pub(crate) use start::{
    CopyMode, CtlCommitArgs, CtlMirrorArgs, CtlSnapshotArgs, CtlStreamArgs, JobSync, NewJobArgs,
};

pub(super) const CTL_EXAMPLES: &str = "\
Jobs are named by their ids. The id can be omitted if there is only one job.

Three ways to end a mirror:
  complete                  users of the source switch to the target, without interruption
  complete --keep-source    users stay on the source; the target is a copy of one point in time
  abort                     users stay on the source; the target is unusable

What `mirror` has opened for its target is closed again by the last two, and
when the job fails while a command waits for it. After the first the source stays
open, until `close` closes it.

Examples:
  blockmirror ctl /run/qmp.sock mirror disk copy.qcow2 --pivot
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
    /// Start to mirror a disk in use to a node, a file or an NBD export
    ///
    /// Without --pivot and --keep-source the job is left ready: from then on the target follows the disk,
    /// until `complete` or `abort` ends it.
    #[command(after_help = MIRROR_EXAMPLES)]
    Mirror(CtlMirrorArgs),
    /// Start to write a disk in use down into its backing file
    #[command(after_help = COMMIT_EXAMPLES)]
    Commit(CtlCommitArgs),
    /// Start to copy what a disk in use shows of its backing files into its own image
    #[command(after_help = STREAM_EXAMPLES)]
    Stream(CtlStreamArgs),
    /// Take an external snapshot: a new image becomes the disk, and stands on what it was
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Snapshot(CtlSnapshotArgs),
    /// Close nodes that nothing uses, such as the source of a mirror after the switch
    Close(CloseArgs),
    /// List the nodes
    Nodes(OutputArgs),
    /// List the dirty bitmaps of all nodes
    Bitmaps(OutputArgs),
    /// List the exports
    Exports(OutputArgs),
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
    Watch(WatchArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CloseArgs {
    /// Node names
    #[arg(value_name = "NODE", required = true)]
    pub(crate) nodes: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Job ids
    #[arg(value_name = "JOB")]
    pub(crate) jobs: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    pub(crate) jobs: JobArgs,

    /// Print one JSON object per line, once a second for each job, and one when it has ended: those of
    /// --progress=json, with the job's id
    #[arg(long)]
    pub(crate) json: bool,

    /// Write a page about the job to FILE when it has ended or is not watched any more: rates, bytes left and
    /// events over time. FILE must not exist
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
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
