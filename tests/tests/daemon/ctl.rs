//! `blockmirror ctl` against our daemon and, where it is installed, against QEMU's: a mirror through its
//! three ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::common::{Ran, ours};
use blockmirror_daemon::{Daemon, Startup};
use blockmirror_qmp::Client;
use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::qemu::have;
use blockmirror_testing::scratch::scratch;
use insta::assert_snapshot;
use serde_json::{Value, json};

/// Nothing here takes longer, on a machine that works at all.
const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const SIZE: u64 = 16 << 20;

/// A daemon with the raw nodes `disk`, full of data, and `copy`; a monitor for `ctl`, and one for the test.
/// QEMU has only one client at a time on each.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) socket: PathBuf,
    client: Option<Client>,
    end: Option<Ends>,
}

enum Ends {
    Ours(Arc<Daemon>, JoinHandle<()>),
    Qemu(Child),
}

fn images(dir: &Path) -> Vec<String> {
    write_raw(&dir.join("disk"), SIZE, &[(0, SIZE, Fill::Noise)]).unwrap();
    write_raw(&dir.join("copy"), SIZE, &[]).unwrap();
    let node = |name: &str| {
        format!("driver=raw,node-name={name},file.driver=file,file.filename={}", dir.join(name).display())
    };
    vec![node("disk"), node("copy")]
}

fn monitor(dir: &Path, name: &str) -> String {
    format!("socket,id={name},path={},server=on,wait=off", dir.join(name).display())
}

impl World {
    pub(crate) fn ours() -> Self {
        let dir = scratch().unwrap();
        let mut startup = Startup::default();
        startup.blockdevs = images(dir.path());
        startup.nbd_server = Some(format!("addr.type=unix,addr.path={}", dir.path().join("nbd").display()));
        startup.exports = vec!["nbd,id=e,node-name=disk,writable=on".into()];
        startup.chardevs = vec![monitor(dir.path(), "a"), monitor(dir.path(), "b")];
        startup.monitors = vec!["chardev=a".into(), "chardev=b".into()];
        let daemon = Daemon::new(Vec::new());
        startup.apply(&daemon).expect("start");
        let runs = Arc::clone(&daemon);
        let thread = thread::spawn(move || runs.run());
        Self::new(dir, Ends::Ours(daemon, thread))
    }

    pub(crate) fn qemu() -> Option<Self> {
        if !have("ctl", &["qemu-storage-daemon"]) {
            return None;
        }
        let dir = scratch().unwrap();
        let pidfile = dir.path().join("pid");
        let mut command = Command::new("qemu-storage-daemon");
        for node in images(dir.path()) {
            command.args(["--blockdev", &node]);
        }
        for name in ["a", "b"] {
            command.args(["--chardev", &monitor(dir.path(), name), "--monitor", &format!("chardev={name}")]);
        }
        let mut child = command.arg("--pidfile").arg(&pidfile).stdin(Stdio::null()).spawn().unwrap();
        while !pidfile.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the storage daemon ended");
            thread::sleep(Duration::from_millis(5));
        }
        Some(Self::new(dir, Ends::Qemu(child)))
    }

    fn new(dir: tempfile::TempDir, end: Ends) -> Self {
        let client = Client::connect(dir.path().join("b"), PATIENCE).unwrap();
        Self { socket: dir.path().join("a"), dir, client: Some(client), end: Some(end) }
    }

    pub(crate) fn must(&mut self, command: &str, arguments: Value) -> Value {
        self.client.as_mut().unwrap().execute(command, arguments).unwrap()
    }

    /// Starts a mirror that stands still after its first bytes, until its speed is changed.
    fn mirror(&mut self, id: &str) {
        self.mirror_with(id, json!({"speed": 1}));
    }

    fn mirror_with(&mut self, id: &str, more: Value) {
        let mut arguments = json!({"job-id": id, "device": "disk", "target": "copy", "sync": "full"});
        for (key, value) in more.as_object().unwrap() {
            arguments[key] = value.clone();
        }
        self.must("blockdev-mirror", arguments);
    }

    pub(crate) fn wait_for(&mut self, event: &str) {
        let client = self.client.as_mut().unwrap();
        while client.next_event(PATIENCE).unwrap().expect("an event in time").name != event {}
    }

    pub(crate) fn ctl(&self, args: &[&str]) -> Ran {
        ctl(&self.socket, args)
    }

    /// What `ctl` said, with its exit code.
    pub(crate) fn said(&self, args: &[&str]) -> String {
        let ran = self.ctl(args);
        format!("{}{}[{}]", ran.stdout, ran.stderr, ran.code)
    }

    fn background(&self, args: &'static [&str]) -> JoinHandle<Ran> {
        let socket = self.socket.clone();
        thread::spawn(move || ctl(&socket, args))
    }

    /// The node that clients of the export see.
    pub(crate) fn exported(&mut self) -> Value {
        self.must("query-block-exports", json!({}))[0]["node-name"].clone()
    }

    fn images_are_equal(&self) -> bool {
        let read = |name: &str| std::fs::read(self.dir.path().join(name)).unwrap();
        read("disk") == read("copy")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.client = None;
        match self.end.take() {
            Some(Ends::Ours(daemon, thread)) => {
                daemon.quit();
                let _ = thread.join();
            }
            Some(Ends::Qemu(mut child)) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => {}
        }
    }
}

