//! Our own voice.

mod copied;
mod findings;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use blockmirror_block::size::human_size;
use blockmirror_image::{Finding, Format, ImageCheck, Mending, OptionHelp, UnknownFormat};
use blockmirror_mirror::{GivenUp, GranularityChoice};
use blockmirror_ops::ConvertOutcome;
use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::{Explained, Finished, Voice};
use crate::args::{BenchArgs, Cli, Command, CopyArgs, CreateArgs, Mend, ProgressArgs, ProgressStyle};
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::suggest::{did_you_mean, question};

/// The command under its own name.
pub(crate) struct Own;

impl Voice for Own {
    fn program(&self) -> &'static str {
        "blockmirror"
    }

    fn has_notes(&self) -> bool {
        true
    }

    fn starts_servers(&self) -> bool {
        true
    }

    fn shown(&self, text: &str) -> String {
        one_line(text)
    }

    fn code(&self, exit: Exit) -> u8 {
        exit.code()
    }

    fn failure(&self, failure: Failure) -> Option<String> {
        failure.message
    }

    fn definition(&self) -> clap::Command {
        Cli::command()
    }

    /// Help and version as they are, everything else as one line.
    fn explain(&self, error: &clap::Error, _: &[OsString]) -> Explained {
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            return Explained::Print(error.render().to_string());
        }
        match error.kind() {
            ErrorKind::MissingSubcommand => {
                return Explained::Fail(Failure::usage(
                    "no command is given (`blockmirror help` lists them)",
                ));
            }
            // The text of this one is the whole help.
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                let help = error.render().to_string();
                let usage = help.lines().find(|line| line.starts_with("Usage:")).unwrap_or_default();
                return Explained::Fail(Failure::usage(format_args!(
                    "arguments are missing; {} (see --help)",
                    usage.replacen("Usage:", "usage:", 1)
                )));
            }
            _ => {}
        }
        let text = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => Some(text.as_str()),
            _ => None,
        };
        // The reason that the value's own parser gave says what the value is.
        let source = std::error::Error::source(error);
        let format = source.and_then(|source| source.downcast_ref::<UnknownFormat>());
        let meant = format.map(|UnknownFormat(name)| did_you_mean(name, Format::ALL.map(Format::as_str)));
        let reason = source.map(|source| format!("{source}{}", meant.unwrap_or_default()));
        let message = match (text(ContextKind::InvalidArg), reason) {
            (Some(argument), Some(reason)) => {
                format!("{}: {reason}", argument.split(' ').next().unwrap_or(argument))
            }
            // The first paragraph says what is wrong; usage and hints follow after an empty line.
            _ => {
                let rendered = error.render().to_string();
                let what: Vec<_> =
                    rendered.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
                let what = what.join(" ");
                format!("{}{} (see --help)", what.trim_start_matches("error: "), meant_argument(error))
            }
        };
        Explained::Fail(Failure::usage(message))
    }

    fn settle(&self, _: &mut Command) -> Outcome<()> {
        Ok(())
    }

    fn progress(&self, args: &ProgressArgs, is_terminal: bool) -> ProgressStyle {
        match args.progress {
            ProgressStyle::Auto if args.bar => ProgressStyle::Bar,
            ProgressStyle::Auto if args.quiet => ProgressStyle::None,
            ProgressStyle::Auto if is_terminal => ProgressStyle::Bar,
            ProgressStyle::Auto => ProgressStyle::None,
            style => style,
        }
    }

    fn option_help(&self, format: Format, options: &[OptionHelp]) -> String {
        let mut out = format!("Options for {format}:\n");
        for option in options {
            let pair = format!("{}={}", option.key, option.values);
            out.push_str(&format!("  {pair:<40}  {}\n", option.help));
        }
        out
    }

    fn creating(&self, _: &CreateArgs, _: u64) -> String {
        String::new()
    }

    fn created(&self, path: &Path, format: Format, size: u64) -> String {
        let line = format!("created {}: {format}, {} ({size} bytes)", path.display(), human_size(size));
        one_line(&line) + "\n"
    }

    fn resized(&self, path: &Path, size: u64) -> String {
        one_line(&format!("resized {}: {} ({size} bytes)", path.display(), human_size(size))) + "\n"
    }

    fn copying(&self, granularity: GranularityChoice) -> String {
        format!("granularity: {granularity}\n")
    }

    fn failed_ranges(&self, target: &Path, failed: &[GivenUp], _: &[GivenUp]) -> Vec<String> {
        let line = |range: &GivenUp| {
            let (start, end) = (range.range.start(), range.range.end());
            format!("failed range: {}: bytes {start} to {end}: {}", target.display(), range.message)
        };
        failed.iter().map(line).collect()
    }

    fn skipped_bitmap(&self, name: &str) -> String {
        format!("note: bitmap \"{name}\" is inconsistent: it is not copied")
    }

    fn copied(&self, args: &CopyArgs, outcome: &ConvertOutcome) -> String {
        copied::line(args, outcome)
    }

    fn finding(&self, _: &Finding, _: u64, _: Option<Mend>) -> Option<String> {
        None
    }

    fn mending(&self, _: &Mending) -> Option<String> {
        None
    }

    fn checked(&self, checked: &ImageCheck, findings: &[String], more: u64) -> String {
        findings::verdict(checked, findings, more)
    }

    fn after_failed_compare(&self, _: bool) -> &'static str {
        ""
    }

    fn not_freed(&self, _: &str) -> String {
        String::new()
    }

    fn finished(&self, _: Finished, own: String) -> String {
        own
    }

    fn benchmark(&self, _: &BenchArgs, _: u64, own: String) -> String {
        own
    }

    fn benchmarked(&self, _: Duration, own: String) -> String {
        own
    }

    fn nothing_to_check(&self, path: &Path) -> Failure {
        Failure::failed(format_args!("check: {}: a raw image has no metadata to check", path.display()))
    }
}

/// The commands, options or values that are like the word that `error` is about, as far as there are any.
fn meant_argument(error: &clap::Error) -> String {
    use ContextKind::{SuggestedArg, SuggestedSubcommand, SuggestedValue};
    let alike =
        [SuggestedSubcommand, SuggestedArg, SuggestedValue].into_iter().find_map(|kind| error.get(kind));
    match alike {
        Some(ContextValue::String(name)) => question(&[name]),
        // The last is the one that is most alike.
        Some(ContextValue::Strings(names)) => names.last().map_or_else(String::new, |name| question(&[name])),
        _ => String::new(),
    }
}
