//! `watch --report FILE.html`: the page about one job, from the first look at it to the last.
//!
//! Fed by [`super::watch`]; the page is that of `mirror --report`.

use std::path::Path;
use std::time::{Duration, Instant};

use blockmirror_block::size::human_size;
use blockmirror_picture::{Ending, RunRecord, RunReport, Sample};

use super::end::{End, Follow};
use super::job::Job;
use super::rates::Rates;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::text_file::TextFile;

/// What is seen of a job, for its page.
pub(super) struct JobLog {
    file: TextFile,
    started: Instant,
    record: RunRecord,
    rates: Rates,
    /// What the last event was about.
    said: Option<String>,
}

impl JobLog {
    /// Begins the page at `path`, which is about one job.
    pub(super) fn begin(path: &Path, jobs: usize, interrupt: &Interrupt) -> Outcome<Self> {
        if jobs != 1 {
            return Err(Failure::usage(format_args!("--report: there are {jobs} jobs; name one")));
        }
        Ok(Self {
            file: TextFile::create(path, interrupt)?,
            started: Instant::now(),
            record: RunRecord::new(),
            rates: Rates::default(),
            said: None,
        })
    }

    /// Takes where the job stands.
    pub(super) fn take(&mut self, follow: &Follow) {
        let (at, job) = (self.started.elapsed(), &follow.job);
        if follow.end.is_none() {
            let pace = self.rates.pace(job, at);
            self.record.sample(Sample { at, done: work(job), left: job.left(), dirty_rate: pace.written });
        }
        let state = match (job.stopped_by(), job.flag("writes-through")) {
            (Some(why), _) => format!("{}: {why}", job.status()),
            (None, Some(true)) => format!("{}, writes go to both", job.status()),
            (None, _) => job.status().to_owned(),
        };
        let state = one_line(&state);
        if self.said.as_ref() != Some(&state) {
            self.record.event(at, state.as_str());
            self.said = Some(state);
        }
    }

    /// Writes the page about a job that is over, or that is not watched any more, which `outcome` says.
    pub(super) fn finish(
        mut self,
        console: &mut Console<'_>,
        socket: &Path,
        follow: &Follow,
        outcome: Outcome,
    ) -> Outcome {
        let written = self.page(socket, follow, &outcome).and_then(|page| {
            self.file.push(page.as_bytes());
            self.file.finish()
        });
        match (outcome, written) {
            (Ok(Exit::Done), Err(failure)) => Err(failure),
            (outcome, written) => {
                if let Some(message) = written.err().and_then(|failure| failure.message) {
                    console.complain(message);
                }
                outcome
            }
        }
    }

    fn page(&self, socket: &Path, follow: &Follow, outcome: &Outcome) -> Outcome<String> {
        let job = &follow.job;
        let (ending, message) = match (&follow.end, outcome) {
            (Some(End::Completed), _) => (Ending::Completed, None),
            (Some(End::Failed(error)), _) => (Ending::Failed, Some(one_line(error))),
            (Some(End::Cancelled), _) => (Ending::Interrupted, None),
            (Some(End::Unknown), _) => (Ending::Failed, Some("How it ended is not known.".to_owned())),
            (None, Err(Failure { exit: Exit::Signal(_), .. })) => (Ending::Running, None),
            (None, Err(failure)) => (Ending::Failed, failure.message.clone()),
            (None, Ok(_)) => (Ending::Running, None),
        };
        let page = RunReport {
            command: job.kind(),
            subject: &format!("job {} at {}", job.id, socket.display()),
            ending,
            message: message.as_deref(),
            elapsed: self.elapsed(),
            facts: &facts(job),
            record: &self.record,
        };
        page.page().map_err(Failure::failed)
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Bytes that the job has worked on, if the server tells; else what is behind it, holes included.
fn work(job: &Job) -> u64 {
    let known = ["copied", "zeroed", "shared"].map(|name| job.number(name));
    match known.iter().all(Option::is_some) {
        true => known.into_iter().flatten().fold(0, u64::saturating_add),
        false => job.done(),
    }
}

fn facts(job: &Job) -> Vec<(&'static str, String)> {
    let names = [
        ("copied", "copied"),
        ("zeroed", "made zero"),
        ("skipped", "skipped"),
        ("shared", "shared with the source"),
        ("dirtied", "written by the guest"),
    ];
    let known = names.into_iter().filter_map(|(key, name)| Some((name, human_size(job.number(key)?))));
    std::iter::once(("to do in all", human_size(job.total()))).chain(known).collect()
}
