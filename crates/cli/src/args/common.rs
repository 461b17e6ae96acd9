//! Options that several commands have: how images are opened, results printed and progress shown.

use std::path::PathBuf;

use blockmirror_picture::Format;
use clap::builder::RangedI64ValueParser;
use clap::{Args, ValueEnum};

use super::LimitsArgs;

/// How files are opened.
#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
    /// Open images that are in use elsewhere; the data read may be inconsistent
    #[arg(short = 'U', long, help_heading = "Source")]
    pub(crate) force_share: bool,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Treat image names as options: driver=FORMAT,file.filename=PATH, or file.driver=nbd with server and
    /// export
    #[arg(long, help_heading = "Source")]
    pub(crate) image_opts: bool,

    /// Also open backing and data files in or below this directory. By default: files in or below the image's
    /// directory, files named on the command line, and files in or below the directories in the environment
    /// variable BLOCKMIRROR_ALLOW_BACKING (colon-separated), which permits reading only
    #[arg(long, value_name = "DIR", help_heading = "Source")]
    pub(crate) allow_backing: Vec<PathBuf>,

    /// Have qemu-nbd read the images whose format is recognised and not supported here (vmdk, vdi, vhdx, vpc
    /// and others), as [ qemu-nbd -r -f FORMAT FILE ] does
    #[arg(long, value_enum, value_name = "PROGRAM", help_heading = "Source")]
    pub(crate) via: Option<Via>,

    /// Also open backing files named blkdebug:RULES:IMAGE or null-co://
    #[arg(long, help_heading = "Source")]
    pub(crate) allow_protocols: bool,

    #[command(flatten)]
    pub(crate) limits: LimitsArgs,

    /// Maximum connections to one NBD export [default: 4]
    #[arg(long, value_name = "N", value_parser = RangedI64ValueParser::<u16>::new().range(1..=16), help_heading = "NBD")]
    pub(crate) connections: Option<u16>,

    /// How long requests wait for a lost NBD server before they fail. Data that it had not flushed is then a
    /// write error of the target: `--on-target-error ignore` copies it again
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "NBD"
    )]
    pub(crate) reconnect_delay: u32,

    /// How long to wait for an NBD server that is not running yet, and for a captive one until it answers
    /// [default: 0; captive: 60]
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "NBD"
    )]
    pub(crate) open_timeout: u32,

    /// How long an NBD server may take for a request before the connection counts as lost [default: as long
    /// as its host acknowledges]
    #[arg(long, value_name = "SECONDS", help_heading = "NBD")]
    #[arg(value_parser = RangedI64ValueParser::<u32>::new().range(1..))]
    pub(crate) io_timeout: Option<u32>,
}

/// Whether files are locked.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LockArgs {
    /// `off` disables image locking, for file systems without locks: nothing then prevents two programs from
    /// writing one image
    #[arg(long, value_enum, value_name = "WHETHER", default_value = "on", hide_possible_values = true)]
    pub(crate) lock: Switch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// A server that reads images in our place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Via {
    QemuNbd,
}

#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Output format
    #[arg(long, value_enum, value_name = "STYLE", default_value = "human")]
    pub(crate) output: Output,
}

/// How results are printed by commands that also draw them.
#[derive(Debug, Args)]
pub(crate) struct ViewArgs {
    /// Output format: `svg` is a picture, `html` a page with the picture and its figures
    #[arg(long, value_enum, value_name = "STYLE", default_value = "human")]
    pub(crate) output: View,
}

#[derive(Debug, Args)]
pub(crate) struct ProgressArgs {
    /// Progress on standard error: `bar`, a line that is updated; `json`, one object per line, the last with
    /// the outcome, and no other text; `auto`, a bar on a terminal
    #[arg(long, value_enum, value_name = "STYLE", default_value = "auto")]
    pub(crate) progress: ProgressStyle,

    /// Same as --progress=bar
    #[arg(short = 'p')]
    pub(crate) bar: bool,

    /// Print errors only
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Human,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum View {
    Human,
    Json,
    Svg,
    Html,
}

impl View {
    /// The format of a picture, if it is one.
    pub(crate) fn picture(self) -> Option<Format> {
        match self {
            Self::Human | Self::Json => None,
            Self::Svg => Some(Format::Svg),
            Self::Html => Some(Format::Html),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressStyle {
    Auto,
    Bar,
    Json,
    None,
    /// QEMU's, on the standard output.
    #[value(skip)]
    Percent,
}