fn ctl(socket: &Path, args: &[&str]) -> Ran {
    ours(["ctl", socket.to_str().unwrap()].iter().chain(args))
}

#[test]
fn complete_moves_users_to_the_target() {
    let mut world = World::ours();
    assert_eq!(world.said(&["jobs"]), "no jobs\n[0]");
    assert_eq!(world.said(&["complete"]), "blockmirror: there are no jobs\n[1]");
    world.mirror("m");
    let said = world.said(&["complete"]);
    // A byte a second lets one operation through.
    assert!(said.starts_with("blockmirror: m: not ready, 1"), "{said}");
    assert!(said.ends_with(" MiB left; --wait waits until it is\n[1]"), "{said}");
    assert_eq!(world.said(&["set-speed", "m", "0"]), "[0]");
    world.wait_for("BLOCK_JOB_READY");
    assert_eq!(world.said(&["complete", "m"]), "m: completed; users of the source are on the target\n[0]");
    assert_eq!(world.exported(), "copy");
    assert_eq!(world.must("query-jobs", json!({})), json!([]), "nothing is left of it");
    assert!(world.images_are_equal());
}

#[test]
fn complete_keep_source_leaves_a_copy() {
    let mut world = World::ours();
    world.mirror("m");
    // In QMP the same words would give a job up that is not ready.
    assert!(world.said(&["complete", "--keep-source"]).contains("m: not ready, "));
    assert_eq!(world.must("query-jobs", json!({}))[0]["status"], "running");
    let waiting = world.background(&["complete", "--wait", "--keep-source"]);
    // The right job ends, whichever comes first: the waiting or the speed.
    assert_eq!(world.said(&["set-speed", "0"]), "[0]");
    let ran = waiting.join().unwrap();
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert_eq!(ran.stdout, "m: completed; the target is a copy, its users stay on the source\n");
    assert_eq!(world.exported(), "disk");
    assert!(world.images_are_equal());
}

#[test]
fn abort_gives_up() {
    let mut world = World::ours();
    world.mirror("m");
    let watch = world.background(&["watch"]);
    let waiting = world.background(&["complete", "m", "--wait"]);
    assert_eq!(world.said(&["abort", "m"]), "m: aborted; the target is of no use\n[0]");
    assert_eq!(world.exported(), "disk");
    // Those who came in time have heard of it.
    for (ran, late) in [
        (watch.join().unwrap(), "blockmirror: note: there are no jobs\n"),
        (waiting.join().unwrap(), "blockmirror: no job 'm': there are none\n"),
    ] {
        let said = ran.stdout + &ran.stderr;
        let heard = said.ends_with("m: aborted\n") || said.starts_with("blockmirror: m: over (");
        assert!(said == late || (heard && ran.code == 1), "{said}");
    }
    assert_eq!(world.said(&["abort", "m"]), "blockmirror: no job 'm': there are none\n[1]");
}

