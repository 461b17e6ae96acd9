//! The `blockmirror` command: copies, converts and mirrors virtual disks; `cargo install blockmirror-cli`.
//!
//! | command | what it does |
//! |---|---|
//! | `mirror`, `convert` | copy an image with the mirror job |
//! | `plan` | tell what a copy would do, and what each granularity costs |
//! | `create`, `resize`, `amend` | make an image, change its virtual size, its options |
//! | `commit` | write an image down into its backing file |
//! | `rebase` | put an image on another backing file, or on none |
//! | `dd` | copy a part of an image |
//! | `bench` | measure how fast an image is read or written |
//! | `info`, `map`, `compare` | look into images |
//! | `inspect` | judge an image from a stranger before it is given to any other program |
//! | `measure` | tell how long the file of a new image becomes |
//! | `bitmap` | change persistent bitmaps of a qcow2 image |
//! | `snapshot` | list, take, apply and delete internal snapshots |
//! | `check` | find damage in a qcow2 image, and repair it with `-r` |
//! | `serve` | serve images over NBD |
//! | `daemon` | serve disks over NBD and mirror them while in use, controlled over QMP |
//! | `ctl` | mirror disks of a daemon, and control its jobs |
//! | `help` | show the help of a command or a topic |
//!
//! Names and options are those of `qemu-img` and `qemu-storage-daemon` where they mean the same; `--help` has
//! them all.
//!
//! As a function: [`run`] into any streams, [`run_here`] on those of the process. The binary is one call;
//! developer tools and tests call it in their own process. Commands hold no logic that a user of the
//! libraries would miss: they read options, call `image` and `ops`, and print.
//!
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let disk = dir.path().join("disk.qcow2");
//! # let disk = disk.to_str().ok_or("not UTF-8")?;
//! let (mut out, mut err) = (Vec::new(), Vec::new());
//! let words = ["blockmirror", "create", "-q", "-f", "qcow2", disk, "1G"];
//! assert_eq!(blockmirror_cli::run(words, &mut out, &mut err), 0);
//! assert_eq!(blockmirror_cli::run(["blockmirror", "map", disk], &mut out, &mut err), 0);
//! assert!(out.starts_with(b"Offset"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod amend;
mod args;
mod bench;
mod bitmap;
mod captive;
mod check;
mod checkpoint;
mod commit;
mod compare;
mod confine;
mod console;
mod copy;
mod create;
mod ctl;
mod daemon;
mod dd;
mod failure;
mod foreign;
mod hash;
mod help;
mod info;
mod inspect;
mod interrupt;
mod json;
mod lock_policy;
mod log;
mod map;
mod measure;
mod meter;
mod names;
mod notify;
mod pid_file;
mod plan;
mod progress;
mod prompt;
mod qemu_words;
mod quote;
mod ranges;
mod rebase;
mod report;
mod resize;
mod run_report;
mod serve;
mod snapshot;
mod space;
mod suggest;
mod target;
mod text_file;
mod verify;
mod voice;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::FromArgMatches;

use args::{Cli, Command, LogFormat};
use captive::Captives;
use console::Console;
use failure::{Exit, Outcome};
use voice::Explained;

/// Every command and option with its help, for manual pages and completions.
pub fn definition() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs one command without a terminal for questions, and returns the documented exit code. `args` begins
/// with the name of the program. Results go to `out`, errors, notes and progress to `err`. Installs signal
/// handlers while it copies or compares.
pub fn run<A: Into<OsString> + Clone>(
    args: impl IntoIterator<Item = A>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    run_on(&mut Console::new(out, err), args, |_| None)
}

/// Runs one command on the standard streams, as the binary does. `RUST_LOG` says what is logged.
pub fn run_here<A: Into<OsString> + Clone>(args: impl IntoIterator<Item = A>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    if let Some(code) = captive::exec(&args) {
        return code;
    }
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let mut console = Console::standard(&mut out, &mut err);
    console.is_program = std::env::args_os().eq(args.iter().cloned());
    if let Err(error) = interrupt::survive() {
        console.note(format_args!("watch signals: {error}"));
    }
    ExitCode::from(run_on(&mut console, args, log::start))
}

