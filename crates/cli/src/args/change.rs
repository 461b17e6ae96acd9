//! The command lines of the commands that make or change one image: `create`, `resize` and `amend`.

use std::path::PathBuf;

use blockmirror_block::size::{SizeError, parse_size};
use blockmirror_image::{CacheMode, Format, NodeOptions, split_options};
use clap::{Args, ValueEnum};

use super::{LockArgs, ProgressArgs, TargetArgs, size};

pub(super) const CREATE_EXAMPLES: &str = "\
Examples:
  blockmirror create -f qcow2 disk.qcow2 20G
  blockmirror create -f qcow2 -o cluster_size=128K,lazy_refcounts=on disk.qcow2 1T
  blockmirror create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  blockmirror create -f qcow2 -o help";

pub(super) const RESIZE_EXAMPLES: &str = "\
Examples:
  blockmirror resize disk.qcow2 +10G
  blockmirror resize -f raw disk.raw 64G
  blockmirror resize --shrink disk.qcow2 20G";

pub(super) const AMEND_EXAMPLES: &str = "\
Examples:
  blockmirror amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  blockmirror amend -o refcount_bits=64 disk.qcow2
  blockmirror amend -o help";

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The image to create
    #[arg(required_unless_present = "options")]
    pub(crate) file: Option<PathBuf>,

    /// `file` as it was typed.
    #[arg(skip)]
    pub(crate) typed: PathBuf,

    /// Virtual size; by default that of the backing file
    #[arg(value_parser = size, allow_hyphen_values = true)]
    pub(crate) size: Option<u64>,

    /// Format of the image
    #[arg(short = 'f', long, value_name = "FMT", default_value = "raw")]
    pub(crate) format: Format,

    /// Options of the image; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..")]
    pub(crate) options: Vec<String>,

    /// Backing file, as the image's header names it: relative to the image's directory
    #[arg(short = 'b', long, value_name = "FILE")]
    pub(crate) backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) backing_format: Option<Format>,

    /// Also follow the backing chain into this directory and below it, to check that the new image is not
    /// part of it; so does BLOCKMIRROR_ALLOW_BACKING
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_backing: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Do not open the backing file; it may be missing. An existing FILE is replaced even if it may be part
    /// of a chain that cannot be followed
    #[arg(short = 'u', long = "unsafe")]
    pub(crate) no_look: bool,

    #[command(flatten)]
    pub(crate) existing: TargetArgs,

    /// Print errors only
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

impl CreateArgs {
    /// The pairs of `-o` as they were typed, a key alone as one that is on.
    pub(crate) fn typed_options(&self) -> Vec<(String, String)> {
        let parts = self.options.iter().flat_map(|text| split_options(text));
        parts
            .map(|part| match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => (part, "on".to_owned()),
            })
            .collect()
    }
}

#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// The image, which must not be in use
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// New size, or with + or - the change; rounded up to a multiple of 512
    #[arg(value_parser = new_size, value_name = "[+|-]SIZE", allow_hyphen_values = true)]
    pub(crate) size: NewSize,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Allow the image to shrink; data past the new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Treat the image's name as options: driver=FORMAT,file.filename=PATH
    #[arg(long)]
    pub(crate) image_opts: bool,

    /// How space is allocated for the added part
    #[arg(long, value_enum, value_name = "MODE", default_value = "off")]
    pub(crate) preallocation: Growth,

    /// Write to a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    /// Also open backing and data files in or below this directory; so does BLOCKMIRROR_ALLOW_BACKING, for
    /// backing files
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_backing: Vec<PathBuf>,

    /// Print errors only
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AmendArgs {
    /// The image, which must not be in use
    #[arg(required_unless_present = "options")]
    pub(crate) file: Option<PathBuf>,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format of the image, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Options to change; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..", required = true)]
    pub(crate) options: Vec<String>,

    /// Allow the image to shrink; data past the new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,

    /// How the page cache is used: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", hide_default_value = true)]
    pub(crate) cache: CacheMode,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Treat the image's name as options: driver=FORMAT,file.filename=PATH
    #[arg(long)]
    pub(crate) image_opts: bool,

    /// Write to a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    /// Also open backing and data files in or below this directory; so does BLOCKMIRROR_ALLOW_BACKING, for
    /// backing files
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_backing: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

/// How the space of a longer disk is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Growth {
    /// allocated on write
    Off,
    /// metadata is allocated, data is a hole of the file; qcow2 only
    Metadata,
    /// allocated; for qcow2 the same as `full`
    Falloc,
    /// written with zeros
    Full,
}

/// A size, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    Absolute(u64),
    More(u64),
    Less(u64),
}

fn new_size(text: &str) -> Result<NewSize, SizeError> {
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        // One sign is enough.
        (Some(more), _) if more.starts_with(['+', ' ']) => Err(SizeError::NotASize(text.to_owned())),
        (_, Some(less)) if less.starts_with(['+', ' ']) => Err(SizeError::NotASize(text.to_owned())),
        (Some(more), _) => parse_size(more).map(NewSize::More),
        (_, Some(less)) => parse_size(less).map(NewSize::Less),
        _ => parse_size(text).map(NewSize::Absolute),
    }
}