#[test]
fn a_job_that_waits_to_be_finalized_and_dismissed() {
    let mut world = World::ours();
    world.mirror_with("m", json!({"auto-finalize": false, "auto-dismiss": false}));
    world.wait_for("BLOCK_JOB_READY");
    world.must("job-complete", json!({"id": "m"}));
    world.wait_for("BLOCK_JOB_PENDING");
    assert_eq!(
        world.said(&["complete", "--keep-source"]),
        "blockmirror: m: about to end: its outcome is decided\n[1]"
    );
    assert_eq!(world.said(&["complete"]), "m: completed\n[0]");
    assert_eq!(world.exported(), "copy");
    assert_eq!(world.said(&["watch"]), "m: completed\n[0]");
    assert_eq!(world.said(&["complete"]), "blockmirror: m: over (concluded)\n[1]");
    assert_eq!(world.said(&["abort"]), "blockmirror: m: over already\n[1]");
}

/// Of two mirrors that end at one instant both ends are reported.
#[test]
fn a_group_is_completed_by_naming_its_members() {
    let mut world = World::ours();
    for name in ["disk2", "copy2"] {
        world.must(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": name, "size": SIZE, "read-zeroes": true}),
        );
    }
    let action = |id: &str, device: &str, target: &str| {
        let data = json!({"job-id": id, "device": device, "target": target, "sync": "full"});
        json!({"type": "blockdev-mirror", "data": data})
    };
    world.must(
        "transaction",
        json!({"actions": [action("m1", "disk", "copy"), action("m2", "disk2", "copy2")],
               "properties": {"completion-mode": "grouped"}}),
    );
    let said = world.said(&["complete", "--wait"]);
    assert_eq!(said, "blockmirror: there are 2 jobs, say which: m2, m1\n[2]");
    assert_eq!(
        world.said(&["complete", "--wait", "m1", "m2"]),
        "m2: completed; users of the source are on the target\n\
         m1: completed; users of the source are on the target\n[0]"
    );
    assert_eq!(world.exported(), "copy");
}

#[test]
fn jobs_as_a_table_and_as_json() {
    let mut world = World::ours();
    world.mirror("m");
    assert_eq!(world.said(&["pause"]), "[0]");
    while world.must("query-jobs", json!({}))[0]["status"] != "paused" {
        thread::sleep(Duration::from_millis(5));
    }
    let table = world.ctl(&["jobs"]).stdout;
    let (head, line) = table.split_once('\n').unwrap();
    assert_eq!(head.split_whitespace().collect::<Vec<_>>(), ["JOB", "TYPE", "STATE", "DONE", "OF", "LIMIT"]);
    // How much was done before it paused is not known.
    assert!(line.starts_with("m    mirror  paused  ") && line.ends_with(" %  1 B/s\n"), "{table}");
    let jobs: Value = serde_json::from_str(&world.ctl(&["jobs", "--output=json"]).stdout).unwrap();
    let mut keys: Vec<_> = jobs[0].as_object().unwrap().keys().cloned().collect();
    keys.sort();
    assert_snapshot!(keys.join(" "), @"actively-synced auto-dismiss auto-finalize bulk-left busy clone-calls converging copied copy-mode copy-rate current-progress device dirtied dirty-left dirty-rate id io-status len offset paused ready shared skipped speed status total-progress type writes-through zeroed");
    assert_eq!(world.said(&["complete"]), "blockmirror: m: paused, and not ready; `resume` it first\n[1]");
    assert_eq!(world.said(&["resume"]), "[0]");
    assert_eq!(world.said(&["resume"]), "blockmirror: m: Can't resume a job that was not paused\n[1]");
    assert_eq!(world.said(&["set-speed", "9E"]), "blockmirror: set-speed: the speed is too large\n[2]");
}

