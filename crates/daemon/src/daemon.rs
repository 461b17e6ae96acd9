//! The daemon itself: the services that commands work on, put together with the monitors that give commands.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_block::sync::Mutex;
use blockmirror_qmp::{Listener, Monitors};
use tracing::info;

use crate::command::{self, Services};
use crate::errors::StartupError;
use crate::graph::close_all;
use crate::job::JobSummary;

/// How long monitors may take to write what they have, at the end.
const GRACE: Duration = Duration::from_millis(500);
/// How long jobs and exports may take to end before what their nodes wait for is cancelled.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long they may take in all. What hangs then ends with the process.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Nodes, exports, jobs and monitors. Made with [`Daemon::new`]; ends with [`Daemon::run`].
#[derive(Debug)]
pub struct Daemon {
    pub(crate) services: Arc<Services>,
    monitors: Monitors,
    listeners: Mutex<Vec<Listener>>,
    /// Why it could not be set up, found out after it had begun to serve.
    failed_late: Mutex<Option<StartupError>>,
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
        let services = Services::new(allowed, readable);
        let monitors = Monitors::new(command::table(&services));
        services.context.events.connect(monitors.clone());
        Arc::new(Self { services, monitors, listeners: Mutex::default(), failed_late: Mutex::default() })
    }

    /// The reference of all commands, events and types, as Markdown: what `query-qmp-schema` answers, for
    /// people.
    pub fn reference() -> String {
        command::table(&Services::new(Vec::new(), Vec::new())).markdown()
    }

    /// The monitors: they give commands and receive events.
    pub fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// Keeps a listener of monitors for as long as the daemon runs.
    pub(crate) fn keep_listener(&self, listener: Listener) {
        self.listeners.lock().push(listener);
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

    /// Makes [`run`](Self::run) return. Never waits.
    pub fn quit(&self) {
        self.services.quit.ask();
    }

    /// Waits for [`quit`](Self::quit), for at most `limit`; whether it was asked.
    pub fn quits_within(&self, limit: Duration) -> bool {
        self.services.quit.wait_for(limit)
    }

    /// The jobs, the newest first.
    pub fn jobs(&self) -> Vec<JobSummary> {
        self.services.jobs.summaries()
    }

    /// Waits for [`quit`](Self::quit), then ends everything: jobs are cancelled, exports closed, images
    /// closed. Takes three seconds at most, even if peers are dead or files hang, however many; 30 s if an
    /// image still stores its metadata.
    pub fn run(self: &Arc<Self>) {
        self.services.quit.wait();
        info!("ending");
        self.end_jobs_and_exports();
        self.listeners.lock().clear();
        self.monitors.stop(GRACE);
        let nodes = self.services.context.graph.lock().take_all();
        close_all(nodes);
        info!("ended");
    }

    /// Ends them beside each other. What they wait for below is cancelled if that takes long.
    fn end_jobs_and_exports(&self) {
        let until = Instant::now() + END_LIMIT;
        let (done, is_done) = mpsc::channel::<()>();
        let ends = [
            |services: &Services| services.exports.end_all(),
            |services: &Services| services.jobs.end_all(END_LIMIT),
        ];
        for end in ends {
            let (services, ended) = (Arc::clone(&self.services), done.clone());
            let work = move || {
                end(&services);
                let _ = ended.send(());
            };
            if thread::Builder::new().name("end".into()).spawn(work).is_err() {
                // Without a thread it takes as long as it has to.
                end(&self.services);
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
            let devices: Vec<_> = self
                .services
                .context
                .graph
                .lock()
                .nodes()
                .iter()
                .map(|node| Arc::clone(&node.device))
                .collect();
            devices.iter().for_each(|device| device.cancel_in_flight());
            wait_until(until);
        }
    }
}
