//! The stream of `--progress=json`: the standard error, and nothing on it but the objects of
//! [`super::object`].
//!
//! Owned by the [`Console`](crate::console::Console), which writes what is made here; fed by the
//! [`Meter`](crate::meter::Meter). What must hold: at most one line a second about a phase, but for its
//! first, its last and another state; the last line is the object `end`, unless a signal has ended the
//! process at once.

use std::time::{Duration, Instant};

use super::object::Object;
use super::rate::RateWindow;
use super::{CopyFigures, Phase, Reading};
use crate::failure::{Exit, Outcome, object, remark};

const INTERVAL: Duration = Duration::from_secs(1);

/// What was said last, and what has to be known for the next line.
pub(crate) struct Lines {
    started: Instant,
    /// When the last line about progress was made.
    written: Option<Duration>,
    last: Option<(Phase, Reading)>,
    /// What the copy has done, also when it is verified after that.
    copy: Option<CopyFigures>,
    rate: RateWindow,
}

impl Lines {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), written: None, last: None, copy: None, rate: RateWindow::default() }
    }

    /// The line about `reading`, if one is due; one that is `wanted` always is.
    pub(crate) fn progress(&mut self, phase: Phase, reading: &Reading, wanted: bool) -> Option<String> {
        self.progress_at(self.started.elapsed(), phase, reading, wanted)
    }

    fn progress_at(
        &mut self,
        now: Duration,
        phase: Phase,
        reading: &Reading,
        wanted: bool,
    ) -> Option<String> {
        let last = self.last.replace((phase, *reading));
        self.copy = reading.copy.or(self.copy);
        // The same phase begins again for each of several images.
        if last.is_none_or(|(before, last)| before != phase || reading.offset < last.offset) {
            self.rate = RateWindow::default();
            self.written = None;
        }
        self.rate.push(now, reading.work_done);
        let is_news = last.is_some_and(|(_, last)| last.state != reading.state);
        let is_due = self.written.is_none_or(|written| now >= written + INTERVAL);
        if !wanted && !is_news && !is_due {
            return None;
        }
        self.written = Some(now);
        let rate = self.rate.rate();
        let eta = match (reading.work_left, rate) {
            (0, _) => Some(0),
            (_, None | Some(0)) => None,
            (left, Some(rate)) => Some(left.div_ceil(rate)),
        };
        let object = Object::new("progress").with("phase", phase.name()).with("state", reading.state);
        let object = self.figures(object, reading).with_some("rate", rate).with_some("eta", eta);
        Some(object.after(now).line())
    }

    /// The line about what does not end the command.
    pub(crate) fn message(class: &str, text: &str) -> String {
        Object::new("message").with_all(remark(class, text)).line()
    }

    /// The last line: how the command has ended, with the exit code `code`.
    pub(crate) fn end(&self, outcome: &Outcome, code: u8) -> String {
        let state = match outcome {
            Ok(_) => "completed",
            Err(failure) if matches!(failure.exit, Exit::Signal(_) | Exit::Resumable) => "interrupted",
            Err(_) => "failed",
        };
        let error = outcome.as_ref().err().and_then(object);
        let end = Object::new("end").with_some("phase", self.last.as_ref().map(|(phase, _)| phase.name()));
        let end = end.with("state", state).with("exit-code", code);
        let end = match &self.last {
            Some((_, reading)) => self.figures(end, reading),
            None => end,
        };
        end.after(self.started.elapsed()).with_some("error", error).line()
    }

    fn figures(&self, object: Object, reading: &Reading) -> Object {
        let object =
            object.with("done", reading.offset).with("total", reading.len).with("left", reading.work_left);
        let Some(copy) = &self.copy else { return object };
        object
            .with("copied", copy.copied)
            .with("zeroed", copy.zeroed)
            .with("skipped", copy.skipped)
            .with("shared", copy.shared)
            .with("failed", copy.failed)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::failure::Failure;

    fn parsed(line: &str) -> Value {
        assert!(line.ends_with("}\n") && line.lines().count() == 1, "{line:?}");
        serde_json::from_str(line).unwrap()
    }

    #[test]
    fn a_line_has_rate_and_time_left() {
        let mut lines = Lines::new();
        let at = |lines: &mut Lines, millis, offset| {
            let reading = Reading::of_pass(offset, 10_000);
            lines.progress_at(Duration::from_millis(millis), Phase::Hash, &reading, false)
        };
        let first = parsed(&at(&mut lines, 0, 0).unwrap());
        let want = json!({"version": 1, "event": "progress", "phase": "hash", "state": "running", "done": 0,
                          "total": 10_000, "left": 10_000, "elapsed": 0.0});
        assert_eq!(first, want);
        // A second apart, however often the figures come.
        assert_eq!((1..1000).find_map(|millis| at(&mut lines, millis, millis)), None);
        let second = parsed(&at(&mut lines, 1000, 1000).unwrap());
        assert_eq!(
            (&second["rate"], &second["eta"], &second["elapsed"]),
            (&1000.into(), &9.into(), &1.0.into())
        );
        let last = parsed(&at(&mut lines, 2000, 10_000).unwrap());
        assert_eq!((&last["left"], &last["eta"]), (&0.into(), &0.into()));
    }

    #[test]
    fn another_state_and_another_phase_are_news() {
        let mut lines = Lines::new();
        let (mut reading, zero) = (Reading::of_pass(1, 2), Duration::ZERO);
        assert!(lines.progress_at(zero, Phase::Copy, &reading, false).is_some());
        assert!(lines.progress_at(zero, Phase::Copy, &reading, false).is_none());
        assert!(lines.progress_at(zero, Phase::Copy, &reading, true).is_some());
        reading.state = "paused";
        let paused = parsed(&lines.progress_at(zero, Phase::Copy, &reading, false).unwrap());
        assert_eq!(paused["state"], "paused");
        assert!(lines.progress_at(zero, Phase::Verify, &reading, false).is_some());
    }

    #[test]
    fn an_end_says_how() {
        let mut lines = Lines::new();
        let early = parsed(&lines.end(&Err(Failure::usage("no")), 2));
        assert_eq!((&early["state"], &early["exit-code"]), (&"failed".into(), &2.into()));
        assert_eq!(early["error"], json!({"class": "usage", "message": "no", "exit-code": 2}));
        assert!(early.get("done").is_none() && early.get("phase").is_none(), "{early}");
        lines.progress(Phase::Copy, &Reading::of_pass(5, 5), false);
        let done = parsed(&lines.end(&Ok(Exit::Incomplete), 3));
        assert_eq!(
            (&done["state"], &done["exit-code"], &done["done"]),
            (&"completed".into(), &3.into(), &5.into())
        );
        let cut = parsed(&lines.end(&Err(Failure::failed("cut").exit(Exit::Signal(15))), 143));
        assert_eq!((&cut["state"], &cut["error"]["class"]), (&"interrupted".into(), &"interrupted".into()));
    }
}
