//! A daemon and a monitor of it: ours inside the test, or QEMU's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockmirror_daemon::{Daemon, Startup};
use blockmirror_qmp::Client;
use serde_json::{Value, json};

/// Nothing here takes longer, on a machine that works at all.
const PATIENCE: Duration = Duration::from_secs(120);

enum End {
    Ours(Arc<Daemon>, JoinHandle<()>),
    Qemu(Child),
}

/// A daemon and a monitor of it.
pub(crate) struct World {
    client: Client,
    end: Option<End>,
}

/// The options of a daemon whose first node is exported, writable, as `disk`.
fn startup(dir: &Path, nodes: &[String]) -> Startup {
    let mut startup = Startup::default();
    startup.blockdevs = nodes.to_vec();
    startup.nbd_server = Some(format!("addr.type=unix,addr.path={}", dir.join("nbd").display()));
    startup.exports = vec!["nbd,id=e,node-name=disk,name=disk,writable=on".into()];
    startup.chardevs = vec![format!("socket,id=c,path={},server=on,wait=off", dir.join("qmp").display())];
    startup.monitors = vec!["chardev=c".into()];
    startup
}

impl World {
    /// Ours, with `nodes`, the one called `disk` exported.
    pub(crate) fn ours(dir: &Path, nodes: &[String]) -> Self {
        let daemon = Daemon::new(Vec::new());
        startup(dir, nodes).apply(&daemon).expect("start");
        let runs = Arc::clone(&daemon);
        let thread = thread::spawn(move || runs.run());
        Self::new(dir, End::Ours(daemon, thread))
    }

    /// QEMU's, the same.
    pub(crate) fn qemu(dir: &Path, nodes: &[String]) -> Self {
        let options = startup(dir, nodes);
        let pidfile = dir.join("pid");
        let mut command = Command::new("qemu-storage-daemon");
        let words = [
            ("--blockdev", options.blockdevs),
            ("--nbd-server", options.nbd_server.into_iter().collect()),
            ("--export", options.exports),
            ("--chardev", options.chardevs),
            ("--monitor", options.monitors),
        ];
        for (option, values) in words {
            for value in values {
                command.args([option, &value]);
            }
        }
        let mut child = command.arg("--pidfile").arg(&pidfile).stdin(Stdio::null()).spawn().unwrap();
        while !pidfile.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the storage daemon ended");
            thread::sleep(Duration::from_millis(5));
        }
        Self::new(dir, End::Qemu(child))
    }

    fn new(dir: &Path, end: End) -> Self {
        Self { client: Client::connect(dir.join("qmp"), PATIENCE).unwrap(), end: Some(end) }
    }

    /// A command that must succeed.
    pub(crate) fn must(&mut self, command: &str, arguments: Value) -> Value {
        self.client.execute(command, arguments).unwrap()
    }

    /// The text of the refusal of a command, or what it answers.
    pub(crate) fn refusal(&mut self, command: &str, arguments: Value) -> String {
        match self.client.execute(command, arguments) {
            Ok(value) => format!("{value}"),
            Err(error) => error.refusal().expect("a refusal").desc.clone(),
        }
    }

    /// Waits for an event; what came before it is dropped.
    pub(crate) fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let (name, data) = self.next_event();
            if name == event {
                return data;
            }
        }
    }

    /// The next event.
    pub(crate) fn next_event(&mut self) -> (String, Value) {
        let next = self.client.next_event(PATIENCE).unwrap().expect("an event in time");
        (next.name, next.data.into())
    }

    /// Waits until some job has come to a state.
    pub(crate) fn wait_for_status(&mut self, status: &str) {
        while self.wait_for("JOB_STATUS_CHANGE")["status"] != status {}
    }

    /// Ends the daemon and waits for it.
    pub(crate) fn end(mut self) {
        match self.end.take() {
            Some(End::Ours(daemon, thread)) => {
                self.must("quit", json!({}));
                thread.join().unwrap();
                // The thread of a job that has just ended may be a moment behind its last event.
                let start = Instant::now();
                while Arc::strong_count(&daemon) > 1 {
                    assert!(start.elapsed() < PATIENCE, "a thread still holds the daemon");
                    thread::yield_now();
                }
            }
            Some(End::Qemu(mut child)) => {
                self.must("quit", json!({}));
                child.wait().unwrap();
            }
            None => {}
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        match self.end.take() {
            Some(End::Ours(daemon, _)) => daemon.quit(),
            Some(End::Qemu(mut child)) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => {}
        }
    }
}
