//! A daemon in a process of its own, which is killed: what every test of `x-log` starts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blockmirror_qmp::Client;
use blockmirror_testing::eventually;
use blockmirror_testing::qemu::listens;
use serde_json::{Value, json};

use crate::activation::CHILD;

const LIMIT: Duration = Duration::from_secs(120);

/// A daemon in a process of its own, with the nodes `s` and `t`.
pub(super) struct Daemon {
    pub(super) child: Child,
    pub(super) client: Client,
    dir: PathBuf,
}

impl Daemon {
    /// Starts it.
    pub(super) fn start(dir: &Path, format: &str) -> Self {
        let mut child = Self::spawn(dir, format);
        let client = Self::connect(dir, || child.try_wait().unwrap().is_some()).unwrap();
        Self { child, client, dir: dir.to_owned() }
    }

    /// Starts one with the node `s` alone.
    pub(super) fn of_source(dir: &Path, format: &str) -> Self {
        let mut child = Self::spawn_with(dir, format, &["s"]);
        let client = Self::connect(dir, || child.try_wait().unwrap().is_some()).unwrap();
        Self { child, client, dir: dir.to_owned() }
    }

    /// Starts the process.
    pub(super) fn spawn(dir: &Path, format: &str) -> Child {
        Self::spawn_with(dir, format, &["s", "t"])
    }

    fn spawn_with(dir: &Path, format: &str, nodes: &[&str]) -> Child {
        let node = |name: &str| {
            let file = dir.join(name).display().to_string();
            let file = json!({"driver": "file", "filename": file});
            json!({"driver": format, "node-name": name, "file": file}).to_string()
        };
        let (nbd, qmp) = (dir.join("nbd"), dir.join("qmp"));
        for socket in [&nbd, &qmp] {
            let _ = fs::remove_file(socket);
        }
        let nodes = nodes.iter().flat_map(|name| ["--blockdev".to_owned(), node(name)]);
        let others = [
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", nbd.display()),
            "--chardev".to_owned(),
            format!("socket,id=c,path={},server=on,wait=off", qmp.display()),
            "--monitor".to_owned(),
            "chardev=c".to_owned(),
        ];
        let args: Vec<_> = nodes.chain(others).collect();
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "activation::child", "--nocapture"])
            .env(CHILD, args.join("\n"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Connects to its monitor; `None` if it `has_ended` before that.
    pub(super) fn connect(dir: &Path, mut has_ended: impl FnMut() -> bool) -> Option<Client> {
        let qmp = dir.join("qmp");
        eventually("the daemon listens", || has_ended() || listens(&qmp));
        Client::connect(qmp, LIMIT).ok()
    }

    pub(super) fn must(&mut self, command: &str, arguments: Value) -> Value {
        self.client.execute(command, arguments).unwrap()
    }

    pub(super) fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let next = self.client.next_event(LIMIT).unwrap().expect("an event in time");
            if next.name == event {
                return next.data.into();
            }
        }
    }

    /// Starts the mirror; before that nothing writes.
    pub(super) fn mirror(&mut self, mode: &str) {
        let args = mirror_args(&self.dir, mode);
        self.must("blockdev-mirror", args);
    }

    pub(super) fn export(&mut self) {
        self.must("block-export-add", export_args());
    }

    pub(super) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Of `blockdev-mirror`.
pub(super) fn mirror_args(dir: &Path, mode: &str) -> Value {
    let log = dir.join("log").display().to_string();
    json!({"job-id": "m", "device": "s", "target": "t", "sync": "full", "copy-mode": mode, "x-log": log})
}

/// Of `block-export-add`.
pub(super) fn export_args() -> Value {
    json!({"type": "nbd", "id": "e", "node-name": "s", "name": "disk", "writable": true})
}
