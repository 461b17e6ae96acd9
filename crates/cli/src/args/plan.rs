//! The command line of `blockmirror plan`: the options of `mirror` that change what would be copied.

use std::path::PathBuf;

use blockmirror_image::{Format, SnapshotRef};
use clap::{Args, Parser};

use super::snapshot::source_snapshot;
use super::{AccessArgs, Cli, Command, MirrorArgs, Sync, ViewArgs, size};
use crate::failure::{Failure, Outcome};

pub(super) const PLAN_EXAMPLES: &str = "\
What is needed and what it costs is computed from what the images have allocated; no data is read.

Examples:
  blockmirror plan disk.qcow2 copy.qcow2
  blockmirror plan -O qcow2 -o cluster_size=2M --speed 100M disk.raw disk.qcow2
  blockmirror plan --output=html disk.qcow2 /dev/vg/disk > plan.html";

/// What `blockmirror plan` takes.
#[derive(Debug, Args)]
#[command(override_usage = "blockmirror plan [OPTIONS] <SOURCE>... <TARGET>")]
pub(crate) struct PlanArgs {
    /// The image to copy; several are concatenated
    source: PathBuf,

    /// The image that would be created, or with -n the existing image that would be written to
    target: PathBuf,

    /// What follows two names: then the last is the target.
    #[arg(hide = true)]
    more: Vec<PathBuf>,

    /// Format of the source (of all of them), raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT", help_heading = "Source")]
    source_format: Option<Format>,

    /// Plan to copy an internal snapshot of the image in place of its disk: its id or name, or
    /// `snapshot.id=ID,snapshot.name=NAME`
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = source_snapshot, help_heading = "Source")]
    source_snapshot: Option<SnapshotRef>,

    #[command(flatten)]
    access: AccessArgs,

    /// Format of the target, raw or qcow2 [default: the source's]
    #[arg(short = 'O', long, value_name = "FMT", help_heading = "Target")]
    target_format: Option<Format>,

    /// Options of the new target; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..", help_heading = "Target")]
    target_options: Vec<String>,

    /// Backing file of the target
    #[arg(short = 'B', long, value_name = "FILE", help_heading = "Target")]
    backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT", help_heading = "Target")]
    backing_format: Option<Format>,

    /// The target exists
    #[arg(short = 'n', long, conflicts_with = "target_options", help_heading = "Target")]
    no_create: bool,

    /// Bytes per bit of the dirty bitmap: a power of two from 512 to 64M [default: the target's cluster
    /// size, between 4K and 64K; 64K if it has no clusters]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, help_heading = "Copying")]
    granularity: Option<u64>,

    /// Bytes per second, of which the time follows
    #[arg(short = 'r', long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    #[arg(default_value = "0", hide_default_value = true, help_heading = "Copying")]
    speed: u64,

    /// What to copy: `full`, the whole backing chain; `top`, the top image alone, to a target with the same
    /// backing file [default: full]
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Copying")]
    sync: Option<Sync>,

    #[command(flatten)]
    output: ViewArgs,
}

impl PlanArgs {
    /// The command line of the dry run that it is.
    pub(crate) fn dry_run(self) -> Outcome<MirrorArgs> {
        // What is not asked for is as `mirror` has it by default.
        let words = ["blockmirror", "mirror", "--dry-run", "source", "target"];
        let Command::Mirror(mut mirror) = Cli::try_parse_from(words).map_err(Failure::usage)?.command else {
            return Err(Failure::usage("plan: it is no mirror"));
        };
        let copy = &mut mirror.copy;
        copy.plans = true;
        (copy.source, copy.target, copy.more) = (self.source, self.target, self.more);
        (copy.source_format, copy.source_snapshot) = (self.source_format, self.source_snapshot);
        (copy.target_format, copy.target_options) = (self.target_format, self.target_options);
        (copy.backing, copy.backing_format) = (self.backing, self.backing_format);
        (copy.no_create, copy.granularity, copy.speed) = (self.no_create, self.granularity, self.speed);
        (copy.access, copy.output, mirror.sync) = (self.access, self.output, self.sync);
        Ok(mirror)
    }
}
