//! The command lines of the commands that change a backing chain: `blockmirror commit` and `rebase`.

use std::path::PathBuf;

use blockmirror_image::{BackingFormat, CacheMode, Format, ImageName, NodeOptions};
use clap::Args;

use super::{LockArgs, ProgressArgs, size};

pub(super) const COMMIT_EXAMPLES: &str = "\
Examples:
  blockmirror commit overlay.qcow2
  blockmirror commit -p -d overlay.qcow2
  blockmirror commit -b base.qcow2 overlay.qcow2";

pub(super) const REBASE_EXAMPLES: &str = "\
Examples:
  blockmirror rebase -b base.qcow2 -F qcow2 overlay.qcow2
  blockmirror rebase -b '' overlay.qcow2
  blockmirror rebase -u -b moved/base.qcow2 -F qcow2 overlay.qcow2";

/// The image whose chain changes.
#[derive(Debug, Args)]
pub(crate) struct ChainArgs {
    /// The image, which must not be in use
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format of the image; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Treat the image's name as options: driver=FORMAT,file.filename=PATH
    #[arg(long)]
    pub(crate) image_opts: bool,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Write to a block device that is mounted or in use
    #[arg(long)]
    pub(crate) force: bool,

    /// Also open backing and data files in or below this directory; so does BLOCKMIRROR_ALLOW_BACKING, for
    /// reading
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_backing: Vec<PathBuf>,

    /// Also open backing files named blkdebug:RULES:IMAGE or null-co://
    #[arg(long)]
    pub(crate) allow_protocols: bool,
}

impl ChainArgs {
    /// The image with what is known of it.
    pub(crate) fn name(&self) -> ImageName {
        let mut name = ImageName::from(&self.file);
        (name.node, name.format) = (self.node.clone(), self.format);
        name
    }
}

#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    #[command(flatten)]
    pub(crate) chain: ChainArgs,

    /// The layer of the backing chain to commit to, by its name in the chain or its path; the image is kept
    /// then, and the layers between lose their meaning [default: the image's backing file]
    #[arg(short = 'b', long, value_name = "FILE")]
    pub(crate) base: Option<PathBuf>,

    /// Keep in the image what was committed; by default the image is emptied
    #[arg(short = 'd', long = "drop")]
    pub(crate) keep: bool,

    /// Cache mode of the files: `none` and `directsync` bypass the host's page cache, `writethrough` and
    /// `directsync` make each write durable at once; `unsafe` is the same as `writeback`. In each mode the
    /// commit is flushed [default: writeback]
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) cache: CacheMode,

    /// Maximum bytes per second; 0 for no limit
    #[arg(short = 'r', long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    #[arg(default_value = "0", hide_default_value = true)]
    pub(crate) rate: u64,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    #[command(flatten)]
    pub(crate) chain: ChainArgs,

    /// New backing file, as the image's header names it: relative to the image's directory; empty for none
    #[arg(short = 'b', long, value_name = "FILE", required_unless_present = "header_only")]
    pub(crate) backing: Option<String>,

    /// Format of the new backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) backing_format: Option<BackingFormat>,

    /// Change the header only: no backing file is opened, and what the image reads as changes where the two
    /// differ
    #[arg(short = 'u', long = "unsafe")]
    pub(crate) header_only: bool,

    /// With the header alone, whether it makes a circle of the chain is not looked at.
    #[arg(skip)]
    pub(crate) unchecked: bool,

    /// Zeros that the old backing file shows become data of the image.
    #[arg(skip)]
    pub(crate) allocate_zeros: bool,

    /// Store the data that is copied into the image compressed; with -u none is
    #[arg(short = 'c', long)]
    pub(crate) compress: bool,

    /// Open the new backing file although it is in use elsewhere; what is compared may be inconsistent
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,

    /// Cache mode of the image and its chain: `none` and `directsync` bypass the host's page cache. In each
    /// mode the image is flushed before its header names the new backing file [default: writeback]
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) cache: CacheMode,

    /// Cache mode of the new backing file
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback", hide_default_value = true)]
    pub(crate) backing_cache: CacheMode,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}
