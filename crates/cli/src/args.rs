//! The command line: every command, option and word of help, in one place.
//!
//! Parsed by [`crate::run`]. Names and letters are those of `qemu-img` where they mean the same. Values are checked
//! here as far as they can be without looking at a file.

mod ctl;

use std::path::PathBuf;

use blockmirror_image::Format;
use blockmirror_image::size::{SizeError, parse_size};
use blockmirror_mirror::MAX_IN_FLIGHT;
use clap::builder::RangedI64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use ctl::CTL_EXAMPLES;

pub(crate) use ctl::{CompleteArgs, CtlArgs, CtlCommand, JobArgs, SetSpeedArgs};

/// Columns of the help where there is no terminal to fit.
pub(crate) const HELP_WIDTH: usize = 100;

const EXIT_CODES: &str = "\
Exit codes:
    0  done (compare: the images are the same)
    1  failed, or done without the ranges that `ignore` gave up (compare: the images differ;
       ctl complete, abort and watch: a job did not end as asked)
    2  the command line is wrong; nothing was touched (compare: could not compare)
  130  interrupted; a target that was being made has been removed (ctl: jobs go on)

Sizes take the units K, M, G, T, P and E, also written KiB and so on: powers of 1024.

An image is a path, or the URI of an export of an NBD server:
  nbd://HOST[:PORT]/EXPORT  nbd+unix:///EXPORT?socket=PATH  and nbds://, nbds+unix:// with TLS,
  with ?tls-certificates=DIR (ca-cert.pem, client-cert.pem, client-key.pem) and &tls-hostname=NAME.
A file of such a name is written ./nbd:...";

/// Copies virtual disks from image to image, in the unit that fits the target.
#[derive(Debug, Parser)]
#[command(name = "blockmirror", version, max_term_width = HELP_WIDTH, after_help = EXIT_CODES)]
#[command(subcommand_required = true, arg_required_else_help = false, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy an image with the mirror job; the target gets the format of the source
    #[command(after_help = MIRROR_EXAMPLES)]
    Mirror(MirrorArgs),
    /// Copy an image; the target is raw unless -O says otherwise
    #[command(after_help = CONVERT_EXAMPLES)]
    Convert(ConvertArgs),
    /// Make a new, empty image
    #[command(after_help = CREATE_EXAMPLES)]
    Create(CreateArgs),
    /// Show what an image says about itself; opens that one file only
    #[command(after_help = INFO_EXAMPLES)]
    Info(InfoArgs),
    /// Show which parts of an image hold data, and where
    #[command(after_help = MAP_EXAMPLES)]
    Map(MapArgs),
    /// Compare the contents of two images
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(CompareArgs),
    /// Change the virtual size of an image
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize(ResizeArgs),
    /// Serve disks over NBD and mirror them meanwhile, steered over QMP
    #[command(after_help = DAEMON_EXAMPLES)]
    Daemon(DaemonArgs),
    /// Look at the jobs of a daemon and steer them, over QMP
    #[command(after_help = CTL_EXAMPLES)]
    Ctl(CtlArgs),
}

const MIRROR_EXAMPLES: &str = "\
Examples:
  blockmirror mirror disk.qcow2 copy.qcow2
  blockmirror mirror -O raw disk.qcow2 disk.raw
  blockmirror mirror -O qcow2 -o cluster_size=2M,extended_l2=on disk.raw disk.qcow2
  blockmirror mirror --sync top overlay.qcow2 overlay-copy.qcow2
  blockmirror mirror -n --granularity 4K disk.raw /dev/vg/disk
  blockmirror mirror -n -O raw disk.qcow2 'nbd+unix:///disk?socket=/run/nbd.sock'
  blockmirror mirror --dry-run --output=json disk.qcow2 copy.qcow2";

const CONVERT_EXAMPLES: &str = "\
Examples:
  blockmirror convert disk.qcow2 disk.raw
  blockmirror convert -p -O qcow2 disk.raw disk.qcow2
  blockmirror convert nbds://host/disk disk.raw
  blockmirror convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2";

