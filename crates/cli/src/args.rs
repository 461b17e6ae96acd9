//! The command line: every command, option and word of help, one file a group of commands.
//!
//! Parsed by [`crate::run`]. Names and letters are those of `qemu-img` where they mean the same. Values are
//! checked here as far as they can be without looking at a file.

mod bench;
mod bitmap;
mod chain;
mod change;
mod checkpoint;
mod common;
mod copy;
mod ctl;
mod daemon;
mod help;
mod inspect;
mod limits;
mod look;
mod plan;
mod reflink;
mod serve;
mod snapshot;
mod target;
mod verify;

use blockmirror_block::size::{SizeError, parse_size};
use clap::{Parser, Subcommand};

use bench::{BENCH_EXAMPLES, DD_EXAMPLES};
use bitmap::BITMAP_EXAMPLES;
use chain::{COMMIT_EXAMPLES, REBASE_EXAMPLES};
use change::{AMEND_EXAMPLES, CREATE_EXAMPLES, RESIZE_EXAMPLES};
use copy::{CONVERT_EXAMPLES, MIRROR_EXAMPLES};
use ctl::CTL_EXAMPLES;
use daemon::DAEMON_EXAMPLES;
use help::after_help;
use inspect::INSPECT_EXAMPLES;
use look::{CHECK_EXAMPLES, COMPARE_EXAMPLES, HASH_EXAMPLES, INFO_EXAMPLES, MAP_EXAMPLES, MEASURE_EXAMPLES};
use plan::PLAN_EXAMPLES;
use serve::SERVE_EXAMPLES;
use snapshot::SNAPSHOT_EXAMPLES;

pub(crate) use bench::{BenchArgs, DdArgs};
pub(crate) use bitmap::BitmapArgs;
pub(crate) use chain::{ChainArgs, CommitArgs, RebaseArgs};
pub(crate) use change::{AmendArgs, CreateArgs, Growth, NewSize, ResizeArgs};
pub(crate) use checkpoint::{CheckpointArgs, ResumeHow};
pub(crate) use common::{AccessArgs, LockArgs, Output, OutputArgs, ProgressArgs, ProgressStyle, Switch, Via};
pub(crate) use common::{View, ViewArgs};
pub(crate) use copy::{ConvertArgs, CopyArgs, MirrorArgs, OnError, Sync};
pub(crate) use ctl::{CloseArgs, CompleteArgs, CtlArgs, CtlCommand, JobArgs, SetSpeedArgs, WatchArgs};
pub(crate) use ctl::{
    CopyMode, CtlCommitArgs, CtlMirrorArgs, CtlSnapshotArgs, CtlStreamArgs, JobSync, NewJobArgs,
};
pub(crate) use daemon::DaemonArgs;
pub(crate) use help::{HelpArgs, TOPICS, topic, topic_names};
pub(crate) use inspect::InspectArgs;
pub(crate) use limits::{Limits, LimitsArgs};
pub(crate) use look::{CheckArgs, CompareArgs, HashArgs, InfoArgs, MapArgs, MeasureArgs, Mend};
pub(crate) use plan::PlanArgs;
pub(crate) use serve::ServeArgs;
pub(crate) use snapshot::SnapshotArgs;
pub(crate) use target::TargetArgs;
pub(crate) use verify::{VerifyArgs, VerifyMode};

/// Columns of the help where there is no terminal to fit.
pub(crate) const HELP_WIDTH: usize = 100;

