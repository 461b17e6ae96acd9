//! The command lines of the commands that only read: `blockmirror info`, `map`, `compare` and `measure`; and
//! `check`, which writes only if it repairs.

use std::path::PathBuf;

use blockmirror_image::{CacheMode, Format, NodeOptions, SnapshotRef};
use clap::{Args, ValueEnum};

use super::snapshot::source_snapshot;
use super::{AccessArgs, LimitsArgs, LockArgs, OutputArgs, ProgressArgs, ViewArgs, size};

pub(super) const INFO_EXAMPLES: &str = "\
Examples:
  blockmirror info disk.qcow2
  blockmirror info --output=json --backing-chain overlay.qcow2";

pub(super) const MAP_EXAMPLES: &str = "\
Examples:
  blockmirror map disk.qcow2
  blockmirror map --output=json -s 1M -l 64K disk.qcow2
  blockmirror map --output=html disk.qcow2 > disk.html";

pub(super) const COMPARE_EXAMPLES: &str = "\
Examples:
  blockmirror compare disk.qcow2 disk.raw
  blockmirror compare --ranges differ disk.qcow2 disk.raw
  blockmirror compare -s -f raw -F raw a.raw b.raw";

pub(super) const HASH_EXAMPLES: &str = "\
Two images have the same hash if they hold the same bytes and are equally long, whatever their formats,
allocation and compression. docs/hash.md says how it is made.

Examples:
  blockmirror hash disk.qcow2
  blockmirror hash --plain disk.qcow2
  blockmirror hash --output=json disk.qcow2 copy.raw";

pub(super) const MEASURE_EXAMPLES: &str = "\
Examples:
  blockmirror measure -O qcow2 disk.raw
  blockmirror measure -O qcow2 -o cluster_size=2M --size 1T
  blockmirror measure --output=json -O qcow2 disk.qcow2";

pub(super) const CHECK_EXAMPLES: &str = "\
Examples:
  blockmirror check disk.qcow2
  blockmirror check -r all disk.qcow2
  blockmirror check --output=json disk.qcow2";

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The image
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Whether the image is locked while it is looked at.
    #[arg(skip)]
    pub(crate) locks: bool,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Show the whole backing chain
    #[arg(long)]
    pub(crate) backing_chain: bool,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    /// The image
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Offset of the first byte
    #[arg(short = 's', long, value_name = "SIZE", value_parser = size, default_value = "0")]
    pub(crate) start_offset: u64,

    /// Holes below mapped clusters are looked for in preallocated images only.
    #[arg(skip)]
    pub(crate) holes_if_preallocated: bool,

    /// Number of bytes [default: to the end]
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_length: Option<u64>,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) output: ViewArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The first image
    pub(crate) first: PathBuf,

    /// The second image
    pub(crate) second: PathBuf,

    /// The names `first` and `second` as they were typed.
    #[arg(skip)]
    pub(crate) typed: (PathBuf, PathBuf),

    /// What the names `first` and `second` say besides path and format.
    #[arg(skip)]
    pub(crate) nodes: (NodeOptions, NodeOptions),

    /// Format of the first image; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) first_format: Option<Format>,

    /// Format of the second image; detected if omitted
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) second_format: Option<Format>,

    /// Cache mode of both images: `none` and `directsync` bypass the host's page cache; `writeback`,
    /// `writethrough` and `unsafe` use it [default: writeback]
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) source_cache: CacheMode,

    /// Write all ranges that differ to FILE, one JSON object per line (`start`, `length`), for --only of
    /// `mirror` and `convert`. FILE must not exist
    #[arg(long, value_name = "FILE", conflicts_with = "strict")]
    pub(crate) ranges: Option<PathBuf>,

    /// Compare lengths and allocation as well
    #[arg(short = 's', long)]
    pub(crate) strict: bool,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

#[derive(Debug, Args)]
pub(crate) struct HashArgs {
    /// The images
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,

    /// The images as they are opened: path, what else the name says, format.
    #[arg(skip)]
    pub(crate) images: Vec<(PathBuf, NodeOptions, Option<Format>)>,

    /// Format of the images; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Print BLAKE3 of all bytes of the disk, as b3sum does of a raw image; zeros are hashed too
    #[arg(long)]
    pub(crate) plain: bool,

    /// Cache mode of the images: `none` and `directsync` bypass the host's page cache; `writeback`,
    /// `writethrough` and `unsafe` use it [default: writeback]
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) source_cache: CacheMode,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    /// The image that the new one is to hold
    #[arg(conflicts_with = "size")]
    pub(crate) file: Option<PathBuf>,

    /// Virtual size of an empty image, in place of FILE
    #[arg(short = 's', long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    pub(crate) size: Option<u64>,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format of FILE, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT", help_heading = "Source")]
    pub(crate) source_format: Option<Format>,

    /// Measure an internal snapshot of FILE in place of its disk: its id or name, or
    /// `snapshot.id=ID,snapshot.name=NAME`
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = source_snapshot, help_heading = "Source")]
    pub(crate) snapshot: Option<SnapshotRef>,

    /// Format of the new image, raw or qcow2 [default: raw]
    #[arg(short = 'O', long, value_name = "FMT", help_heading = "Target")]
    pub(crate) target_format: Option<Format>,

    /// Options of the new image; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..", help_heading = "Target")]
    pub(crate) target_options: Vec<String>,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The image
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Repair what is wrong; the image must not be in use
    #[arg(short = 'r', long, value_enum, value_name = "WHAT")]
    pub(crate) repair: Option<Mend>,

    /// Check an image that is in use elsewhere; what is found may not be so
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub(crate) force_share: bool,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Treat the image's name as options: driver=FORMAT,file.filename=PATH
    #[arg(long)]
    pub(crate) image_opts: bool,

    /// Repair the image on a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    /// Cache mode of the image: `none` and `directsync` bypass the host's page cache; `writeback`,
    /// `writethrough` and `unsafe` use it [default: writeback]
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) source_cache: CacheMode,

    #[command(flatten)]
    pub(crate) limits: LimitsArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

/// What `check` repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mend {
    /// refcounts that are too high
    Leaks,
    /// everything that can be repaired without losing data
    All,
}
