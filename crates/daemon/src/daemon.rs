//! The daemon itself: everything there is, in one place. Commands, jobs and exports share it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_image::{Format, ReferencePolicy, check_backing, directory_of, join_name};
use blockmirror_qmp::schema::Event;
use blockmirror_qmp::{Listener, Monitors, QmpError};
use serde_json::Value;
use tracing::info;

use crate::Reply;
use crate::command;
use crate::command::locks::CommandLocks;
use crate::errors::qmp_error;
use crate::export::Exports;
use crate::graph::{Graph, close_all};
use crate::job::Jobs;
use crate::object::Objects;
use crate::startup::StartupError;

/// How long monitors may take to write what they have, at the end.
const GRACE: Duration = Duration::from_millis(500);
/// How long jobs and exports may take to end before what their nodes wait for is cancelled.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long they may take in all. What hangs then ends with the process.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Nodes, exports, jobs and monitors. Made with [`Daemon::new`]; ends with [`Daemon::run`].
#[derive(Debug)]
pub struct Daemon {
    /// Which nodes commands work on.
    pub(crate) locks: CommandLocks,
    pub(crate) exports: Exports,
    pub(crate) jobs: Jobs,
    pub(crate) objects: Objects,
    pub(crate) graph: Mutex<Graph>,
    monitors: OnceLock<Monitors>,
    /// Directories whose files images may refer to, beside their own.
    allowed: Vec<PathBuf>,
    readable: Vec<PathBuf>,
    listeners: Mutex<Vec<Listener>>,
    /// Why it could not be set up, found out after it had begun to serve.
    failed_late: Mutex<Option<StartupError>>,
    quit: Mutex<bool>,
    quitting: Condvar,
}

impl Daemon {
    /// A daemon with nothing in it. Files that images name are opened if they lie beside the image or in one
    /// of the `allowed` directories.
    pub fn new(allowed: Vec<PathBuf>) -> Arc<Self> {
        Self::with_readable(allowed, Vec::new())
    }

    /// The same; files in the directories `readable` are opened too, but not as data files, which may be
    /// written to.
    pub fn with_readable(allowed: Vec<PathBuf>, readable: Vec<PathBuf>) -> Arc<Self> {
        let daemon = Arc::new(Self {
            locks: CommandLocks::default(),
            exports: Exports::default(),
            jobs: Jobs::default(),
            objects: Objects::default(),
            graph: Mutex::default(),
            monitors: OnceLock::new(),
            allowed,
            readable,
            listeners: Mutex::default(),
            failed_late: Mutex::default(),
            quit: Mutex::new(false),
            quitting: Condvar::new(),
        });
        let monitors = Monitors::new(command::table(&daemon));
        // It is empty: it was made a moment ago.
        let _ = daemon.monitors.set(monitors);
        daemon
    }

    /// The reference of all commands, events and types, as Markdown: what `query-qmp-schema` answers, for
    /// people.
    pub fn reference() -> String {
        command::table(&Self::new(Vec::new())).markdown()
    }

    /// The monitors: they give commands and receive events.
    pub fn monitors(&self) -> &Monitors {
        self.monitors.get_or_init(|| Monitors::new(command::empty_table()))
    }

    /// Keeps a listener of monitors for as long as the daemon runs.
    pub(crate) fn keep_listener(&self, listener: Listener) {
        self.listeners.lock().push(listener);
    }

    /// Tells all monitors.
    pub(crate) fn emit(&self, event: &'static Event, data: Value) {
        if let Value::Object(members) = data {
            self.monitors().emit(event, members);
        }
    }

    /// Which files that the image at `path` names may be opened.
    pub(crate) fn policy_for(&self, path: &Path) -> Reply<ReferencePolicy> {
        let failed = |directory: &Path, e| QmpError::generic(format!("{}: {e}", directory.display()));
        let mut policy = ReferencePolicy::beside(path).map_err(|e| failed(path, e))?;
        for directory in &self.allowed {
            policy.allow_dir(directory).map_err(|e| failed(directory, e))?;
        }
        for directory in &self.readable {
            policy.allow_dir_to_read(directory).map_err(|e| failed(directory, e))?;
        }
        Ok(policy)
    }

    /// The daemon ends because an option could not be carried out that took long.
    pub(crate) fn fail_late(&self, error: StartupError) {
        *self.failed_late.lock() = Some(error);
        self.quit();
    }

    /// Why [`run`](Self::run) has returned, if an option of [`Startup::apply`](crate::Startup::apply) failed
    /// after that had stopped to wait for it.
    pub fn late_failure(&self) -> Option<StartupError> {
        self.failed_late.lock().take()
    }

    /// Refuses `backing` as the name of the backing file in the header of `image` if the chain would come
    /// back to the image, or to its data file `data`, or be too deep. A name that leads nowhere may stand
    /// there.
    pub(crate) fn check_backing(
        &self,
        image: &Path,
        data: Option<&Path>,
        backing: &str,
        format: Option<Format>,
    ) -> Reply<()> {
        let Some(backing) = join_name(image, backing.as_ref()) else { return Ok(()) };
        if !directory_of(&backing).is_dir() {
            return Ok(());
        }
        check_backing(image, data, &backing, format, &self.policy_for(&backing)?).map_err(qmp_error)
    }

    /// Makes [`run`](Self::run) return. Never waits.
    pub fn quit(&self) {
        *self.quit.lock() = true;
        self.quitting.notify_all();
    }

    /// Waits for [`quit`](Self::quit), then ends everything: jobs are cancelled, exports closed, images
    /// closed. Takes three seconds at most, even if peers are dead or files hang, however many.
    pub fn run(self: &Arc<Self>) {
        let mut quit = self.quit.lock();
        while !*quit {
            quit = self.quitting.wait(quit);
        }
        drop(quit);
        info!("ending");
        self.end_jobs_and_exports();
        self.listeners.lock().clear();
        self.monitors().stop(GRACE);
        let nodes = self.graph.lock().take_all();
        close_all(nodes);
        info!("ended");
    }

    /// Ends them beside each other. What they wait for below is cancelled if that takes long.
    fn end_jobs_and_exports(self: &Arc<Self>) {
        let until = Instant::now() + END_LIMIT;
        let (done, is_done) = mpsc::channel::<()>();
        for end in [|daemon: &Self| daemon.end_exports(), |daemon: &Self| daemon.jobs.end_all(END_LIMIT)] {
            let (daemon, ended) = (Arc::clone(self), done.clone());
            let work = move || {
                end(&daemon);
                let _ = ended.send(());
            };
            if thread::Builder::new().name("end".into()).spawn(work).is_err() {
                // Without a thread it takes as long as it has to.
                end(self);
                let _ = done.send(());
            }
        }
        let mut left = 2;
        let mut wait_until = |until: Instant| {
            while left > 0 && is_done.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok() {
                left -= 1;
            }
            left == 0
        };
        if !wait_until(until - (END_LIMIT - PATIENCE)) {
            let devices: Vec<_> =
                self.graph.lock().nodes().iter().map(|node| Arc::clone(&node.device)).collect();
            devices.iter().for_each(|device| device.cancel_in_flight());
            wait_until(until);
        }
    }
}
