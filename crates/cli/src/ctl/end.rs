//! The ends of jobs: asking for one, and waiting for it.

use std::time::{Duration, Instant};

use blockmirror_qmp::Client;
use blockmirror_qmp::client::ReceivedEvent;
use serde_json::{Value, json};

use super::added::Added;
use super::job::{Job, list};
use super::{of_job, pick};
use crate::args::CompleteArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;

/// How long a wait for an event goes without a look at signals.
const GLANCE: Duration = Duration::from_millis(100);

/// How a job has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Completed,
    Failed(String),
    /// Given up on request.
    Cancelled,
    /// It is gone, and how it ended is unknown.
    Unknown,
}

/// What has been heard of one job.
#[derive(Debug)]
pub(super) struct Follow {
    pub(super) job: Job,
    /// How it ended, as soon as that is known.
    pub(super) end: Option<End>,
    /// Whether it is over and everything that was its is free again.
    pub(super) over: bool,
    /// What was said of the error that it met last, where the server says it.
    met: Option<String>,
    /// Whether it has come to another state since its figures were taken.
    stale: bool,
}

impl Follow {
    pub(super) fn new(job: Job) -> Self {
        let mut follow = Self { job, end: None, over: false, met: None, stale: false };
        follow.look();
        follow
    }

    /// What the figures say of the end, for a client that missed the event.
    fn look(&mut self) {
        let concluded = self.job.status() == "concluded";
        if self.end.is_none() {
            self.end = match self.job.error() {
                Some("Operation canceled") => Some(End::Cancelled),
                Some(error) => Some(End::Failed(error.to_owned())),
                None => concluded.then_some(End::Completed),
            };
        }
        // One that vanishes by itself does so in a moment.
        self.over |= concluded && self.job.flag("auto-dismiss") != Some(true);
    }

    fn is_gone(&mut self) {
        self.end.get_or_insert(End::Unknown);
        (self.over, self.stale) = (true, false);
    }

    /// Takes an event.
    pub(super) fn hear(&mut self, event: &ReceivedEvent) {
        let text = |key| event.data.get(key).and_then(Value::as_str);
        match event.name.as_str() {
            "BLOCK_JOB_ERROR" if text("device") == Some(&self.job.id) => {
                self.met = text("message").map(str::to_owned);
            }
            "BLOCK_JOB_COMPLETED" if text("device") == Some(&self.job.id) => {
                self.end = Some(match text("error") {
                    // The system's words alone do not say which disk it was.
                    Some(error) => End::Failed(match &self.met {
                        Some(met) if !error.contains(met) => format!("{error} ({met})"),
                        _ => error.to_owned(),
                    }),
                    None => End::Completed,
                });
            }
            "BLOCK_JOB_CANCELLED" if text("device") == Some(&self.job.id) => self.end = Some(End::Cancelled),
            "JOB_STATUS_CHANGE" if text("id") == Some(&self.job.id) => match text("status") {
                Some("null") => self.is_gone(),
                status => {
                    self.stale = true;
                    // It was resumed, and what stopped it is over.
                    if status == Some("running") {
                        self.met = None;
                    }
                }
            },
            _ => {}
        }
    }

    /// What to tell people of the end.
    pub(super) fn verdict(&self) -> String {
        let id = &self.job.id;
        match &self.end {
            Some(End::Completed) => format!("{id}: completed"),
            Some(End::Failed(error)) => format!("{id}: failed: {error}"),
            Some(End::Cancelled) => format!("{id}: aborted"),
            Some(End::Unknown) | None => format!("{id}: gone, how it ended is not known"),
        }
    }
}

/// `complete`: pivot, or with `--keep-source` a copy of one instant.
pub(super) fn complete(console: &mut Console<'_>, client: &mut Client, args: &CompleteArgs) -> Outcome {
    complete_until(console, client, args, &Interrupt::watch()?)
}

