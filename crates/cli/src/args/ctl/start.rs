//! The command lines of `blockmirror ctl SOCKET mirror`, `commit`, `stream` and `snapshot`: what starts a job
//! or changes a chain.

use std::path::PathBuf;

use blockmirror_image::Format;
use clap::{Args, ValueEnum};

use super::super::size;

pub(super) const MIRROR_EXAMPLES: &str = "\
Examples:
  blockmirror ctl qmp.sock mirror disk copy.qcow2 --pivot
  blockmirror ctl qmp.sock mirror disk /backup/disk.raw --keep-source --speed 100M
  blockmirror ctl qmp.sock mirror disk 'nbd://host/disk' --copy-mode write-blocking --wait
  blockmirror ctl qmp.sock mirror disk /dev/vg/disk --target-format raw
  blockmirror ctl qmp.sock mirror disk /backup/disk.raw --log /var/lib/vm/disk.log";

pub(super) const COMMIT_EXAMPLES: &str = "\
Examples:
  blockmirror ctl qmp.sock commit disk --pivot
  blockmirror ctl qmp.sock commit disk --top mid --base base --wait";

pub(super) const STREAM_EXAMPLES: &str = "\
Examples:
  blockmirror ctl qmp.sock stream disk --wait
  blockmirror ctl qmp.sock stream disk --base base";

pub(super) const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  blockmirror ctl qmp.sock snapshot disk disk-2.qcow2
  blockmirror ctl qmp.sock snapshot disk disk-2.qcow2 --backing-file /srv/disk.qcow2";

/// How a job is started.
#[derive(Debug, Args)]
pub(crate) struct NewJobArgs {
    /// Id of the job [default: its type and the first number that is free, such as mirror0]
    #[arg(long, value_name = "ID")]
    pub(crate) job_id: Option<String>,

    /// Maximum bytes per second [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub(crate) speed: Option<u64>,

    /// Wait until the job is ready, or until its end if it ends by itself. Ctrl-C ends the wait, not the job
    #[arg(long)]
    pub(crate) wait: bool,
}

/// What `blockmirror ctl SOCKET mirror` takes.
#[derive(Debug, Args)]
pub(crate) struct CtlMirrorArgs {
    /// The node to copy, or a device of QEMU
    pub(crate) device: String,

    /// The target: the name of a node, a path, or the URI of an NBD export. A path has a slash in it, or ends
    /// with .qcow2, .raw or .img. A file that does not exist is created; one that exists is overwritten
    pub(crate) target: String,

    /// Format of the target, raw or qcow2 [default: as its name ends (.qcow2, .raw, .img); of a new file
    /// that ends otherwise the format of DEVICE, of a block device or an export raw]
    #[arg(short = 'O', long, value_name = "FMT")]
    pub(crate) target_format: Option<Format>,

    #[command(flatten)]
    pub(crate) job: NewJobArgs,

    /// Unit of the copy in bytes, a power of two [default: the server's choice]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub(crate) granularity: Option<u64>,

    /// What to copy: `full`, the whole backing chain; `top`, the top image alone, to a new image with the
    /// same backing file
    #[arg(long, value_enum, value_name = "MODE", default_value = "full")]
    pub(crate) sync: JobSync,

    /// `background`: what is written is copied later; `write-blocking`: it is written to the target at once;
    /// `auto`: background, until that does not converge (blockmirror's daemon only) [default: background]
    #[arg(long, value_enum, value_name = "MODE")]
    pub(crate) copy_mode: Option<CopyMode>,

    /// How long the target, an NBD export, may be away: the copy waits for it, and goes on. Without it a lost
    /// connection is an error of the target, which ends the job
    #[arg(long, value_name = "SECONDS")]
    pub(crate) reconnect_delay: Option<u32>,

    /// Keep in FILE what the target may lack, so that the mirror survives the death of the daemon
    /// (blockmirror's daemon only): the same command with the same FILE goes on. Created if it does not
    /// exist; the command to give then is printed. The disk is exported after the mirror was started
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,

    /// Wait until the job is ready, and switch the users of DEVICE to the target
    #[arg(long, conflicts_with = "keep_source")]
    pub(crate) pivot: bool,

    /// Wait until the job is ready, and end it: the target is a copy of that point in time, and is closed
    #[arg(long)]
    pub(crate) keep_source: bool,
}

/// What of the source's chain a job copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum JobSync {
    Full,
    Top,
}

/// When what is written meanwhile gets to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CopyMode {
    Background,
    WriteBlocking,
    Auto,
}

impl JobSync {
    /// The name in QMP.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
        }
    }
}

impl CopyMode {
    /// The name in QMP.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
            Self::Auto => "auto",
        }
    }
}

/// What `blockmirror ctl SOCKET commit` takes.
#[derive(Debug, Args)]
pub(crate) struct CtlCommitArgs {
    /// The node at the top of the chain, or a device of QEMU
    pub(crate) device: String,

    /// The highest node to commit [default: DEVICE; such a job becomes ready, and `complete` ends it]
    #[arg(long, value_name = "NODE")]
    pub(crate) top: Option<String>,

    /// The node to commit into [default: the lowest of the chain]
    #[arg(long, value_name = "NODE")]
    pub(crate) base: Option<String>,

    #[command(flatten)]
    pub(crate) job: NewJobArgs,

    /// Wait until the job is ready, and switch the users of DEVICE to the base
    #[arg(long)]
    pub(crate) pivot: bool,
}

/// What `blockmirror ctl SOCKET stream` takes.
#[derive(Debug, Args)]
pub(crate) struct CtlStreamArgs {
    /// The node to copy into, or a device of QEMU
    pub(crate) device: String,

    /// The node to stand on afterwards; the nodes between are copied [default: none, and all are copied]
    #[arg(long, value_name = "NODE")]
    pub(crate) base: Option<String>,

    #[command(flatten)]
    pub(crate) job: NewJobArgs,
}

/// What `blockmirror ctl SOCKET snapshot` takes.
#[derive(Debug, Args)]
pub(crate) struct CtlSnapshotArgs {
    /// The node whose users get the overlay, or a device of QEMU
    pub(crate) device: String,

    /// The overlay to create, a qcow2 image
    pub(crate) file: PathBuf,

    /// Node name of the overlay [default: the first free of overlay0, overlay1, ..]
    #[arg(long, value_name = "NODE")]
    pub(crate) node_name: Option<String>,

    /// What the header of the overlay names as its backing file [default: the file name that the server has
    /// for DEVICE, if that is absolute]
    #[arg(long, value_name = "FILE")]
    pub(crate) backing_file: Option<String>,
}
