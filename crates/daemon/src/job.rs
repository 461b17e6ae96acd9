//! Jobs by name, and how their events become those of the protocol.
//!
//! Each job has a thread, the *event pump*, that takes its events in order, changes the graph as the end of
//! the job asks for, and only then reports to monitors. What `query-jobs` shows of a job is what the pump has
//! reported, so that a client that polls sees nothing that one that listens has not been sent.
//!
//! What must hold:
//! - `BLOCK_JOB_COMPLETED` is sent after exports have moved and nodes are free again.
//! - A job's state, its place in the table, and the events about them change in one step, under the table's
//!   lock, under which queries are answered too. The events of an end are one step: on `BLOCK_JOB_COMPLETED`
//!   a job that vanishes by itself is out of the table.

mod chain;
mod claims;
mod live_log;
mod log;
mod mirror;
mod resume;
mod simple;
mod summary;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use std::{fmt, io};

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_mirror::{CopyMode, ErrorAction, Event, IoStatus, JobState, Progress, Refused, Verb};
use blockmirror_qmp::{ErrorClass, QmpError, Session};
use serde_json::{Value, json};
use tracing::{Span, error};

use crate::Reply;
use crate::context::Context;
use crate::events;
use crate::ids::is_well_formed;

pub(crate) use chain::ChainRequest;
pub(crate) use claims::Claims;
use live_log::FileLog;
pub(crate) use log::job_span;
pub(crate) use mirror::{MirrorRequest, Prepared};
pub(crate) use simple::SimpleJob;
pub use summary::JobSummary;

/// How long a dismissed job may take to be gone.
const DISMISS_LIMIT: Duration = Duration::from_secs(5);

/// The number of the next job.
static NEXT_JOB: AtomicU64 = AtomicU64::new(0);

/// What is said of a job that was cancelled.
pub(crate) const CANCELLED: &str = "Operation canceled";

/// A command to a job.
#[derive(Clone, Copy, Debug)]
pub(crate) enum JobCommand {
    /// `force` or not.
    Cancel(bool),
    Pause,
    Resume,
    SetSpeed(u64),
    Change(CopyMode),
    Complete,
    Finalize,
    Dismiss,
}

/// What a job shows of itself.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) busy: bool,
    pub(crate) io_status: IoStatus,
    /// More, of a mirror; also of a commit that is one.
    pub(crate) mirror: Option<Progress>,
}

/// A handle of a job of any kind.
pub(crate) trait JobHandle: Send + Sync + fmt::Debug {
    /// The figures at this moment.
    fn figures(&self) -> Figures;

    /// Gives the job a command.
    fn request(&self, command: JobCommand) -> Result<(), Refused>;

    /// The node that it fills, if it can go on with that opened anew.
    fn target(&self) -> Option<&str> {
        None
    }

    /// The process is about to end: a log of it stays valid.
    fn keep_log(&self) {}

    /// What was written to the target and not flushed may be lost: it is written again.
    fn writes_lost(&self) {}

    /// Why the job fails, from the moment it is *aborting*.
    fn failure(&self) -> Option<String>;

    /// The next event; waits for it for at most `timeout`. `None` if none came, or none will.
    fn next_event(&self, timeout: Option<Duration>) -> Option<Event>;
}

/// What the end of a job does, before monitors learn of it.
pub(crate) type AtEnd = Box<dyn FnOnce(&Context) + Send>;

/// A job in the table.
pub(crate) struct Job {
    pub(crate) id: String,
    /// Its type's wire name.
    pub(crate) kind: &'static str,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    span: Span,
    /// Order of appearance.
    number: u64,
    handle: Box<dyn JobHandle>,
    speed: AtomicU64,
    reported: Mutex<Reported>,
    changed: Condvar,
    at_end: Mutex<Option<AtEnd>>,
    /// Held while a command resumes it.
    resuming: Mutex<()>,
}

