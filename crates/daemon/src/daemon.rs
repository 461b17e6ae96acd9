//! The daemon itself: everything there is, in one place. Commands, jobs and exports share it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_image::ReferencePolicy;
use blockmirror_qmp::schema::Event;
use blockmirror_qmp::{Listener, Monitors, QmpError};
use serde_json::Value;

use crate::Reply;
use crate::command;
use crate::export::Exports;
use crate::graph::Graph;
use crate::job::Jobs;
use crate::object::Objects;

/// How long monitors may take to write what they have, at the end.
const GRACE: Duration = Duration::from_secs(1);

/// Nodes, exports, jobs and monitors. Made with [`Daemon::new`]; ends with [`Daemon::run`].
#[derive(Debug)]
pub struct Daemon {
    /// One command at a time, whoever gives it.
    pub(crate) commands: Mutex<()>,
    pub(crate) exports: Exports,
    pub(crate) jobs: Jobs,
    pub(crate) objects: Objects,
    pub(crate) graph: Mutex<Graph>,
    monitors: OnceLock<Monitors>,
    /// Directories whose files images may refer to, beside their own.
    allowed: Vec<PathBuf>,
    listeners: Mutex<Vec<Listener>>,
    quit: Mutex<bool>,
    quitting: Condvar,
}

impl Daemon {
    /// A daemon with nothing in it. Files that images name are opened if they lie beside the image or in one of the
    /// `allowed` directories.
    pub fn new(allowed: Vec<PathBuf>) -> Arc<Self> {
        let daemon = Arc::new(Self {
            commands: Mutex::new(()),
            exports: Exports::default(),
            jobs: Jobs::default(),
            objects: Objects::default(),
            graph: Mutex::default(),
            monitors: OnceLock::new(),
            allowed,
            listeners: Mutex::default(),
            quit: Mutex::new(false),
            quitting: Condvar::new(),
        });
        let monitors = Monitors::new(command::table(&daemon));
        // It is empty: it was made a moment ago.
        let _ = daemon.monitors.set(monitors);
        daemon
    }

    /// The reference of all commands, events and types, as Markdown: what `query-qmp-schema` answers, for people.
    pub fn reference() -> String {
        command::table(&Self::new(Vec::new())).markdown()
    }

    /// Who gives commands, and is told of events.
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
        Ok(policy)
    }

    /// Makes [`run`](Self::run) return. Never waits.
    pub fn quit(&self) {
        *self.quit.lock() = true;
        self.quitting.notify_all();
    }

    /// Waits until somebody says [`quit`](Self::quit), then ends everything: jobs are given up, exports closed, images
    /// closed. Takes seconds at most, even if a peer is dead.
    pub fn run(&self) {
        let mut quit = self.quit.lock();
        while !*quit {
            quit = self.quitting.wait(quit);
        }
        drop(quit);
        self.jobs.end_all();
        self.end_exports();
        self.listeners.lock().clear();
        self.monitors().stop(GRACE);
        let nodes = self.graph.lock().take_all();
        crate::job::close(nodes);
    }
}