const CREATE_EXAMPLES: &str = "\
Examples:
  blockmirror create -f qcow2 disk.qcow2 20G
  blockmirror create -f qcow2 -o cluster_size=128K,lazy_refcounts=on disk.qcow2 1T
  blockmirror create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  blockmirror create -f qcow2 -o help";

const INFO_EXAMPLES: &str = "\
Examples:
  blockmirror info disk.qcow2
  blockmirror info --output=json --backing-chain overlay.qcow2";

const MAP_EXAMPLES: &str = "\
Examples:
  blockmirror map disk.qcow2
  blockmirror map --output=json -s 1M -l 64K disk.qcow2";

const COMPARE_EXAMPLES: &str = "\
Examples:
  blockmirror compare disk.qcow2 disk.raw
  blockmirror compare -s -f raw -F raw a.raw b.raw";

const RESIZE_EXAMPLES: &str = "\
Examples:
  blockmirror resize disk.qcow2 +10G
  blockmirror resize -f raw disk.raw 64G
  blockmirror resize --shrink disk.qcow2 20G";

const DAEMON_EXAMPLES: &str = "\
Options have the syntax of qemu-storage-daemon. They are carried out in this order: --object, --blockdev, --chardev,
--nbd-server, --export, --monitor.

Examples:
  blockmirror daemon \\
    --blockdev driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2 \\
    --nbd-server addr.type=unix,addr.path=/run/nbd.sock \\
    --export nbd,id=disk,node-name=disk,writable=on \\
    --chardev socket,id=qmp,path=/run/qmp.sock,server=on,wait=off --monitor chardev=qmp";

/// What `qemu-storage-daemon` takes, with its names.
#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// An object that others refer to: `throttle-group`, `tls-creds-x509`, `secret`
    #[arg(long = "object", value_name = "TYPE,id=ID,..")]
    pub(crate) objects: Vec<String>,

    /// A node; the options are those of the QMP command `blockdev-add`
    #[arg(long = "blockdev", value_name = "DRIVER,node-name=NAME,..")]
    pub(crate) blockdevs: Vec<String>,

    /// Where a monitor's client is: a Unix socket or standard input and output
    #[arg(long = "chardev", value_name = "socket|stdio,id=ID,..")]
    pub(crate) chardevs: Vec<String>,

    /// A QMP monitor on a chardev
    #[arg(long = "monitor", value_name = "chardev=ID")]
    pub(crate) monitors: Vec<String>,

    /// The NBD server
    #[arg(long, value_name = "addr.type=..,..")]
    pub(crate) nbd_server: Option<String>,

    /// A node that the NBD server serves; the options are those of `block-export-add`
    #[arg(long = "export", value_name = "nbd,id=ID,node-name=NAME,..")]
    pub(crate) exports: Vec<String>,

    /// A directory from which images may name their backing and data files, besides their own; can be repeated
    #[arg(long = "allow-backing", value_name = "DIR")]
    pub(crate) allowed: Vec<PathBuf>,

    /// Go to the background once everything is set up
    #[arg(long)]
    pub(crate) daemonize: bool,

    /// The process has been put into the background already
    #[arg(long, hide = true)]
    pub(crate) background: bool,

    /// Write the process id there once everything is set up
    #[arg(long, value_name = "PATH")]
    pub(crate) pidfile: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct MirrorArgs {
    #[command(flatten)]
    pub(crate) copy: CopyArgs,

    /// What to copy: `full`, everything the backing chain holds; `top`, what the top image itself holds, onto a
    /// target with the same backing file [default: full]
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Copying")]
    pub(crate) sync: Option<Sync>,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) copy: CopyArgs,

    /// What to copy: `full`, everything the backing chain holds; `top`, what the top image itself holds
    /// [default: top with -B, else full]
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Copying")]
    pub(crate) sync: Option<Sync>,
}