/// Copies, converts and mirrors virtual disk images
#[derive(Debug, Parser)]
#[command(name = "blockmirror", version, max_term_width = HELP_WIDTH, after_help = after_help())]
#[command(subcommand_required = true, arg_required_else_help = false, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Format of the log on standard error, which RUST_LOG=info (or error, warn, debug) asks for
    #[arg(long, global = true, value_enum, value_name = "FORMAT", help_heading = "Logs")]
    pub(crate) log_format: Option<LogFormat>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How a line of the log looks. Words on the values would make the help of every command a long one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy an image with the mirror job; the target gets the source's format
    #[command(after_help = MIRROR_EXAMPLES)]
    Mirror(MirrorArgs),
    /// Copy an image; a new target is raw unless -O is given
    #[command(after_help = CONVERT_EXAMPLES)]
    Convert(ConvertArgs),
    /// Tell what a copy would do, and what each granularity costs; writes nothing
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(PlanArgs),
    /// Create an empty image
    #[command(after_help = CREATE_EXAMPLES)]
    Create(CreateArgs),
    /// Show an image's metadata; opens that one file only
    #[command(after_help = INFO_EXAMPLES)]
    Info(InfoArgs),
    /// Judge an image from a stranger before it is used; opens that one file only
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(InspectArgs),
    /// Show which parts of an image hold data, and where
    #[command(after_help = MAP_EXAMPLES)]
    Map(MapArgs),
    /// Tell how long the file of a new image becomes
    #[command(after_help = MEASURE_EXAMPLES)]
    Measure(MeasureArgs),
    /// Check an image's metadata, and repair it with -r
    #[command(after_help = CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// Compare the contents of two images
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(CompareArgs),
    /// Print a hash of what images hold, the same for every format
    #[command(after_help = HASH_EXAMPLES)]
    Hash(HashArgs),
    /// Change the virtual size of an image
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize(ResizeArgs),
    /// Change the options of a qcow2 image
    #[command(after_help = AMEND_EXAMPLES)]
    Amend(AmendArgs),
    /// Write what an image holds down into its backing file
    #[command(after_help = COMMIT_EXAMPLES)]
    Commit(CommitArgs),
    /// Put an image on another backing file, or on none
    #[command(after_help = REBASE_EXAMPLES)]
    Rebase(RebaseArgs),
    /// Copy a part of an image, with the operands of dd
    #[command(after_help = DD_EXAMPLES)]
    Dd(DdArgs),
    /// Measure how fast an image is read or written
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(BenchArgs),
    /// Change a persistent bitmap of a qcow2 image; several actions are done in order
    #[command(after_help = BITMAP_EXAMPLES)]
    Bitmap(BitmapArgs),
    /// List, take, apply and delete internal snapshots
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Snapshot(SnapshotArgs),
    /// Serve images over NBD; read-only unless --writable
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Serve disks over NBD and mirror them while in use, controlled over QMP
    #[command(after_help = DAEMON_EXAMPLES)]
    Daemon(DaemonArgs),
    /// Mirror disks of a daemon in use, and list and control its jobs, over QMP
    #[command(after_help = CTL_EXAMPLES)]
    Ctl(CtlArgs),
    /// Show the help of a command or a topic, or list them
    Help(HelpArgs),
}

fn size(text: &str) -> Result<u64, SizeError> {
    parse_size(text)
}

#[cfg(test)]
mod tests {
    use blockmirror_image::Format;
    use clap::CommandFactory;

    use super::*;
    use crate::failure::Exit;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    /// A code that a command gives and the help does not name, or the other way round.
    #[test]
    fn the_exit_codes_of_the_help_are_those_of_the_commands() {
        let given = [
            Exit::Done,
            Exit::Failed,
            Exit::Usage,
            Exit::NotCompared,
            Exit::NotRead,
            Exit::NotMapped,
            Exit::Incomplete,
            Exit::Refused,
            Exit::Mismatch,
            Exit::Resumable,
            Exit::Corrupt,
            Exit::Leaks,
            Exit::NoChecks,
            Exit::BrokenPipe,
        ];
        for exit in given {
            // A new one needs a place in the list above.
            match exit {
                Exit::Done | Exit::Failed | Exit::Usage | Exit::NotCompared | Exit::NotRead => {}
                Exit::NotMapped | Exit::Incomplete | Exit::Refused => {}
                Exit::Mismatch
                | Exit::Resumable
                | Exit::Corrupt
                | Exit::Leaks
                | Exit::NoChecks
                | Exit::BrokenPipe => {}
                Exit::Signal(_) => {}
            }
        }
        let mut given: Vec<_> = given.iter().map(|exit| exit.code()).collect();
        given.sort_unstable();
        given.dedup();
        let table = help::EXIT_CODES;
        let lines = table.lines().skip(1);
        let listed = lines.filter_map(|line| line.trim_start().split_once("  ")?.0.parse::<u8>().ok());
        let mut listed: Vec<_> = listed.collect();
        // Of `check` alone, in the middle of a line.
        assert!(table.contains("63 nothing to check"));
        listed.push(63);
        listed.sort_unstable();
        assert_eq!(listed, given);
        assert_eq!(Exit::Signal(15).code(), 143);
        assert!(table.contains("\n128+N  ended by signal N: 130 for SIGINT, 143 for SIGTERM"));
    }

