//! The progress line of a terminal, drawn by `indicatif`.
//!
//! Its unit is the byte that has to be copied or zeroed: what is skipped takes no time, so neither the rate
//! nor the time left counts it. The rate is that of the last seconds. What must hold: the line fits into the
//! terminal, whatever its width.

use std::fmt::Write;

use blockmirror_block::size::human_size;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use rustix::termios::tcgetwinsize;

use crate::progress::{Reading, percent};

/// Draws a second.
const RATE: u8 = 10;

/// Columns for the figures and a bar that is worth its place; in fewer there are figures alone.
const WIDE: u16 = 72;

/// Columns of a terminal that does not tell.
const DEFAULT_WIDTH: u16 = 80;

/// The line, from its first reading until it is cleared.
pub(super) struct TerminalBar {
    drawn: Option<ProgressBar>,
    target: fn() -> ProgressDrawTarget,
    width: fn() -> u16,
}

impl TerminalBar {
    /// On the standard error.
    pub(super) fn new() -> Self {
        Self { drawn: None, target: || ProgressDrawTarget::stderr_with_hz(RATE), width: width_of_stderr }
    }

    /// Shows `reading`.
    pub(super) fn show(&mut self, reading: &Reading) {
        let (done, left) = (reading.work_done, reading.work_left);
        let style = if (self.width)() < WIDE { narrow() } else { wide() };
        let message = format!("{}% done, {} left", percent(done, left), human_size(left));
        if let Some(bar) = &self.drawn {
            bar.set_style(style);
            bar.set_length(done + left);
            bar.set_message(message);
            bar.set_position(done);
            return;
        }
        // The rate begins here: what was done before took another time, and is not to be drawn with it.
        let bar = ProgressBar::with_draw_target(Some(done + left), ProgressDrawTarget::hidden());
        let bar = bar.with_style(style).with_message(message);
        bar.set_position(done);
        bar.reset_eta();
        bar.set_draw_target((self.target)());
        bar.tick();
        self.drawn = Some(bar);
    }

    /// Gives the line back, empty.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.drawn.take() {
            bar.finish_and_clear();
        }
    }
}

fn wide() -> ProgressStyle {
    let left = |state: &ProgressState| state.len().unwrap_or(0).saturating_sub(state.pos());
    styled("[{wide_bar}] {part:>3}%  {left} left  {rate}/s  {eta}")
        .with_key("part", move |state: &ProgressState, out: &mut dyn Write| {
            let _ = write!(out, "{}", percent(state.pos(), left(state)));
        })
        .with_key("left", move |state: &ProgressState, out: &mut dyn Write| {
            let _ = out.write_str(&human_size(left(state)));
        })
        .with_key("rate", |state: &ProgressState, out: &mut dyn Write| {
            let _ = out.write_str(&human_size(state.per_sec() as u64));
        })
        .with_key("eta", |state: &ProgressState, out: &mut dyn Write| {
            // Without a rate there is none.
            let _ = match state.per_sec() as u64 {
                0 => out.write_str("ETA -"),
                _ => write!(out, "ETA {}", clock(state.eta().as_secs())),
            };
        })
        .progress_chars("##.")
}

/// The message, cut to the width.
fn narrow() -> ProgressStyle {
    styled("{wide_msg}")
}

/// A style of a template of this file, which is valid.
fn styled(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn clock(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        1..100 => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => ">99 h".to_owned(),
    }
}

fn width_of_stderr() -> u16 {
    let columns = tcgetwinsize(std::io::stderr()).map_or(0, |size| size.ws_col);
    if columns == 0 { DEFAULT_WIDTH } else { columns }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::io;

    use indicatif::TermLike;

    use super::*;

    thread_local! {
        static WIDTH: Cell<u16> = const { Cell::new(0) };
        static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    }

    /// A terminal that keeps each line that is drawn on it. Each test has a thread, and so a terminal, of its
    /// own.
    #[derive(Debug)]
    struct Screen;

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            WIDTH.get()
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            LINES.with_borrow_mut(|lines| lines.push(text.to_owned()));
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is drawn for a reading on a terminal of `width` columns; the last line with text on it.
    fn drawn(width: u16, done: u64, left: u64) -> String {
        WIDTH.set(width);
        let mut bar = TerminalBar {
            drawn: None,
            target: || ProgressDrawTarget::term_like(Box::new(Screen)),
            width: || WIDTH.get(),
        };
        bar.show(&Reading { work_done: done, work_left: left, ..Reading::of_pass(0, 0) });
        if let Some(bar) = &bar.drawn {
            bar.force_draw();
        }
        let lines = LINES.take();
        assert!(lines.iter().all(|line| line.chars().count() <= width.into()), "{width}: {lines:?}");
        lines.into_iter().rfind(|line| !line.trim().is_empty()).unwrap_or_default()
    }

    #[test]
    fn the_line_is_never_wider_than_the_terminal() {
        let largest = u64::MAX / 4;
        for width in 1..200 {
            for (done, left) in [(0, 0), (512 << 20, 512 << 20), (largest, 1023 << 30), (0, largest)] {
                drawn(width, done, left);
            }
        }
    }

    #[test]
    fn a_bar_says_what_is_left() {
        let line = drawn(100, 512 << 20, 512 << 20);
        assert!(line.starts_with("[####") && line.contains("....]  50%  512 MiB left  "), "{line}");
        assert_eq!(drawn(40, 512 << 20, 512 << 20).trim(), "50% done, 512 MiB left");
        assert_eq!(drawn(10, 512 << 20, 512 << 20), "50% done,");
        assert_eq!(drawn(40, 0, 0).trim(), "100% done, 0 B left");
    }

    #[test]
    fn a_time_left_is_short() {
        let texts: Vec<_> = [0, 61, 3600, 359_999, 360_000, u64::MAX].map(clock).into();
        assert_eq!(texts, ["0:00", "1:01", "1:00:00", "99:59:59", ">99 h", ">99 h"]);
    }
}
