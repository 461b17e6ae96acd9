//! Options that several commands have: how images are opened, results printed and progress shown.

use std::path::PathBuf;

use clap::builder::RangedI64ValueParser;
use clap::{Args, ValueEnum};

/// How files are opened.
#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
    /// Open images that are in use elsewhere; what is read may then be inconsistent
    #[arg(short = 'U', long, help_heading = "Source")]
    pub(crate) force_share: bool,

    #[command(flatten)]
    pub(crate) lock: LockArgs,

    /// Images are named by options: driver=FORMAT,file.filename=PATH, or file.driver=nbd with its server and
    /// export
    #[arg(long, help_heading = "Source")]
    pub(crate) image_opts: bool,

    /// Also open backing and data files in this directory or below it. Without it: those in or below the
    /// directory of the image, those named on the command line, and those in the directories that the
    /// environment variable BLOCKMIRROR_ALLOW_BACKING lists, separated by colons. The variable lets no data
    /// file be written to
    #[arg(long, value_name = "DIR", help_heading = "Source")]
    pub(crate) allow_backing: Vec<PathBuf>,

    /// Also open backing files that images name as blkdebug:RULES:IMAGE or null-co://
    #[arg(long, help_heading = "Source")]
    pub(crate) allow_protocols: bool,

    /// Most connections to one NBD export [default: 4]
    #[arg(long, value_name = "N", value_parser = RangedI64ValueParser::<u16>::new().range(1..=16), help_heading = "NBD")]
    pub(crate) connections: Option<u16>,

    /// How long requests wait for an NBD server that has gone, before they fail. What it had not flushed is
    /// then an error of the target: `--on-target-error ignore` copies it again
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "NBD"
    )]
    pub(crate) reconnect_delay: u32,

    /// How long to wait for an NBD server that is not there yet
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "NBD"
    )]
    pub(crate) open_timeout: u32,

    /// How long an NBD server may take for a request, before the connection counts as lost [default: as long
    /// as its host acknowledges]
    #[arg(long, value_name = "SECONDS", help_heading = "NBD")]
    #[arg(value_parser = RangedI64ValueParser::<u32>::new().range(1..))]
    pub(crate) io_timeout: Option<u32>,
}

/// Whether files are locked.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LockArgs {
    /// `off` locks no file, for file systems without locks: then nothing keeps two programs from writing one
    /// image
    #[arg(long, value_enum, value_name = "WHETHER", default_value = "on", hide_possible_values = true)]
    pub(crate) lock: Switch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// How to print the result
    #[arg(long, value_enum, value_name = "STYLE", default_value = "human")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ProgressArgs {
    /// Where the copy stands, on the standard error: `bar`, a line that is rewritten; `json`, an object a
    /// line; `auto`, a bar on a terminal
    #[arg(long, value_enum, value_name = "STYLE", default_value = "auto")]
    pub(crate) progress: ProgressStyle,

    /// The same as --progress=bar
    #[arg(short = 'p')]
    pub(crate) bar: bool,

    /// Print nothing but errors
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Human,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressStyle {
    Auto,
    Bar,
    Json,
    None,
}
