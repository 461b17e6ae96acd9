//! How far a copy or comparison is, on the standard error.
//!
//! A terminal has a line that is drawn anew ([`bar`]); without one, a line of the same disk is written where
//! it is asked for (`-p`, SIGUSR1), and an object a line with `--progress=json` ([`lines`]).

mod bar;
mod lines;
mod object;
mod rate;

use std::io::Write as _;
use std::time::{Duration, Instant};

use blockmirror_block::size::human_size;
use blockmirror_mirror::Progress;

use self::bar::TerminalBar;

pub(crate) use lines::Lines;
pub(crate) use object::Object;
pub(crate) use rate::RateWindow;

use crate::args::{ProgressArgs, ProgressStyle};
use crate::console::Console;

const BAR_INTERVAL: Duration = Duration::from_millis(100);
const BAR_WIDTH: usize = 30;

/// What is being done, of which readings tell how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Copy,
    Verify,
    Commit,
    Rebase,
    Compare,
    Check,
    Amend,
    Hash,
}

impl Phase {
    /// For programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Verify => "verify",
            Self::Commit => "commit",
            Self::Rebase => "rebase",
            Self::Compare => "compare",
            Self::Check => "check",
            Self::Amend => "amend",
            Self::Hash => "hash",
        }
    }

    /// What has been done to the bytes, for people.
    fn verb(self) -> &'static str {
        match self {
            Self::Copy | Self::Commit => "done",
            Self::Verify => "verified",
            Self::Rebase | Self::Compare => "compared",
            Self::Check => "checked",
            Self::Amend => "amended",
            Self::Hash => "hashed",
        }
    }
}

/// Where something stands, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// What has been copied, shared, zeroed or given up.
    work_done: u64,
    /// What is still to be copied or zeroed, as far as that is known.
    work_left: u64,
    /// QEMU's name of the state of a job.
    state: &'static str,
    /// Of a copy.
    copy: Option<CopyFigures>,
}

/// What became of the bytes that a copy has dealt with.
#[derive(Clone, Copy, Debug)]
struct CopyFigures {
    copied: u64,
    zeroed: u64,
    skipped: u64,
    shared: u64,
    failed: u64,
}

impl Reading {
    /// Where a copy stands. Of the part of the source that the scan has not reached, as much is counted as
    /// left to copy as of the part that it has.
    pub(crate) fn of_copy(progress: &Progress) -> Self {
        let work_done = progress.copied + progress.shared + progress.zeroed + progress.given_up;
        let known = progress.len.saturating_sub(progress.offset).saturating_sub(progress.bulk_left);
        let scanned = progress.len.saturating_sub(progress.bulk_left);
        let share = if scanned == 0 { 1.0 } else { (work_done + known) as f64 / scanned as f64 };
        let work_left = known + (progress.bulk_left as f64 * share.min(1.0)) as u64;
        Self {
            offset: progress.offset,
            len: progress.len,
            work_done,
            work_left,
            state: progress.state.name(),
            copy: Some(CopyFigures {
                copied: progress.copied,
                zeroed: progress.zeroed,
                skipped: progress.skipped,
                shared: progress.shared,
                failed: progress.given_up,
            }),
        }
    }

    /// Where a pass over `len` bytes stands that has come to `offset`.
    pub(crate) fn of_pass(offset: u64, len: u64) -> Self {
        let work_left = len.saturating_sub(offset);
        Self { offset, len, work_done: offset, work_left, state: "running", copy: None }
    }
}

impl Reading {
    /// Where `phase` stands, for a service manager.
    pub(crate) fn status(&self, phase: Phase) -> String {
        let percent = bar::percent(self.work_done, self.work_left);
        format!("{}: {percent}% done, {} left", phase.name(), human_size(self.work_left))
    }

    /// What is still to be copied or zeroed, as far as that is known.
    pub(crate) fn work_left(&self) -> u64 {
        self.work_left
    }

    /// How much of it is behind, from 0 to 1.
    fn share(&self) -> f64 {
        if self.len == 0 { 1.0 } else { self.offset as f64 / self.len as f64 }
    }
}

/// Shows readings in the style that was asked for, not more often than is useful.
pub(crate) struct Meter {
    style: ProgressStyle,
    phase: Phase,
    started: Instant,
    shown: Option<Instant>,
    /// Characters on the line that the next bar overwrites.
    width: usize,
    /// What QEMU's line shows.
    percent: Option<f64>,
    /// The line of a terminal.
    terminal: Option<TerminalBar>,
}

