//! `--report FILE.html`: the page about a copy, written when it has ended, however that was.
//!
//! Fed by [`crate::copy`] while the job runs. The file is begun before anything is copied, so that a name
//! that cannot be written is refused early, and gets its name at the end.

use std::time::{Duration, Instant};

use blockmirror_block::size::human_size;
use blockmirror_mirror::{Event, GranularityChoice, JobState, Progress};
use blockmirror_picture::{Ending, RunRecord, RunReport, Sample};

use crate::args::CopyArgs;
use crate::console::{Console, with_names};
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::progress::Reading;
use crate::text_file::TextFile;

/// What is seen of a copy, for its page.
pub(crate) struct RunLog {
    file: TextFile,
    started: Instant,
    record: RunRecord,
    last: Option<Progress>,
    state: Option<JobState>,
    granularity: Option<GranularityChoice>,
}

impl RunLog {
    /// Begins the page that `args` asks for, if it does.
    pub(crate) fn begin(args: &CopyArgs, interrupt: &Interrupt) -> Outcome<Option<Self>> {
        let Some(path) = &args.report else { return Ok(None) };
        Ok(Some(Self {
            file: TextFile::create(path, interrupt)?,
            started: Instant::now(),
            record: RunRecord::new(),
            last: None,
            state: None,
            granularity: None,
        }))
    }

    /// The job has begun.
    pub(crate) fn granularity(&mut self, choice: GranularityChoice) {
        self.granularity = Some(choice);
    }

    /// Takes where the job stands, and what has happened since the last time.
    pub(crate) fn take(&mut self, progress: &Progress, events: &[Event]) {
        let at = self.started.elapsed();
        for event in events {
            if let Some(text) = in_words(event) {
                self.record.event(at, text);
            }
        }
        let before = self.state.replace(progress.state);
        let is_news = matches!(
            progress.state,
            JobState::Running | JobState::Paused | JobState::Ready | JobState::Standby
        );
        if is_news && before.is_some_and(|before| before != progress.state) {
            self.record.event(at, progress.state.name());
        }
        let reading = Reading::of_copy(progress);
        self.record.sample(Sample { at, done: reading.work_done, left: reading.work_left, dirty_rate: None });
        self.last = Some(*progress);
    }

    /// Takes that something else has happened.
    pub(crate) fn event(&mut self, what: &str) {
        self.record.event(self.started.elapsed(), what);
    }

    /// Writes the page about a copy that has ended with `outcome`. If that is a failure, another one here is
    /// a warning.
    pub(crate) fn finish(mut self, console: &mut Console<'_>, args: &CopyArgs, outcome: Outcome) -> Outcome {
        let elapsed = self.started.elapsed();
        let written = self.page(args, &console.shown_names, &outcome, elapsed).and_then(|page| {
            self.file.push(page.as_bytes());
            self.file.finish()
        });
        match (outcome, written) {
            (Ok(exit), Ok(())) => Ok(exit),
            (Ok(_), Err(failure)) => Err(failure),
            (Err(failed), written) => {
                if let Some(message) = written.err().and_then(|failure| failure.message) {
                    console.complain(message);
                }
                Err(failed)
            }
        }
    }

    fn page(
        &self,
        args: &CopyArgs,
        names: &[(String, String)],
        outcome: &Outcome,
        elapsed: Duration,
    ) -> Outcome<String> {
        let subject = format!("{} → {}", args.shown_sources(), args.target.to_string_lossy());
        let message = outcome.as_ref().err().and_then(|failure| failure.message.as_deref());
        let message = message.map(|message| with_names(names, message, false));
        let page = RunReport {
            command: "copy",
            subject: &with_names(names, &subject, false),
            ending: ending(outcome),
            message: message.as_deref(),
            elapsed,
            facts: &self.facts(),
            record: &self.record,
        };
        page.page().map_err(Failure::failed)
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = Vec::new();
        if let Some(granularity) = self.granularity {
            facts.push(("granularity", granularity.to_string()));
        }
        let Some(last) = &self.last else { return facts };
        facts.push(("disk", human_size(last.len)));
        for (name, bytes) in [
            ("copied", last.copied),
            ("made zero", last.zeroed),
            ("skipped", last.skipped),
            ("shared with the source", last.shared),
            ("failed", last.given_up),
        ] {
            if bytes > 0 || name == "copied" {
                facts.push((name, human_size(bytes)));
            }
        }
        facts
    }
}

fn ending(outcome: &Outcome) -> Ending {
    match outcome {
        Ok(Exit::Done) => Ending::Completed,
        Ok(_) => Ending::Incomplete,
        Err(failure) => match failure.exit {
            Exit::Signal(_) | Exit::Resumable => Ending::Interrupted,
            Exit::Mismatch => Ending::Incomplete,
            _ => Ending::Failed,
        },
    }
}

/// What is worth a line; states are compared.
fn in_words(event: &Event) -> Option<String> {
    match event {
        Event::Error { message, action, .. } => {
            Some(one_line(&format!("{message} ({})", format!("{action:?}").to_lowercase())))
        }
        Event::CopyMode { mode, reason } => Some(format!("copy mode {mode:?}: {reason}").to_lowercase()),
        _ => None,
    }
}