/// The same, until `interrupt`.
pub(super) fn complete_until(
    console: &mut Console<'_>,
    client: &mut Client,
    args: &CompleteArgs,
    interrupt: &Interrupt,
) -> Outcome {
    let jobs = pick(list(client)?, &args.jobs.jobs)?;
    // Of all jobs, before any is touched.
    for job in &jobs {
        can_complete(job, args)?;
    }
    let mut following: Vec<_> = jobs.into_iter().map(Follow::new).collect();
    let mut said: Vec<_> = following.iter().map(|_| Said::default()).collect();
    loop {
        for (follow, said) in following.iter_mut().zip(&mut said) {
            step(console, client, args, follow, said)?;
        }
        if following.iter().all(|follow| follow.over) {
            break;
        }
        next(client, &mut following, Duration::MAX, interrupt)?;
    }
    let how = match args.keep_source {
        true => "the target is a copy, its users stay on the source",
        false => "users of the source are on the target",
    };
    let verdicts = following.iter().zip(&said).map(|(follow, said)| match &follow.end {
        Some(End::Completed) if said.end && follow.job.kind() == "mirror" => {
            Ok(format!("{}; {how}", follow.verdict()))
        }
        Some(End::Completed) => Ok(follow.verdict()),
        _ => Err(follow.verdict()),
    });
    let exit = report(console, verdicts)?;
    for (follow, said) in following.iter().zip(&said) {
        let has_not_pivoted = match follow.end {
            Some(End::Completed) => args.keep_source && said.end,
            Some(End::Failed(_) | End::Cancelled) => true,
            Some(End::Unknown) | None => false,
        };
        if has_not_pivoted && follow.job.kind() == "mirror" {
            Added::close_target(console, client, &follow.job.id)?;
        }
    }
    Ok(exit)
}

/// What was said about one job.
#[derive(Default)]
struct Said {
    /// To the server: end.
    end: bool,
    /// To the user: it is paused.
    paused: bool,
    /// By the server: that it cannot be finalized.
    refused: Option<Failure>,
}

/// Refuses what cannot be completed, or not yet.
fn can_complete(job: &Job, args: &CompleteArgs) -> Outcome<()> {
    let id = &job.id;
    let refuse = |why: String| Err(Failure::failed(format!("{id}: {why}")));
    match job.status() {
        "standby" => refuse("paused; `resume` it first".into()),
        "paused" => refuse("paused, and not ready; `resume` it first".into()),
        "pending" | "waiting" if args.keep_source => refuse("about to end: its outcome is decided".into()),
        "ready" | "pending" | "waiting" => Ok(()),
        "concluded" | "aborting" | "null" => refuse(format!("over ({})", job.status())),
        _ if args.wait => Ok(()),
        _ if !matches!(job.kind(), "mirror" | "commit") => {
            refuse(format!("a {} job ends by itself; --wait waits for that", job.kind()))
        }
        _ => {
            let left = blockmirror_block::size::human_size(job.left());
            refuse(format!("not ready, {left} left; --wait waits until it is"))
        }
    }
}

/// Does what is due for one job.
fn step(
    console: &mut Console<'_>,
    client: &mut Client,
    args: &CompleteArgs,
    follow: &mut Follow,
    said: &mut Said,
) -> Outcome<()> {
    let id = follow.job.id.clone();
    match follow.job.status() {
        _ if follow.end.is_some() => {}
        "ready" if !said.end => {
            said.end = true;
            let (command, arguments) = match args.keep_source {
                true => ("block-job-cancel", json!({"device": id})),
                false => ("job-complete", json!({"id": id})),
            };
            client.execute(command, arguments).map_err(|e| of_job(&follow.job, e))?;
        }
        // It does not finalize by itself: this finalizes it.
        "pending" if follow.job.flag("auto-finalize") == Some(false) => {
            if let Some(refused) = said.refused.take() {
                return Err(refused);
            }
            if let Err(error) = client.execute("job-finalize", json!({"id": id})) {
                // With the first of a group QEMU ends all: it may be pending no more.
                said.refused = Some(of_job(&follow.job, error));
                follow.stale = true;
            }
        }
        "paused" | "standby" if !said.paused => {
            let why = follow.job.stopped_by().unwrap_or("paused");
            console.note(format_args!("{id}: {why}; `resume` continues it"));
        }
        _ => {}
    }
    said.paused = follow.job.is_paused();
    Ok(())
}