/// `watch` shows the states a job comes to, and its end.
#[test]
fn watch_follows_a_job_to_its_end() {
    let mut world = World::ours();
    world.mirror("m");
    let watch = world.background(&["watch", "m"]);
    // The watch sits there before the job can end, or has nothing to show.
    while world.must("query-jobs", json!({}))[0]["status"] != "running" {}
    thread::sleep(Duration::from_millis(300));
    world.must("block-job-set-speed", json!({"device": "m", "speed": 0}));
    world.wait_for("BLOCK_JOB_READY");
    world.must("job-complete", json!({"id": "m"}));
    let ran = watch.join().unwrap();
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.starts_with("m: running "), "{}", ran.stdout);
    assert!(ran.stdout.ends_with("m: completed\n"), "{}", ran.stdout);
}

#[test]
fn a_job_that_fails() {
    let mut world = World::ours();
    let rule = json!({"event": "write_aio", "iotype": "write"});
    world.must(
        "blockdev-add",
        json!({"driver": "blkdebug", "node-name": "bad", "image": {"driver": "null-co", "size": SIZE, "read-zeroes": true},
               "inject-error": [rule]}),
    );
    world.mirror_with("m", json!({"target": "bad", "on-target-error": "stop", "auto-dismiss": false}));
    world.wait_for("BLOCK_JOB_ERROR");
    while world.must("query-jobs", json!({}))[0]["status"] != "paused" {
        thread::sleep(Duration::from_millis(5));
    }
    let table = world.ctl(&["jobs"]).stdout;
    assert!(table.ends_with("I/O error\n"), "{table}");
    assert_eq!(world.said(&["abort"]), "m: aborted; the target is of no use\n[0]");
    world.must("job-dismiss", json!({"id": "m"}));
    world.mirror_with("m", json!({"target": "bad", "auto-dismiss": false}));
    world.wait_for("BLOCK_JOB_COMPLETED");
    let ran = world.ctl(&["watch"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stdout.contains("m: failed: "), "{}", ran.stdout);
    world.must("job-dismiss", json!({"id": "m"}));
    // Which of the two disks it was.
    let said = world.output_of("mirror disk bad --wait");
    assert!(said.starts_with("mirror0: failed: Input/output error (write: "), "{said}");
    assert!(said.ends_with(")\n[1]"), "{said}");
}

/// As far as QEMU's own monitor carries: all but what only ours tells.
#[test]
fn qemus_daemon() {
    let Some(mut world) = World::qemu() else { return };
    world.mirror("m");
    assert!(world.said(&["complete"]).contains("m: not ready, "));
    assert!(world.said(&["complete", "--keep-source"]).contains("m: not ready, "));
    let jobs: Value = serde_json::from_str(&world.ctl(&["jobs", "--output=json"]).stdout).unwrap();
    assert_eq!(
        (&jobs[0]["id"], &jobs[0]["status"], &jobs[0]["speed"]),
        (&json!("m"), &json!("running"), &json!(1))
    );
    assert_eq!(world.said(&["pause"]), "[0]");
    assert_eq!(world.said(&["resume"]), "[0]");
    assert_eq!(world.said(&["abort"]), "m: aborted; the target is of no use\n[0]");
    world.mirror("m");
    assert_eq!(world.said(&["set-speed", "0"]), "[0]");
    assert_eq!(
        world.said(&["complete", "--wait", "--keep-source"]),
        "m: completed; the target is a copy, its users stay on the source\n[0]"
    );
    world.mirror_with("m", json!({"auto-finalize": false, "speed": 0}));
    assert_eq!(
        world.said(&["complete", "--wait"]),
        "m: completed; users of the source are on the target\n[0]"
    );
    assert!(world.images_are_equal());
    assert_eq!(world.said(&["watch"]), "blockmirror: note: there are no jobs\n[0]");
}

#[test]
fn what_is_no_monitor() {
    let dir = scratch().unwrap();
    let path = dir.path().join("none");
    let ran = ctl(&path, &["jobs"]);
    let want = format!(
        "blockmirror: cannot connect to {}: No such file or directory (os error 2)\n",
        path.display()
    );
    assert_eq!((ran.code, ran.stderr), (1, want));
}