    /// The ids of all arguments, by command, which have an effect of their own or are refused.
    const EFFECTIVE: &[(&str, &str)] = &[
        ("", "log_format"),
        (
            "mirror convert",
            "source target more source_format source_snapshot source_cache ACCESS target_format target_options backing backing_format no_create \
             target_image_opts target_cache target_is_zero require_flush no_sync in_place atomic no_clobber force clean granularity speed buf_size parallel sparse_size reflink \
             on_source_error salvage on_target_error bitmaps skip_broken_bitmaps checkpoint checkpoint_interval restart resume no_space_check dry_run report \
             verify ranges only output progress bar quiet sync",
        ),
        ("convert", "compress"),
        (
            "plan",
            "source target more source_format source_snapshot ACCESS target_format target_options backing \
             backing_format no_create granularity speed sync output",
        ),
        (
            "create",
            "file size format options backing backing_format allow_backing lock no_look in_place atomic no_clobber force clean quiet",
        ),
        ("info", "file format backing_chain ACCESS output"),
        ("inspect", "file format allow limits output"),
        ("map", "file format start_offset max_length ACCESS output"),
        ("measure", "file size source_format snapshot target_format target_options ACCESS output"),
        (
            "compare",
            "first second first_format second_format source_cache ranges strict ACCESS output progress bar quiet",
        ),
        (
            "check",
            "file format repair force_share lock image_opts force source_cache limits output progress bar quiet",
        ),
        ("amend", "file format options shrink cache lock image_opts force allow_backing progress bar quiet"),
        (
            "bitmap",
            "add remove clear enable disable merge granularity file bitmap format source_file source_format lock \
             image_opts force allow_backing",
        ),
        (
            "snapshot",
            "file list create apply delete format force_share lock image_opts force source_cache quiet",
        ),
        ("hash", "files format plain source_cache ACCESS output progress bar quiet"),
        ("resize", "file size format shrink lock image_opts preallocation force allow_backing quiet"),
        ("commit", "CHAIN base keep cache rate progress bar quiet"),
        (
            "rebase",
            "CHAIN backing backing_format header_only compress force_share cache backing_cache progress bar quiet",
        ),
        (
            "dd",
            "operands format output_format ACCESS in_place atomic no_clobber force clean progress bar quiet",
        ),
        (
            "bench",
            "file format count depth buffer_size offset step_size write pattern flush_interval no_drain cache \
             force ACCESS quiet",
        ),
        (
            "serve",
            "files format writable snapshot bitmaps cache force ACCESS socket port bind names once \
             max_connections pid_file tls_certificates tls_verify_peer no_tls",
        ),
        (
            "daemon",
            "objects blockdevs chardevs monitors nbd_server exports allowed daemonize background pidfile",
        ),
        ("ctl", "socket"),
        (
            "ctl mirror",
            "device target target_format job_id speed wait granularity sync copy_mode reconnect_delay log pivot \
             keep_source",
        ),
        ("ctl commit", "device top base job_id speed wait pivot"),
        ("ctl stream", "device base job_id speed wait"),
        ("ctl snapshot", "device file node_name backing_file"),
        ("ctl close", "nodes"),
        ("ctl nodes", "output"),
        ("ctl bitmaps", "output"),
        ("ctl exports", "output"),
        ("ctl jobs", "output"),
        ("ctl pause", "jobs"),
        ("ctl resume", "jobs"),
        ("ctl set-speed", "job speed"),
        ("ctl complete", "jobs keep_source wait"),
        ("ctl abort", "jobs"),
        ("ctl watch", "jobs json report"),
        ("help", "subject"),
    ];

    /// What ACCESS stands for.
    const ACCESS: &str = "force_share lock image_opts allow_backing via allow_protocols limits connections reconnect_delay open_timeout io_timeout";

    /// What CHAIN stands for.
    const CHAIN: &str = "file format image_opts lock force allow_backing allow_protocols";

    /// Those that are accepted and change no content, with their name in LIMITS.md.
    const HINTS: &[(&str, &str, &str)] = &[
        ("mirror convert", "oob_writes", "`-W`"),
        ("mirror convert", "copy_range", "`-C`"),
        ("bench", "aio", "`-i`"),
        ("bench", "native", "`-n`"),
    ];

    fn arguments_of(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        let ids = command.get_arguments().map(|argument| argument.get_id().as_str());
        found.extend(ids.filter(|id| !matches!(*id, "help" | "version")).map(|id| format!("{path}: {id}")));
        for inner in command.get_subcommands() {
            arguments_of(inner, format!("{path} {}", inner.get_name()).trim(), found);
        }
    }

    /// What is accepted and does nothing lets its user believe that it did: a new option needs a place in a
    /// list.
    #[test]
    fn every_option_has_an_effect_or_is_a_documented_hint() {
        let mut found = Vec::new();
        arguments_of(&Cli::command(), "", &mut found);
        let mut listed = Vec::new();
        let mut list = |commands: &str, ids: &str| {
            let commands =
                if commands.starts_with("ctl") { vec![commands] } else { commands.split(' ').collect() };
            let ids = ids.replace("ACCESS", ACCESS).replace("CHAIN", CHAIN);
            for command in commands {
                listed.extend(ids.split_whitespace().map(|id| format!("{command}: {id}")));
            }
        };
        for (commands, ids) in EFFECTIVE {
            list(commands, ids);
        }
        for (commands, id, name) in HINTS {
            list(commands, id);
            let limits = include_str!("../../../LIMITS.md");
            assert!(limits.lines().any(|line| line.contains("hint") && line.contains(name)), "{name}");
        }
        found.sort();
        listed.sort();
        assert_eq!(found, listed);
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