/// What `mirror` and `convert` have in common, which is all but the defaults.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// The image to copy
    pub(crate) source: PathBuf,

    /// The image to make, or with -n to write into
    pub(crate) target: PathBuf,

    /// Format of the source, raw or qcow2; found out if not given
    #[arg(short = 'f', long, value_name = "FMT", help_heading = "Source")]
    pub(crate) source_format: Option<Format>,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    /// Format of the target, raw or qcow2
    #[arg(short = 'O', long, value_name = "FMT", help_heading = "Target")]
    pub(crate) target_format: Option<Format>,

    /// Options of the new target; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..", help_heading = "Target")]
    pub(crate) target_options: Vec<String>,

    /// Backing file of the new target
    #[arg(short = 'B', long, value_name = "FILE", help_heading = "Target")]
    pub(crate) backing: Option<String>,

    /// Format of the backing file given with -B
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing", help_heading = "Target")]
    pub(crate) backing_format: Option<Format>,

    /// Write into the target, which exists already and has the size of the source
    #[arg(short = 'n', long, help_heading = "Target", conflicts_with_all = ["target_options", "backing"])]
    pub(crate) no_create: bool,

    /// Take it from the caller that all of the target reads as zeros
    #[arg(long, requires = "no_create", help_heading = "Target")]
    pub(crate) target_is_zero: bool,

    /// Bytes per bit of the dirty bitmap: a power of two from 512 to 64M [default: the target's cluster
    /// size, between 4K and 64K; 64K if it has no clusters]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, help_heading = "Copying")]
    pub(crate) granularity: Option<u64>,

    /// Most bytes per second; 0 for no limit
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, default_value = "0")]
    #[arg(hide_default_value = true, help_heading = "Copying")]
    pub(crate) speed: u64,

    /// Most bytes in flight [default: 16M]
    #[arg(long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true, default_value = "0")]
    #[arg(hide_default_value = true, help_heading = "Copying")]
    pub(crate) buf_size: u64,

    /// Most operations in flight [default: 16]
    #[arg(short = 'm', long, value_name = "N", value_parser = parallel(), help_heading = "Copying")]
    pub(crate) parallel: Option<u16>,

    /// Runs of zero bytes this long become holes in the target; 0 writes data as it is [default: 4K]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = size, allow_hyphen_values = true)]
    #[arg(help_heading = "Copying")]
    pub(crate) sparse_size: Option<u64>,

    /// Accepted as in qemu-img; writes are never held back to keep their order
    #[arg(short = 'W', long, help_heading = "Copying")]
    pub(crate) oob_writes: bool,

    /// When the source cannot be read
    #[arg(long, value_enum, value_name = "POLICY", default_value = "report", help_heading = "Copying")]
    pub(crate) on_source_error: OnError,

    /// When the target cannot be written
    #[arg(long, value_enum, value_name = "POLICY", default_value = "report", help_heading = "Copying")]
    pub(crate) on_target_error: OnError,

    /// Say what would be copied, zeroed and left out, and in which granularity; make nothing
    #[arg(long, help_heading = "Copying")]
    pub(crate) dry_run: bool,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,
}

/// How files are opened.
#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
    /// Open images that are in use elsewhere; what is read may then be inconsistent
    #[arg(short = 'U', long, help_heading = "Source")]
    pub(crate) force_share: bool,

    /// Also open backing and data files in this directory or below it. Without it: those in or below the
    /// directory of the image, and those named on the command line
    #[arg(long, value_name = "DIR", help_heading = "Source")]
    pub(crate) allow_backing: Vec<PathBuf>,

    /// Most connections to one NBD export [default: 4]
    #[arg(long, value_name = "N", value_parser = RangedI64ValueParser::<u16>::new().range(1..=16), help_heading = "NBD")]
    pub(crate) connections: Option<u16>,

    /// How long requests wait for an NBD server that has gone, before they fail. What it had not flushed is then an error of
    /// the target: `--on-target-error ignore` copies it again
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
}