fn run_on<A: Into<OsString>>(
    console: &mut Console<'_>,
    args: impl IntoIterator<Item = A>,
    start_log: fn(Option<LogFormat>) -> Option<String>,
) -> u8 {
    let (voice, words) = voice::choose(args.into_iter().map(Into::into).collect());
    console.voice = voice;
    let taken = match voice.starts_servers() {
        true => Captives::take(&words),
        false => Ok((words.clone(), Captives::default())),
    };
    let (words, taken) = match taken {
        Ok((words, captives)) => (words, Ok(captives)),
        Err(failure) => (words, Err(failure)),
    };
    console.as_json = voice.has_notes() && wants_json(&words, "--output");
    if voice.has_notes() && wants_json(&words, "--progress") {
        console.write_lines();
    }
    let outcome = taken.and_then(|captives| run_words(console, &words, captives, start_log));
    console.end(outcome)
}

/// Runs the command line `words`, in which the URIs of `captives` stand for them.
fn run_words(
    console: &mut Console<'_>,
    words: &[OsString],
    mut captives: Captives,
    start_log: fn(Option<LogFormat>) -> Option<String>,
) -> Outcome {
    console.shown_names = captives.names();
    let parsed =
        console.definition().try_get_matches_from(words).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            return match console.voice.explain(&error, words) {
                Explained::Print(text) => console.print(&text).map(|()| Exit::Done),
                Explained::Fail(failure) => Err(failure),
            };
        }
    };
    let problem = match console.has_lines() {
        true => log::left_out(),
        false => start_log(cli.log_format),
    };
    if let Some(problem) = problem {
        console.note(problem);
    }
    let outcome = run_command(console, cli.command, &mut captives);
    captives.finish(console, outcome)
}

/// Whether the command line gives `option` the value `json`, as far as it can be seen before it is
/// understood: its own errors are objects, too.
fn wants_json(words: &[OsString], option: &str) -> bool {
    let words: Vec<_> = words.iter().take_while(|word| *word != "--").collect();
    let joined = format!("{option}=json");
    let pairs = words.iter().zip(words.iter().skip(1));
    words.iter().any(|word| **word == *joined)
        || pairs.into_iter().any(|(name, value)| **name == *option && **value == *"json")
}

fn run_command(console: &mut Console<'_>, mut command: Command, captives: &mut Captives) -> Outcome {
    console.voice.settle(&mut command)?;
    command = match command {
        Command::Plan(args) => Command::Mirror(args.dry_run()?),
        command => command,
    };
    names::settle(&mut command)?;
    captives.via(console, &mut command)?;
    console.shown_names = captives.names();
    captives.check(&mut command)?;
    if console.voice.has_notes() {
        captive::note_guesses(console, &mut command);
    }
    confine::enter(console, &command)?;
    captives.start(console)?;
    match command {
        Command::Mirror(args) => copy::mirror(console, &args),
        Command::Plan(args) => copy::mirror(console, &args.dry_run()?),
        Command::Convert(args) => copy::convert(console, &args),
        Command::Create(args) => create::run(console, &args),
        Command::Info(args) => info::run(console, &args),
        Command::Inspect(args) => inspect::run(console, &args),
        Command::Map(args) => map::run(console, &args),
        Command::Measure(args) => measure::run(console, &args),
        Command::Check(args) => check::run(console, &args),
        Command::Compare(args) => compare::run(console, &args),
        Command::Hash(args) => hash::run(console, &args),
        Command::Resize(args) => resize::run(console, &args),
        Command::Amend(args) => amend::run(console, &args),
        Command::Commit(args) => commit::run(console, &args),
        Command::Rebase(args) => rebase::run(console, &args),
        Command::Dd(args) => dd::run(console, &args),
        Command::Bench(args) => bench::run(console, &args),
        Command::Bitmap(args) => bitmap::run(console, &args),
        Command::Snapshot(args) => snapshot::run(console, &args),
        Command::Serve(args) => serve::run(console, &args),
        Command::Daemon(args) => daemon::run(console, &args),
        Command::Ctl(args) => ctl::run(console, &args),
        Command::Help(args) => help::run(console, &args),
    }
}