/// What has been reported to monitors.
#[derive(Debug)]
struct Reported {
    state: JobState,
    error: Option<String>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("id", &self.id).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// What a new job gets to know about itself.
#[derive(Clone, Debug)]
pub(crate) struct JobOptions {
    pub(crate) id: String,
    pub(crate) kind: &'static str,
    pub(crate) speed: u64,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    /// What the threads of the job log belongs to it.
    pub(crate) span: Span,
}

/// Jobs by id.
///
/// *Guards*: which jobs there are, what of them has been reported, and the order in which events about them
/// are sent. *Order*: before a job's `reported`, before the locks of the job's own machine and of the
/// monitors' queues. *Not under it*: the end of a job ([`AtEnd`]), the graph, I/O.
#[derive(Debug)]
pub(crate) struct Jobs {
    context: Arc<Context>,
    table: Mutex<BTreeMap<String, Arc<Job>>>,
    /// Jobs that are about to start. *Order*: before the table.
    reserved: Arc<Mutex<ReservedIds>>,
}

/// The names of jobs that are about to start, and how each gets to the thread that is to report its events.
type ReservedIds = BTreeMap<String, Sender<Arc<Job>>>;

/// The name of a job that is about to start; no other job gets it until this is dropped.
#[derive(Debug)]
#[must_use = "the name is free as soon as this is dropped"]
pub(crate) struct ReservedId {
    id: String,
    reserved: Arc<Mutex<ReservedIds>>,
}

impl Drop for ReservedId {
    fn drop(&mut self) {
        self.reserved.lock().remove(&self.id);
    }
}

impl Jobs {
    /// No jobs; they work on nodes of `context`.
    pub(crate) fn new(context: Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context, table: Mutex::default(), reserved: Arc::default() })
    }

    /// Reserves `id` for a new job, until that is in the table, and a thread that is to report its events:
    /// a job that nothing reports would end without what its end does, a pivot of the graph for example.
    ///
    /// # Errors
    /// It is no identifier, another job has it, or there is no thread.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Reply<ReservedId> {
        self.reserve_on(id, |name, work| thread::Builder::new().name(name).spawn(work).map(drop))
    }

    fn reserve_on(
        self: &Arc<Self>,
        id: &str,
        spawn: impl FnOnce(String, Box<dyn FnOnce() + Send>) -> io::Result<()>,
    ) -> Reply<ReservedId> {
        if !is_well_formed(id) {
            return Err(QmpError::generic(format!("Invalid job ID '{id}'")));
        }
        let mut reserved = self.reserved.lock();
        if self.table.lock().contains_key(id) || reserved.contains_key(id) {
            return Err(QmpError::generic(format!("Job ID '{id}' already in use")));
        }
        let (started, job) = mpsc::channel();
        let jobs = Arc::clone(self);
        // Without a job none is sent, and the thread ends.
        let work = move || job.recv().into_iter().for_each(|job| jobs.pump_events(&job));
        spawn(format!("job {id}"), Box::new(work)).map_err(|error| {
            QmpError::generic(format!("Cannot start a thread for the events of job '{id}': {error}"))
        })?;
        reserved.insert(id.to_owned(), started);
        Ok(ReservedId { id: id.to_owned(), reserved: Arc::clone(&self.reserved) })
    }

    /// The answer of `query-jobs`.
    pub(crate) fn infos(&self) -> Vec<Value> {
        let table = self.table.lock();
        newest_first(&table).map(|job| job.info()).collect()
    }

    /// The answer of `query-block-jobs`.
    pub(crate) fn block_infos(&self) -> Vec<Value> {
        let table = self.table.lock();
        newest_first(&table).filter(|job| job.is_block_job()).map(|job| job.block_info()).collect()
    }

    /// The job `id`, in the words of the commands `job-*`.
    pub(crate) fn find(&self, id: &str) -> Reply<Arc<Job>> {
        self.table.lock().get(id).cloned().ok_or_else(|| QmpError::generic("Job not found"))
    }

    /// The job `id`, in the words of the commands `block-job-*`.
    pub(crate) fn find_block_job(&self, id: &str) -> Reply<Arc<Job>> {
        let job = self.table.lock().get(id).filter(|job| job.is_block_job()).cloned();
        job.ok_or_else(|| no_block_job(id))
    }

    /// The process is about to end: cancels all jobs and waits for them, for at most `limit`.
    pub(crate) fn end_all(&self, limit: Duration) {
        let jobs: Vec<_> = self.table.lock().values().cloned().collect();
        for job in &jobs {
            job.handle.keep_log();
            // One that has ended already needs no more.
            let _ = job.handle.request(JobCommand::Cancel(true));
        }
        let until = Instant::now() + limit;
        for job in jobs {
            job.wait_for(|state| matches!(state, JobState::Concluded | JobState::Null), until);
        }
    }
}

fn newest_first(table: &BTreeMap<String, Arc<Job>>) -> impl Iterator<Item = &Arc<Job>> {
    let mut jobs: Vec<_> = table.values().collect();
    jobs.sort_by_key(|job| std::cmp::Reverse(job.number));
    jobs.into_iter()
}

impl Job {
    /// Whether it moves data of a node, as all types but `create` do.
    pub(crate) fn is_block_job(&self) -> bool {
        self.kind != "create"
    }

    fn wait_for(&self, reached: impl Fn(JobState) -> bool, until: Instant) -> bool {
        let mut reported = self.reported.lock();
        while !reached(reported.state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            reported = self.changed.wait_timeout(reported, left).0;
        }
        true
    }

    /// Refuses what its state does not allow, for commands that ask for the state first.
    pub(crate) fn check_allows(&self, verb: Verb) -> Reply<()> {
        let state = self.reported.lock().state;
        if state.allows(verb) { Ok(()) } else { Err(self.in_words(Refused::State { verb, state })) }
    }

