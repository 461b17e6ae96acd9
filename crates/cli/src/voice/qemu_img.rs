//! The voice of `qemu-img` 10.0.
//!
//! Its words were learnt by running it. Where scripts lean on them (results, `Formatting`, progress, the
//! lines of errors that are matched) they are the same to the letter; help texts are ours.

mod definition;
mod findings;
mod formatting;
mod help;
mod salvage;
mod usage;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use blockmirror_image::{Finding, Format, ImageCheck, Mending, OptionHelp};
use blockmirror_mirror::{GivenUp, GranularityChoice};
use blockmirror_ops::ConvertOutcome;

use super::{Explained, Finished, Voice};
use crate::args::{BenchArgs, Command, CopyArgs, CreateArgs, Mend, ProgressArgs, ProgressStyle};
use crate::failure::{Exit, Failure, Outcome, one_line};

/// The command under the name `qemu-img`.
pub(crate) struct QemuImg;

impl Voice for QemuImg {
    fn program(&self) -> &'static str {
        "qemu-img"
    }

    fn has_notes(&self) -> bool {
        false
    }

    fn starts_servers(&self) -> bool {
        false
    }

    /// Some messages have several lines.
    fn shown(&self, text: &str) -> String {
        text.split('\n').map(one_line).collect::<Vec<_>>().join("\n")
    }

    fn code(&self, exit: Exit) -> u8 {
        match exit {
            Exit::Usage => Exit::Failed.code(),
            // What `--salvage` lost is no failure.
            Exit::Incomplete => Exit::Done.code(),
            Exit::NotMapped => 3,
            Exit::NotRead => 4,
            exit => exit.code(),
        }
    }

    fn failure(&self, failure: Failure) -> Option<String> {
        failure.in_qemu.or(failure.message)
    }

    fn definition(&self) -> clap::Command {
        definition::command()
    }

    fn explain(&self, error: &clap::Error, words: &[OsString]) -> Explained {
        usage::explain(error, words)
    }

    fn settle(&self, command: &mut Command) -> Outcome<()> {
        definition::settle(command)
    }

    fn progress(&self, args: &ProgressArgs, _: bool) -> ProgressStyle {
        if args.bar && !args.quiet { ProgressStyle::Percent } else { ProgressStyle::None }
    }

    fn option_help(&self, format: Format, options: &[OptionHelp]) -> String {
        help::options(format, options)
    }

    fn creating(&self, args: &CreateArgs, size: u64) -> String {
        formatting::line(args, size)
    }

    fn created(&self, _: &Path, _: Format, _: u64) -> String {
        String::new()
    }

    fn resized(&self, _: &Path, _: u64) -> String {
        "Image resized.\n".to_owned()
    }

    fn copying(&self, _: GranularityChoice) -> String {
        String::new()
    }

    fn failed_ranges(&self, _: &Path, failed: &[GivenUp], unmapped: &[GivenUp]) -> Vec<String> {
        salvage::lines(failed, unmapped)
    }

    fn skipped_bitmap(&self, name: &str) -> String {
        format!("warning: Skipping inconsistent bitmap '{name}'")
    }

    fn copied(&self, _: &CopyArgs, _: &ConvertOutcome) -> String {
        String::new()
    }

    fn finding(&self, finding: &Finding, times: u64, mend: Option<Mend>) -> Option<String> {
        Some(findings::line(finding, times, mend))
    }

    fn mending(&self, mending: &Mending) -> Option<String> {
        findings::mending(mending)
    }

    fn checked(&self, checked: &ImageCheck, _: &[String], _: u64) -> String {
        findings::verdict(&checked.report)
    }

    fn after_failed_compare(&self, past_shorter: bool) -> &'static str {
        if past_shorter { "Warning: Image size mismatch!\n" } else { "" }
    }

    fn not_freed(&self, why: &str) -> String {
        format!("qcow2_free_clusters failed: {why}\n")
    }

    fn finished(&self, what: Finished, _: String) -> String {
        match what {
            Finished::Committed => "Image committed.\n".to_owned(),
            Finished::Other => String::new(),
        }
    }

    fn benchmark(&self, args: &BenchArgs, step: u64, _: String) -> String {
        let verb = if args.write { "write" } else { "read" };
        let mut text = format!(
            "Sending {} {verb} requests, {} bytes each, {} in parallel (starting at offset {}, step size {step})\n",
            args.count, args.buffer_size, args.depth, args.offset
        );
        if args.flush_interval > 0 {
            text += &format!("Sending flush every {} requests\n", args.flush_interval);
        }
        text
    }

    fn benchmarked(&self, elapsed: Duration, _: String) -> String {
        format!("Run completed in {:.3} seconds.\n", elapsed.as_secs_f64())
    }

    fn nothing_to_check(&self, _: &Path) -> Failure {
        Failure::failed("This image format does not support checks")
    }
}
