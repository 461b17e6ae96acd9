//! How far a copy or comparison is, on the standard error.

use std::io::Write as _;
use std::time::{Duration, Instant};

use blockmirror_image::size::human_size;
use serde_json::json;

use crate::args::{ProgressArgs, ProgressStyle};
use crate::console::Console;

const BAR_INTERVAL: Duration = Duration::from_millis(100);
const JSON_INTERVAL: Duration = Duration::from_secs(1);
const BAR_WIDTH: usize = 30;

/// Where something stands, in bytes.
pub(crate) struct Reading {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) copied: u64,
    pub(crate) zeroed: u64,
    pub(crate) skipped: u64,
}

/// Shows readings in the style that was asked for, not more often than is useful.
pub(crate) struct Meter {
    style: ProgressStyle,
    verb: &'static str,
    started: Instant,
    shown: Option<Instant>,
    /// Characters on the line that the next bar overwrites.
    width: usize,
}

impl Meter {
    pub(crate) fn new(console: &Console<'_>, args: &ProgressArgs, verb: &'static str) -> Self {
        let style = match args.progress {
            ProgressStyle::Auto if args.bar => ProgressStyle::Bar,
            ProgressStyle::Auto if args.quiet => ProgressStyle::None,
            ProgressStyle::Auto if console.is_terminal => ProgressStyle::Bar,
            ProgressStyle::Auto => ProgressStyle::None,
            style => style,
        };
        Self { style, verb, started: Instant::now(), shown: None, width: 0 }
    }

    /// Shows `reading` if the last one is old enough, or, whatever the style, if a line of it is `wanted`.
    pub(crate) fn show(&mut self, console: &mut Console<'_>, reading: &Reading, wanted: bool) {
        if wanted {
            self.finish(console);
            let line = match self.style {
                ProgressStyle::Json => json_line(reading, self.started.elapsed()),
                _ => bar_line(reading, self.verb, self.started.elapsed()),
            };
            let _ = writeln!(console.err, "{line}").and_then(|()| console.err.flush());
            return;
        }
        let interval = match self.style {
            ProgressStyle::Json => JSON_INTERVAL,
            ProgressStyle::Bar => BAR_INTERVAL,
            ProgressStyle::Auto | ProgressStyle::None => return,
        };
        if self.shown.is_none_or(|shown| shown.elapsed() >= interval) {
            self.shown = Some(Instant::now());
            self.write(console, reading);
        }
    }

    /// Shows `reading` as the last one.
    pub(crate) fn last(&mut self, console: &mut Console<'_>, reading: &Reading) {
        if !matches!(self.style, ProgressStyle::Auto | ProgressStyle::None) {
            self.write(console, reading);
        }
        self.finish(console);
    }

    /// Gives the line back.
    pub(crate) fn finish(&mut self, console: &mut Console<'_>) {
        if self.width > 0 {
            self.width = 0;
            let _ = writeln!(console.err);
        }
    }

    fn write(&mut self, console: &mut Console<'_>, reading: &Reading) {
        let line = if self.style == ProgressStyle::Json {
            format!("{}\n", json_line(reading, self.started.elapsed()))
        } else {
            let bar = bar_line(reading, self.verb, self.started.elapsed());
            let padded = format!("\r{bar:<width$}", width = self.width);
            self.width = bar.chars().count();
            padded
        };
        // A copy does not fail because its progress cannot be shown.
        let _ = console.err.write_all(line.as_bytes()).and_then(|()| console.err.flush());
    }
}

fn json_line(reading: &Reading, elapsed: Duration) -> String {
    json!({
        "offset": reading.offset,
        "len": reading.len,
        "copied": reading.copied,
        "zeroed": reading.zeroed,
        "skipped": reading.skipped,
        "elapsed": elapsed.as_secs_f64(),
    })
    .to_string()
}

fn bar_line(reading: &Reading, verb: &str, elapsed: Duration) -> String {
    let share = if reading.len == 0 { 1.0 } else { reading.offset as f64 / reading.len as f64 };
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

    fn reading(offset: u64, len: u64) -> Reading {
        Reading { offset, len, copied: offset, zeroed: 0, skipped: 0 }
    }

    #[test]
    fn a_bar_shows_share_rate_and_time_left() {
        assert_eq!(
            bar_line(&reading(512 << 20, 1 << 30), "done", Duration::from_secs(2)),
            "[###############...............]  50.0 %  512 MiB of 1 GiB done  256 MiB/s  0:02 left"
        );
        assert_eq!(
            bar_line(&reading(0, 0), "done", Duration::ZERO),
            "[##############################] 100.0 %  0 B of 0 B done"
        );
    }

    #[test]
    fn a_json_line_is_an_object() {
        let line = json_line(&reading(5, 10), Duration::from_millis(1500));
        assert_eq!(line, r#"{"offset":5,"len":10,"copied":5,"zeroed":0,"skipped":0,"elapsed":1.5}"#);
    }
}