#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// How to print the result
    #[arg(long, value_enum, value_name = "STYLE", default_value = "human")]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ProgressArgs {
    /// Where the copy stands, on the standard error: `bar`, a line that is rewritten; `json`, an object a line;
    /// `auto`, a bar on a terminal
    #[arg(long, value_enum, value_name = "STYLE", default_value = "auto")]
    pub(crate) progress: ProgressStyle,

    /// The same as --progress=bar
    #[arg(short = 'p')]
    pub(crate) bar: bool,

    /// Print nothing but errors
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The image to make
    #[arg(required_unless_present = "options")]
    pub(crate) file: Option<PathBuf>,

    /// Its virtual size; by default that of the backing file
    #[arg(value_parser = size, allow_hyphen_values = true)]
    pub(crate) size: Option<u64>,

    /// Format of the image
    #[arg(short = 'f', long, value_name = "FMT", default_value = "raw")]
    pub(crate) format: Format,

    /// Options of the image; `-o help` lists them
    #[arg(short = 'o', long, value_name = "KEY=VALUE,..")]
    pub(crate) options: Vec<String>,

    /// Backing file, as it is to stand in the image: relative to the image's directory
    #[arg(short = 'b', long, value_name = "FILE")]
    pub(crate) backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) backing_format: Option<Format>,

    /// Do not look at the backing file; it may be missing
    #[arg(short = 'u', long = "unsafe")]
    pub(crate) no_look: bool,

    /// Print nothing but errors
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The image
    pub(crate) file: PathBuf,

    /// Format of the image, raw or qcow2; found out if not given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Also the images below it
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

    /// Format of the image, raw or qcow2; found out if not given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// First byte to look at
    #[arg(short = 's', long, value_name = "SIZE", value_parser = size, default_value = "0")]
    pub(crate) start_offset: u64,

    /// How many bytes to look at
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_length: Option<u64>,

    #[command(flatten)]
    pub(crate) access: AccessArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The first image
    pub(crate) first: PathBuf,

    /// The second image
    pub(crate) second: PathBuf,

    /// Format of the first image; found out if not given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) first_format: Option<Format>,

    /// Format of the second image; found out if not given
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) second_format: Option<Format>,

    /// Lengths and what is allocated must be the same, too
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
pub(crate) struct ResizeArgs {
    /// The image, which nobody may be using
    pub(crate) file: PathBuf,

    /// The new size, or with + or - by how much it changes; rounded up to a multiple of 512
    #[arg(value_parser = new_size, value_name = "[+|-]SIZE", allow_hyphen_values = true)]
    pub(crate) size: NewSize,

    /// Format of the image, raw or qcow2; found out if not given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Allow it to become smaller; what lies past the new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,

    /// Accepted as in qemu-img, for `off`
    #[arg(long, value_name = "MODE")]
    pub(crate) preallocation: Option<String>,

    /// Also open backing and data files in this directory or below it
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_backing: Vec<PathBuf>,

    /// Print nothing but errors
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

/// A size, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    Absolute(u64),
    More(u64),
    Less(u64),
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sync {
    Full,
    Top,
}

/// What to do about a failing range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnError {
    /// fail
    Report,
    /// try it ten times, then go on without it and list it
    Ignore,
    /// pause and ask; needs a terminal
    Stop,
    /// pause and ask if space ran out, else fail; needs a terminal
    Enospc,
    /// enospc on a terminal, else report
    Auto,
}

fn parallel() -> RangedI64ValueParser<u16> {
    // The bound fits: it is a number of threads.
    RangedI64ValueParser::new().range(1..=i64::try_from(MAX_IN_FLIGHT).unwrap_or(i64::from(u16::MAX)))
}

fn size(text: &str) -> Result<u64, SizeError> {
    parse_size(text)
}

fn new_size(text: &str) -> Result<NewSize, SizeError> {
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => parse_size(more).map(NewSize::More),
        (_, Some(less)) => parse_size(less).map(NewSize::Less),
        _ => parse_size(text).map(NewSize::Absolute),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn letters_mean_what_they_mean_in_qemu_img() {
        let line =
            "blockmirror convert -f raw -O qcow2 -o cluster_size=4k -B b -F raw -p -q -S 0 -m 4 -W -U a b";
        let Command::Convert(args) = Cli::parse_from(line.split(' ')).command else { panic!("not convert") };
        let copy = args.copy;
        assert_eq!(copy.source_format, Some(Format::Raw));
        assert_eq!(copy.target_format, Some(Format::Qcow2));
        assert_eq!(copy.target_options, ["cluster_size=4k"]);
        assert_eq!((copy.backing.as_deref(), copy.backing_format), (Some("b"), Some(Format::Raw)));
        assert_eq!((copy.sparse_size, copy.parallel), (Some(0), Some(4)));
        assert!(copy.oob_writes && copy.access.force_share && copy.progress.bar && copy.progress.quiet);
    }
}