    /// Gives the job a command; refusals come in the protocol's words.
    pub(crate) fn request(&self, command: JobCommand) -> Reply<()> {
        self.handle.request(command).map_err(|refused| self.in_words(refused))?;
        match command {
            JobCommand::SetSpeed(speed) => self.speed.store(speed, Ordering::Relaxed),
            JobCommand::Dismiss => {
                self.wait_for(|state| state == JobState::Null, Instant::now() + DISMISS_LIMIT);
            }
            _ => {}
        }
        Ok(())
    }

    fn in_words(&self, refused: Refused) -> QmpError {
        let id = &self.id;
        QmpError::generic(match refused {
            // Over, but not reported yet.
            Refused::State { state: JobState::Null, .. } => return no_block_job(id),
            // Asked before the state is, whatever that is.
            Refused::State { verb: Verb::Resume, .. } | Refused::NotPaused => {
                "Can't resume a job that was not paused".to_owned()
            }
            Refused::State { verb, state } => {
                format!(
                    "Job '{id}' in state '{}' cannot accept command verb '{}'",
                    state.name(),
                    verb_name(verb)
                )
            }
            Refused::Paused { verb: Verb::Pause } => "Job is already paused".to_owned(),
            Refused::Paused { .. } => format!("The block job for device '{id}' is currently paused"),
            other => other.to_string(),
        })
    }

    /// An element of the answer of `query-jobs`.
    pub(crate) fn info(&self) -> Value {
        let figures = self.handle.figures();
        let reported = self.reported.lock();
        let mut info = json!({
            "current-progress": figures.offset,
            "status": reported.state.name(),
            "total-progress": figures.len,
            "type": self.kind,
            "id": self.id,
        });
        if let Some(error) = &reported.error {
            info["error"] = json!(error);
        }
        info
    }

    /// An element of the answer of `query-block-jobs`.
    fn block_info(&self) -> Value {
        let figures = self.handle.figures();
        let reported = self.reported.lock();
        let mut info = json!({
            "auto-finalize": self.auto_finalize,
            "io-status": io_status_name(figures.io_status),
            "device": self.id,
            "auto-dismiss": self.auto_dismiss,
            "busy": figures.busy,
            "len": figures.len,
            "offset": figures.offset,
            "status": reported.state.name(),
            "paused": match reported.state {
                JobState::Paused | JobState::Standby => true,
                // QEMU's hold the guest then, and themselves.
                JobState::Pending => figures.mirror.is_some(),
                _ => false,
            },
            "speed": self.speed.load(Ordering::Relaxed),
            "ready": matches!(reported.state, JobState::Ready | JobState::Standby),
            "type": self.kind,
        });
        if let Some(error) = &reported.error {
            info["error"] = json!(error);
        }
        match &figures.mirror {
            Some(progress) if self.kind == "mirror" => mirror::add_figures(&mut info, progress),
            // One that failed to start.
            None if self.kind == "mirror" => info["actively-synced"] = json!(false),
            _ => {}
        }
        info
    }

    /// What `BLOCK_JOB_READY` and the events of the end carry.
    fn event_data(&self) -> Value {
        let figures = self.handle.figures();
        json!({
            "device": self.id,
            "len": figures.len,
            "offset": figures.offset,
            "speed": self.speed.load(Ordering::Relaxed),
            "type": self.kind,
        })
    }
}

impl Jobs {
    /// Puts a job in the table whose name is reserved, and that has been started and has reported nothing
    /// yet. Its first two events are sent at once, what follows after the command has been answered.
    pub(crate) fn add_job(
        self: &Arc<Self>,
        session: Option<&Session>,
        options: JobOptions,
        handle: Box<dyn JobHandle>,
        at_end: AtEnd,
    ) {
        let job = Arc::new(Job {
            id: options.id,
            kind: options.kind,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            span: options.span,
            number: NEXT_JOB.fetch_add(1, Ordering::Relaxed),
            handle,
            speed: AtomicU64::new(options.speed),
            reported: Mutex::new(Reported { state: JobState::Created, error: None }),
            changed: Condvar::new(),
            at_end: Mutex::new(Some(at_end)),
            resuming: Mutex::new(()),
        });
        let first = std::iter::from_fn(|| job.handle.next_event(Some(Duration::ZERO))).take(2).collect();
        self.report(&job, first);
        let reserved = self.reserved.lock().get(&job.id).cloned();
        let start_pump = move || {
            if reserved.is_none_or(|started| started.send(job).is_err()) {
                error!("events of a job are lost: its name was not reserved");
            }
        };
        match session {
            Some(session) => session.after_answer(start_pump),
            None => start_pump(),
        }
    }

