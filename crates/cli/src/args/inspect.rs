//! The command line of `blockmirror inspect`.

use std::path::PathBuf;

use blockmirror_image::{FindingKind, Format, NodeOptions};
use clap::Args;

use super::{LimitsArgs, OutputArgs};

pub(super) const INSPECT_EXAMPLES: &str = "\
Findings, each of which refuses the image (exit code 4) unless --allow names it:
  backing_file        the header names another file, which opening the image opens
  data_file           the same for the file that the data is in
  unknown_features    incompatible features that are not known
  truncated           the file ends before what its metadata says
  dirty               not closed cleanly: opening it for writing repairs it first
  corrupt             marked corrupt
  encrypted           qcow2 with encryption, or LUKS
  format_confusion    another format than -f says; two formats at once; a disk that, copied to raw,
                      looks like an image itself
  unsupported_format  vmdk, vdi, vhdx, vpc, qed and others: what it holds and names is not known
  malformed           metadata that makes no sense
  limit_exceeded      a disk of more than 64 TiB, tables over the limits of LIMITS.md

One file is opened, whatever it names. Partition tables, ISO 9660, snapshots and bitmaps are
reported, and refuse nothing. docs/inspect.md says more.

Examples:
  blockmirror inspect -f qcow2 upload
  blockmirror inspect --output=json upload
  blockmirror inspect --allow backing_file --allow dirty overlay.qcow2";

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The image
    pub(crate) file: PathBuf,

    /// What its name says besides path and format.
    #[arg(skip)]
    pub(crate) node: NodeOptions,

    /// Format that the image is said to have, raw or qcow2; detected if omitted
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Do not refuse the image for this finding; may be repeated
    #[arg(long, value_name = "FINDING")]
    pub(crate) allow: Vec<FindingKind>,

    #[command(flatten)]
    pub(crate) limits: LimitsArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}
