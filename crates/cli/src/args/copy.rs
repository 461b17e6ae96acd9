//! The command lines of `blockmirror mirror` and `blockmirror convert`.

use std::path::PathBuf;

use blockmirror_image::{CacheMode, Format, ImageName, NodeOptions, SnapshotRef};
use blockmirror_mirror::MAX_IN_FLIGHT;
use clap::builder::RangedI64ValueParser;
use clap::{Args, ValueEnum};

use super::reflink::ReflinkArgs;
use super::snapshot::source_snapshot;
use super::{AccessArgs, CheckpointArgs, ProgressArgs, TargetArgs, VerifyArgs, ViewArgs, size};

pub(super) const MIRROR_EXAMPLES: &str = "\
Examples:
  blockmirror mirror disk.qcow2 copy.qcow2
  blockmirror mirror -O raw disk.qcow2 disk.raw
  blockmirror mirror -O qcow2 -o cluster_size=2M,extended_l2=on disk.raw disk.qcow2
  blockmirror mirror --sync top overlay.qcow2 overlay-copy.qcow2
  blockmirror mirror -n --granularity 4K disk.raw /dev/vg/disk
  blockmirror mirror -n -O raw disk.qcow2 'nbd+unix:///disk?socket=/run/nbd.sock'
  blockmirror mirror --verify=full --ranges differ disk.qcow2 /dev/vg/disk
  blockmirror mirror -n --only differ disk.qcow2 /dev/vg/disk
  blockmirror mirror --dry-run --output=json disk.qcow2 copy.qcow2";

pub(super) const CONVERT_EXAMPLES: &str = "\
Examples:
  blockmirror convert disk.qcow2 disk.raw
  blockmirror convert -p -O qcow2 disk.raw disk.qcow2
  blockmirror convert nbds://host/disk disk.raw
  blockmirror convert -c -O qcow2 -o compression_type=zstd disk.raw disk.qcow2
  blockmirror convert -O qcow2 part1.raw part2.raw disk.qcow2
  blockmirror convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2";

#[derive(Debug, Args)]
#[command(override_usage = "blockmirror mirror [OPTIONS] <SOURCE>... <TARGET>")]
pub(crate) struct MirrorArgs {
    #[command(flatten)]
    pub(crate) copy: CopyArgs,

    /// What to copy: `full`, the whole backing chain; `top`, the top image alone, to a target with the same
    /// backing file [default: full]
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Copying")]
    pub(crate) sync: Option<Sync>,
}

#[derive(Debug, Args)]
#[command(override_usage = "blockmirror convert [OPTIONS] <SOURCE>... <TARGET>")]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) copy: CopyArgs,

    /// Store the data of a qcow2 target compressed, by its compression type (`-o compression_type=zstd`)
    #[arg(short = 'c', long, help_heading = "Target")]
    pub(crate) compress: bool,

    /// What to copy: `full`, the whole backing chain; `top`, the top image alone [default: top if the target
    /// gets a backing file, otherwise full]
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Copying")]
    pub(crate) sync: Option<Sync>,
}

