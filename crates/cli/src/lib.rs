//! The `blockmirror` command, as a function: [`run`].
//!
//! The binary calls it with the process's arguments, and developer tools call it in their own process. Commands
//! hold no logic that a user of the libraries would miss: they read options, call `image` and `mirror`, and print.

#![forbid(unsafe_code)]

mod access;
mod args;
mod compare;
mod copy;
mod create;
mod failure;
mod info;
mod interrupt;
mod json;
mod map;
mod pause;
mod progress;
mod target;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use args::{Cli, Command};
use failure::{Exit, Failure, Outcome, one_line};

/// Runs one command. `args` begins with the name of the program. Prints to the standard streams, installs signal
/// handlers while it copies, and returns the documented exit code.
pub fn run<A: Into<OsString> + Clone>(args: impl IntoIterator<Item = A>) -> ExitCode {
    let outcome = match Cli::try_parse_from(args) {
        Ok(cli) => match cli.command {
            Command::Mirror(args) => copy::mirror(&args),
            Command::Convert(args) => copy::convert(&args),
            Command::Create(args) => create::run(&args),
            Command::Info(args) => info::run(&args),
            Command::Map(args) => map::run(&args),
            Command::Compare(args) => compare::run(&args),
        },
        Err(error) => explain(error),
    };
    let exit = outcome.unwrap_or_else(|failure| {
        if let Some(message) = failure.message {
            eprintln!("blockmirror: {}", one_line(&message));
        }
        failure.exit
    });
    ExitCode::from(exit.code())
}

/// Help and version as they are, everything else as one line.
fn explain(error: clap::Error) -> Outcome {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            Ok(()) => Ok(Exit::Done),
            Err(e) => Err(Failure::output(&e)),
        };
    }
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    // The reason that the value's own parser gave says what the value is.
    let reason = std::error::Error::source(&error).map(ToString::to_string);
    let message = match (text(ContextKind::InvalidArg), reason) {
        (Some(argument), Some(reason)) => format!("{argument}: {reason}"),
        // The first paragraph says what is wrong; usage and hints follow after an empty line.
        _ => {
            let rendered = error.render().to_string();
            let what: Vec<_> = rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            what.join(" ").trim_start_matches("error: ").to_owned()
        }
    };
    Err(Failure::usage(format_args!("{message} (blockmirror --help lists commands and options)")))
}

/// Writes a result to the standard output.
fn print(text: &str) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Failure::output(&e))
}

/// Tells what does not stop the command.
fn warn(what: impl Display) {
    eprintln!("blockmirror: note: {}", one_line(&what.to_string()));
}
