//! How far a copy or comparison is, on the standard error.
//!
//! A terminal has a line that is drawn anew ([`bar`]); without one, a line of the same disk is written where
//! it is asked for (`-p`, SIGUSR1). Programs get objects ([`crate::progress`]).

mod bar;

use std::io::Write as _;
use std::time::{Duration, Instant};

use blockmirror_block::size::human_size;

use self::bar::TerminalBar;

use crate::args::{ProgressArgs, ProgressStyle};
use crate::console::Console;
use crate::progress::{Phase, Reading};

const BAR_INTERVAL: Duration = Duration::from_millis(100);
const BAR_WIDTH: usize = 30;

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