impl Meter {
    pub(crate) fn new(console: &Console<'_>, args: &ProgressArgs, phase: Phase) -> Self {
        let style = console.voice.progress(args, console.is_terminal);
        let terminal = (console.is_terminal && style == ProgressStyle::Bar).then(TerminalBar::new);
        Self { style, phase, started: Instant::now(), shown: None, width: 0, percent: None, terminal }
    }

    /// Shows `reading` if the last one is old enough, or, whatever the style, if a line of it is `wanted`.
    pub(crate) fn show(&mut self, console: &mut Console<'_>, reading: &Reading, wanted: bool) {
        console.progress(self.phase, reading, wanted);
        if self.style == ProgressStyle::Json {
            return;
        }
        if wanted {
            self.finish(console);
            let line = match self.style {
                ProgressStyle::Percent => percent_line(reading.share() * 100.0),
                _ => self.bar_line(reading),
            };
            let _ = writeln!(console.err, "{line}").and_then(|()| console.err.flush());
            return;
        }
        if let Some(bar) = &mut self.terminal {
            return bar.show(reading);
        }
        if self.style == ProgressStyle::Percent {
            return self.percent(console, reading.share() * 100.0);
        }
        let is_due = self.shown.is_none_or(|shown| shown.elapsed() >= BAR_INTERVAL);
        if self.style == ProgressStyle::Bar && is_due {
            self.shown = Some(Instant::now());
            self.write(console, reading);
        }
    }

    /// Shows `reading` as the last one.
    pub(crate) fn last(&mut self, console: &mut Console<'_>, reading: &Reading) {
        console.progress(self.phase, reading, true);
        match self.style {
            ProgressStyle::Percent => self.percent(console, 100.0),
            ProgressStyle::Bar if self.terminal.is_none() => self.write(console, reading),
            _ => {}
        }
        self.finish(console);
    }

    /// Gives the line back.
    pub(crate) fn finish(&mut self, console: &mut Console<'_>) {
        if let Some(bar) = &mut self.terminal {
            bar.clear();
        }
        if self.width > 0 {
            self.width = 0;
            let _ = writeln!(console.err);
        }
        if self.percent.take().is_some() {
            console.report("\n");
        }
    }

    /// Shows QEMU's line where it has changed by one percent or is at its end.
    fn percent(&mut self, console: &mut Console<'_>, percent: f64) {
        if self.percent.is_none() && percent > 0.0 {
            self.percent(console, 0.0);
        }
        if self.percent.is_none_or(|last| percent >= last + 1.0 || percent >= 100.0 && last < 100.0) {
            self.percent = Some(percent);
            console.report(&format!("{}\r", percent_line(percent)));
        }
    }

    fn write(&mut self, console: &mut Console<'_>, reading: &Reading) {
        let bar = self.bar_line(reading);
        let padded = format!("\r{bar:<width$}", width = self.width);
        self.width = bar.chars().count();
        // A copy does not fail because its progress cannot be shown.
        let _ = console.err.write_all(padded.as_bytes()).and_then(|()| console.err.flush());
    }

    fn bar_line(&self, reading: &Reading) -> String {
        bar_line(reading, self.phase.verb(), self.started.elapsed())
    }
}

fn percent_line(percent: f64) -> String {
    format!("    ({percent:.2}/100%)")
}

fn bar_line(reading: &Reading, verb: &str, elapsed: Duration) -> String {
    let share = reading.share();
    let filled = ((share * BAR_WIDTH as f64) as usize).min(BAR_WIDTH);
    let bar = format!("{}{}", "#".repeat(filled), ".".repeat(BAR_WIDTH - filled));
    let mut line = format!(
        "[{bar}] {:5.1} %  {} of {} {verb}",
        share * 100.0,
        human_size(reading.offset),
        human_size(reading.len)
    );
    let seconds = elapsed.as_secs_f64();
    if seconds >= 1.0 {
        let rate = reading.offset as f64 / seconds;
        line.push_str(&format!("  {}/s", human_size(rate as u64)));
        if share < 1.0 && rate >= 1.0 {
            let left = (reading.len.saturating_sub(reading.offset) as f64 / rate) as u64;
            line.push_str(&format!("  {}:{:02} left", left / 60, left % 60));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_shows_share_rate_and_time_left() {
        assert_eq!(
            bar_line(&Reading::of_pass(512 << 20, 1 << 30), "done", Duration::from_secs(2)),
            "[###############...............]  50.0 %  512 MiB of 1 GiB done  256 MiB/s  0:02 left"
        );
        assert_eq!(
            bar_line(&Reading::of_pass(0, 0), "done", Duration::ZERO),
            "[##############################] 100.0 %  0 B of 0 B done"
        );
    }
}
