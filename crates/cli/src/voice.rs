//! The two voices of the command: our own, and that of `qemu-img`, whose words scripts lean on.
//!
//! One binary, one set of commands, the same functions below. What differs by the name it is called by is a
//! method of [`Voice`], with an implementation for each name: [`Own`] and [`QemuImg`]. A command asks
//! `console.voice` for its words and never which voice it is. What both say alike (the text of `info`, `map`
//! and `compare`, and all JSON) is no part of this.
//!
//! What must hold: `qemu-img` is a name, not a mode of operation. How a command treats files under it is
//! written as values of its own arguments ([`Voice::settle`]).

mod own;
mod qemu_img;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Duration;

use blockmirror_image::{Finding, Format, ImageCheck, Mending, OptionHelp};
use blockmirror_mirror::{GivenUp, GranularityChoice};
use blockmirror_ops::ConvertOutcome;

use crate::args::{BenchArgs, Command, CopyArgs, CreateArgs, Mend, ProgressArgs, ProgressStyle};
use crate::failure::{Exit, Failure, Outcome};

pub(crate) use own::Own;
pub(crate) use qemu_img::QemuImg;

/// The name that selects [`QemuImg`].
const QEMU_IMG: &str = "qemu-img";

/// What a command says, and how it ends.
pub(crate) trait Voice: Sync {
    /// What lines on the standard error begin with.
    fn program(&self) -> &'static str;

    /// Whether there are notes about what does not stop a command.
    fn has_notes(&self) -> bool;

    /// Whether brackets on the command line are captive servers.
    fn starts_servers(&self) -> bool;

    /// `text`, fit to be written to a terminal.
    fn shown(&self, text: &str) -> String;

    /// The exit code.
    fn code(&self, exit: Exit) -> u8;

    /// The message of a failure.
    fn failure(&self, failure: Failure) -> Option<String>;

    /// The definition of the command line.
    fn definition(&self) -> clap::Command;

    /// What a command line that was not understood, or that asked for help, comes to; `words` is all of it.
    fn explain(&self, error: &clap::Error, words: &[OsString]) -> Explained;

    /// Puts what goes without saying under this name into the arguments.
    ///
    /// # Errors
    /// If the command does not exist under this name.
    fn settle(&self, command: &mut Command) -> Outcome<()>;

    /// How progress is shown.
    fn progress(&self, args: &ProgressArgs, is_terminal: bool) -> ProgressStyle;

    /// What `-o help` prints.
    fn option_help(&self, format: Format, options: &[OptionHelp]) -> String;

    /// An image of `size` bytes is about to be made.
    fn creating(&self, args: &CreateArgs, size: u64) -> String;

    /// An image of `size` bytes has been made.
    fn created(&self, path: &Path, format: Format, size: u64) -> String;

    /// An image has a new size.
    fn resized(&self, path: &Path, size: u64) -> String;

    /// A copy begins.
    fn copying(&self, granularity: GranularityChoice) -> String;

    /// A copy lacks the ranges `failed`; where the source did not say what it holds, at `unmapped`, it was
    /// read.
    fn failed_ranges(&self, target: &Path, failed: &[GivenUp], unmapped: &[GivenUp]) -> Vec<String>;

    /// A bitmap is not copied: it is inconsistent.
    fn skipped_bitmap(&self, name: &str) -> String;

    /// A copy has ended.
    fn copied(&self, args: &CopyArgs, outcome: &ConvertOutcome) -> String;

    /// A finding of a check, if it is written at once; otherwise it is part of [`checked`](Self::checked).
    fn finding(&self, finding: &Finding, times: u64, mend: Option<Mend>) -> Option<String>;

    /// What a repair is about to write, if it is said at once.
    fn mending(&self, mending: &Mending) -> Option<String>;

    /// A check has ended.
    fn checked(&self, checked: &ImageCheck, findings: &[String], more: u64) -> String;

    /// What is written on the standard output after the failure of a comparison; `past_shorter`: behind the
    /// end of the shorter disk.
    fn after_failed_compare(&self, past_shorter: bool) -> &'static str;

    /// The clusters of a deleted snapshot could not be freed, for the reason `why`; this is written before
    /// the failure.
    fn not_freed(&self, why: &str) -> String;

    /// A command has done `what`; `own` is what our own voice says of it.
    fn finished(&self, what: Finished, own: String) -> String;

    /// A benchmark with steps of `step` bytes begins; `own` is what our own voice says of it.
    fn benchmark(&self, args: &BenchArgs, step: u64, own: String) -> String;

    /// A benchmark has ended; `own` is what our own voice says of it.
    fn benchmarked(&self, elapsed: Duration, own: String) -> String;

    /// An image has no metadata to check.
    fn nothing_to_check(&self, path: &Path) -> Failure;
}

/// What a command has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finished {
    /// What an image held is in its backing file.
    Committed,
    /// Something else.
    Other,
}

/// What becomes of a command line that was not understood.
pub(crate) enum Explained {
    /// It asked for this.
    Print(String),
    Fail(Failure),
}

/// The voice that the command line `words` is in, and the command line without what only selects it.
pub(crate) fn choose(mut words: Vec<OsString>) -> (&'static dyn Voice, Vec<OsString>) {
    let program = words.first().map(Path::new).and_then(Path::file_name);
    if program == Some(OsStr::new(QEMU_IMG)) {
        return (&QemuImg, words);
    }
    if words.get(1).is_some_and(|word| word == QEMU_IMG) {
        words.remove(0);
        return (&QemuImg, words);
    }
    (&Own, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(words: &[&str]) -> (&'static str, usize) {
        let (voice, words) = choose(words.iter().map(OsString::from).collect());
        (voice.program(), words.len())
    }

    #[test]
    fn the_name_selects_the_voice() {
        assert_eq!(program(&["blockmirror", "info", "qemu-img"]), ("blockmirror", 3));
        assert_eq!(program(&["/usr/bin/blockmirror", "qemu-img", "info"]), ("qemu-img", 2));
        assert_eq!(program(&["/usr/bin/qemu-img", "info", "x"]), ("qemu-img", 3));
        assert_eq!(program(&[]), ("blockmirror", 0));
    }
}