/// `abort`.
pub(super) fn abort(console: &mut Console<'_>, client: &mut Client, names: &[String]) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let mut following: Vec<_> = pick(list(client)?, names)?.into_iter().map(Follow::new).collect();
    if let Some(over) = following.iter().find(|follow| follow.end.is_some()) {
        return Err(Failure::failed(format_args!("{}: over already", over.job.id)));
    }
    for follow in &following {
        client.execute("job-cancel", json!({"id": follow.job.id})).map_err(|e| of_job(&follow.job, e))?;
    }
    while !following.iter().all(|follow| follow.over) {
        next(client, &mut following, Duration::MAX, &interrupt)?;
    }
    let verdicts = following.iter().map(|follow| match (&follow.end, follow.job.kind()) {
        (Some(End::Cancelled), "mirror") => Ok(format!("{}; the target is of no use", follow.verdict())),
        (Some(End::Cancelled), _) => Ok(follow.verdict()),
        _ => Err(follow.verdict()),
    });
    let exit = report(console, verdicts)?;
    let aborted = following.iter().filter(|follow| follow.end == Some(End::Cancelled));
    for follow in aborted.filter(|follow| follow.job.kind() == "mirror") {
        Added::close_target(console, client, &follow.job.id)?;
    }
    Ok(exit)
}

/// Waits until one of the jobs is in another state or `limit` is over, and takes new figures.
///
/// # Errors
/// Interrupted, or the session is over.
pub(super) fn next(
    client: &mut Client,
    following: &mut [Follow],
    limit: Duration,
    interrupt: &Interrupt,
) -> Outcome<()> {
    let start = Instant::now();
    while start.elapsed() < limit && !following.iter().any(|follow| follow.stale) {
        if interrupt.requested() {
            let message = "interrupted; requests already sent stay in effect";
            return Err(Failure::failed(message).exit(interrupt.exit()));
        }
        let over = following.iter().filter(|follow| follow.over).count();
        if let Some(event) = client.next_event(GLANCE.min(limit))? {
            following.iter_mut().for_each(|follow| follow.hear(&event));
        }
        if over != following.iter().filter(|follow| follow.over).count() {
            break;
        }
    }
    refresh(client, following)
}

/// Takes new figures.
fn refresh(client: &mut Client, following: &mut [Follow]) -> Outcome<()> {
    let jobs = list(client)?;
    let find = |follow: &Follow| jobs.iter().find(|job| job.id == follow.job.id);
    for follow in following.iter_mut().filter(|follow| !follow.over) {
        if let Some(job) = find(follow) {
            follow.job = job.clone();
            follow.stale = false;
            follow.look();
        }
    }
    // How one that the list does not show any more has ended was reported before.
    while let Some(event) = client.next_event(Duration::ZERO)? {
        following.iter_mut().for_each(|follow| follow.hear(&event));
    }
    following.iter_mut().filter(|follow| find(follow).is_none()).for_each(Follow::is_gone);
    Ok(())
}

/// Tells how each job has ended, those that did not end well to the people.
fn report(console: &mut Console<'_>, verdicts: impl Iterator<Item = Result<String, String>>) -> Outcome {
    let (mut exit, mut printed) = (Exit::Done, Ok(()));
    for verdict in verdicts {
        match verdict {
            Ok(verdict) => printed = printed.and(console.print(&format!("{}\n", one_line(&verdict)))),
            Err(verdict) => {
                console.complain(verdict);
                exit = Exit::Failed;
            }
        }
    }
    printed.map(|()| exit)
}