/// What `mirror` and `convert` have in common, which is all but the defaults.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// The image to copy; several are concatenated
    pub(crate) source: PathBuf,

    /// The image to create, or with -n the existing image to write to
    pub(crate) target: PathBuf,

    /// What follows two names: then the last is the target. (Options may stand anywhere between positional
    /// arguments, but not inside one that takes several values and is not the last.)
    #[arg(hide = true)]
    pub(crate) more: Vec<PathBuf>,

    /// The parsed names of the sources; `source` and `more` are empty then.
    #[arg(skip)]
    pub(crate) names: Vec<ImageName>,

    /// What the name of an existing target says besides path and format.
    #[arg(skip)]
    pub(crate) target_node: NodeOptions,

    /// Format of the source (of all of them), raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT", help_heading = "Source")]
    pub(crate) source_format: Option<Format>,

    /// Copy an internal snapshot of the image in place of its disk: its id or name, or
    /// `snapshot.id=ID,snapshot.name=NAME`
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = source_snapshot, help_heading = "Source")]
    pub(crate) source_snapshot: Option<SnapshotRef>,

    /// Cache mode of the source: `none` and `directsync` bypass the host's page cache; `writeback`,
    /// `writethrough` and `unsafe` use it [default: writeback]
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    #[arg(help_heading = "Source")]
    pub(crate) source_cache: CacheMode,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    /// Format of the target, raw or qcow2
    #[arg(short = 'O', long, value_name = "FMT", help_heading = "Target")]
    pub(crate) target_format: Option<Format>,

    /// Options of the new target; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..", help_heading = "Target")]
    pub(crate) target_options: Vec<String>,

    /// Backing file of the target; one that exists has it already: what the source's own image holds is
    /// copied
    #[arg(short = 'B', long, value_name = "FILE", help_heading = "Target")]
    pub(crate) backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT", help_heading = "Target")]
    pub(crate) backing_format: Option<Format>,

    /// Write to an existing target, which must not be shorter than the source; data past the source's end is
    /// kept
    #[arg(short = 'n', long, help_heading = "Target")]
    #[arg(conflicts_with_all = ["target_options", "in_place", "atomic", "no_clobber", "clean"])]
    pub(crate) no_create: bool,

    /// With -n: treat the target's name as options, as --image-opts does
    #[arg(long, requires = "no_create", help_heading = "Target")]
    pub(crate) target_image_opts: bool,

    /// Cache mode of the target: `none` bypasses the host's page cache, `writethrough` makes each write
    /// durable at once, `directsync` does both; `unsafe` is the same as `writeback`. In each mode the copy
    /// ends with a flush [default: writeback]
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    #[arg(help_heading = "Target")]
    pub(crate) target_cache: CacheMode,

    /// Assume that the target reads as zeros
    #[arg(long, requires = "no_create", help_heading = "Target")]
    pub(crate) target_is_zero: bool,

    /// Refuse a target that cannot make data durable (an NBD server without FLUSH). By default such a copy
    /// succeeds, with a note
    #[arg(long, help_heading = "Target")]
    pub(crate) require_flush: bool,

    /// Do not wait until the copy is durable: if the host crashes soon after, the copy may be lost or
    /// incomplete, and with it what the target held before; an error of the system's late writes goes
    /// unnoticed. The result says `not durable`. An NBD server is flushed all the same
    #[arg(long, conflicts_with_all = ["require_flush", "checkpoint", "checkpoint_interval", "restart", "resume", "atomic"])]
    #[arg(help_heading = "Target")]
    pub(crate) no_sync: bool,

    #[command(flatten)]
    pub(crate) existing: TargetArgs,

    /// Bytes per bit of the dirty bitmap: a power of two from 512 to 64M [default: the target's cluster
    /// size, between 4K and 64K; 64K if it has no clusters]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, help_heading = "Copying")]
    pub(crate) granularity: Option<u64>,

    /// Maximum bytes per second; 0 for no limit
    #[arg(short = 'r', long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    #[arg(default_value = "0", hide_default_value = true, help_heading = "Copying")]
    pub(crate) speed: u64,

    /// Maximum bytes in flight [default: 16M]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, default_value = "0")]
    #[arg(hide_default_value = true, help_heading = "Copying")]
    pub(crate) buf_size: u64,

    /// Maximum operations in flight [default: 16]
    #[arg(short = 'm', long, value_name = "N", value_parser = parallel(), help_heading = "Copying")]
    pub(crate) parallel: Option<u16>,

    /// Minimum length of a run of zero bytes that becomes a hole in the target: a multiple of 512 up to 16M;
    /// 0 writes zeros as data, so that the target is fully allocated [default: 4K]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = sparse_size, allow_hyphen_values = true)]
    #[arg(help_heading = "Copying")]
    pub(crate) sparse_size: Option<u64>,

    /// Accepted for compatibility with qemu-img and ignored: writes are never ordered
    #[arg(short = 'W', long, help_heading = "Copying")]
    pub(crate) oob_writes: bool,

    /// Accepted for compatibility with qemu-img and ignored: it does not change the target
    #[arg(short = 'C', long, conflicts_with = "sparse_size", help_heading = "Copying")]
    pub(crate) copy_range: bool,

    #[command(flatten)]
    pub(crate) reflink: ReflinkArgs,

    /// What to do when a read from the source fails
    #[arg(long, value_enum, value_name = "POLICY", default_value = "report", help_heading = "Copying")]
    pub(crate) on_source_error: OnError,

    /// Continue past read errors of the source, as --on-source-error=ignore does, and list the lost ranges;
    /// the exit code is then 3 (qemu-img: 0)
    #[arg(long, conflicts_with = "on_source_error", help_heading = "Copying")]
    pub(crate) salvage: bool,

    /// What to do when a write to the target fails
    #[arg(long, value_enum, value_name = "POLICY", default_value = "auto", help_heading = "Copying")]
    pub(crate) on_target_error: OnError,

    /// Copy the persistent bitmaps of the source, too; to qcow2
    #[arg(long, help_heading = "Copying")]
    pub(crate) bitmaps: bool,

    /// With --bitmaps: leave out those that are inconsistent
    #[arg(long, requires = "bitmaps", help_heading = "Copying")]
    pub(crate) skip_broken_bitmaps: bool,

    #[command(flatten)]
    pub(crate) checkpoint: CheckpointArgs,

    /// Copy although the target's file system has less space than the copy may need; without it that is
    /// refused, or noted where it is a guess
    #[arg(long, help_heading = "Copying")]
    pub(crate) no_space_check: bool,

    /// Show what would be copied, zeroed and skipped, and the granularity; write nothing
    #[arg(long, help_heading = "Copying")]
    pub(crate) dry_run: bool,

    /// A dry run says what each granularity costs, the space and the time: `plan`.
    #[arg(skip)]
    pub(crate) plans: bool,

    /// Write a page about the copy to FILE when it has ended, also if it failed or was interrupted: rate,
    /// bytes left and events over time. FILE must not exist
    #[arg(long, value_name = "FILE.html", conflicts_with = "dry_run")]
    pub(crate) report: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) verify: VerifyArgs,

    #[command(flatten)]
    pub(crate) output: ViewArgs,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

impl CopyArgs {
    /// The names of the sources for people.
    pub(crate) fn shown_sources(&self) -> String {
        let names: Vec<_> = self.names.iter().map(|name| name.path.to_string_lossy()).collect();
        names.join(" + ")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sync {
    Full,
    Top,
}

/// What to do when a range fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnError {
    /// fail
    Report,
    /// try ten times, then skip the range and list it
    Ignore,
    /// pause and ask; needs a terminal
    Stop,
    /// pause and ask if space ran out, otherwise fail; needs a terminal
    Enospc,
    /// enospc on a terminal, otherwise report
    Auto,
}

/// What `qemu-img` takes for -S.
fn sparse_size(text: &str) -> Result<u64, String> {
    let bytes = size(text).map_err(|e| e.to_string())?;
    match bytes.is_multiple_of(512) && bytes <= 16 << 20 {
        true => Ok(bytes),
        false => Err(format!("\"{text}\": must be a multiple of 512 up to 16M, or 0")),
    }
}

fn parallel() -> RangedI64ValueParser<u16> {
    // The bound fits: it is a number of threads.
    RangedI64ValueParser::new().range(1..=i64::try_from(MAX_IN_FLIGHT).unwrap_or(i64::from(u16::MAX)))
}