    fn pump_events(&self, job: &Arc<Job>) {
        let _span = job.span.enter();
        while let Some(event) = job.handle.next_event(None) {
            let mut step = vec![event];
            if matches!(step[0], Event::Completed { .. } | Event::Cancelled) {
                self.end(job);
                // A job queues the states that follow together with its end.
                step.extend(std::iter::from_fn(|| job.handle.next_event(Some(Duration::ZERO))));
            }
            step.iter().for_each(log::event);
            self.report(job, step);
        }
    }

    /// Sends events to monitors and makes what queries show agree with them, all in one step.
    fn report(&self, job: &Arc<Job>, events: Vec<Event>) {
        let mut table = self.table.lock();
        let mut reported = job.reported.lock();
        for event in events {
            if let Event::Status(state) = event {
                match state {
                    JobState::Created => drop(table.insert(job.id.clone(), Arc::clone(job))),
                    JobState::Null => drop(table.remove(&job.id)),
                    JobState::Aborting => reported.error = job.handle.failure(),
                    _ => {}
                }
                reported.state = state;
            }
            self.send(job, &mut reported, event);
        }
        drop((reported, table));
        job.changed.notify_all();
    }

    fn send(&self, job: &Job, reported: &mut Reported, event: Event) {
        match event {
            Event::Status(state) => self.emit_status(&job.id, state),
            Event::Ready => self.context.events.emit(&events::BLOCK_JOB_READY, job.event_data()),
            Event::Pending if job.is_block_job() => {
                self.context.events.emit(&events::BLOCK_JOB_PENDING, json!({"type": job.kind, "id": job.id}));
            }
            Event::Completed { error } => {
                let mut data = job.event_data();
                if let Some(error) = error {
                    let error = reported.error.take().unwrap_or(error);
                    data["error"] = json!(error);
                    reported.error = Some(error);
                }
                if job.is_block_job() {
                    self.context.events.emit(&events::BLOCK_JOB_COMPLETED, data);
                }
            }
            Event::Cancelled => {
                reported.error = Some(CANCELLED.to_owned());
                if job.is_block_job() {
                    self.context.events.emit(&events::BLOCK_JOB_CANCELLED, job.event_data());
                }
            }
            Event::Error { operation, action, message, .. } => {
                let action = match action {
                    ErrorAction::Report => "report",
                    ErrorAction::Stop => "stop",
                    // What was tried too often is left out, under the policy that says to go on.
                    _ => "ignore",
                };
                let data = json!({
                    "device": job.id,
                    "operation": operation.to_string(),
                    "action": action,
                    "message": message,
                });
                self.context.events.emit(&events::BLOCK_JOB_ERROR, data);
            }
            other => mirror::report_mirror_event(&self.context.events, job, &other),
        }
    }

    fn emit_status(&self, id: &str, state: JobState) {
        self.context.events.emit(&events::JOB_STATUS_CHANGE, json!({"status": state.name(), "id": id}));
    }

    /// Passes on why a job with a valid name did not start, which clients also learn by the states of its
    /// short life.
    pub(crate) fn refused_start<T>(&self, id: &str, refused: Reply<T>) -> Reply<T> {
        if refused.is_err() {
            // Under the table's lock, as all events about jobs.
            let _table = self.table.lock();
            self.emit_status(id, JobState::Created);
            self.emit_status(id, JobState::Null);
        }
        refused
    }

    fn end(&self, job: &Job) {
        let at_end = job.at_end.lock().take();
        if let Some(at_end) = at_end {
            at_end(&self.context);
            self.context.locks.look_again();
        }
    }
}

/// Why a job failed at a device, as scripts know it; the details were in `BLOCK_JOB_ERROR`.
fn system_words(kind: blockmirror_block::ErrorKind) -> Option<&'static str> {
    use blockmirror_block::ErrorKind;
    Some(match kind {
        ErrorKind::Io => "Input/output error",
        ErrorKind::NoSpace => "No space left on device",
        _ => return None,
    })
}

fn no_block_job(id: &str) -> QmpError {
    QmpError::new(ErrorClass::DeviceNotActive, format!("Block job '{id}' not found"))
}

fn verb_name(verb: Verb) -> &'static str {
    match verb {
        Verb::Cancel | Verb::ForceCancel => "cancel",
        Verb::Pause => "pause",
        Verb::Resume => "resume",
        Verb::SetSpeed => "set-speed",
        Verb::Change => "change",
        Verb::Complete => "complete",
        Verb::Finalize => "finalize",
        Verb::Dismiss => "dismiss",
        _ => "control",
    }
}

fn io_status_name(status: IoStatus) -> &'static str {
    match status {
        IoStatus::Failed => "failed",
        IoStatus::NoSpace => "nospace",
        _ => "ok",
    }
}
