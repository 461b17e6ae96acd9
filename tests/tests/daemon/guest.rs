//! The daemon as its users have it: a client writes over NBD while a mirror runs that QMP steers.
//!
//! The daemon runs inside the test; the clients are others' programs. Skipped, visibly, without them (Debian:
//! fio, qemu-utils).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockmirror_daemon::{Daemon, Startup};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::{eventually, skip};
use serde_json::{Value, json};

/// Nothing here takes longer, on a machine that works at all.
const PATIENCE: Duration = Duration::from_secs(120);

/// A daemon and a monitor of it.
struct Running {
    daemon: Arc<Daemon>,
    thread: Option<JoinHandle<()>>,
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Running {
    /// Images of the folder that are to be nodes of the same name, the first of them exported, writable, as
    /// `disk`.
    fn start(dir: &Path, images: &[&str]) -> Self {
        let path = |name: &str| dir.join(name).display().to_string();
        let mut startup = Startup::default();
        startup.blockdevs = images
            .iter()
            .map(|name| {
                let file = path(&format!("{name}.qcow2"));
                format!("driver=qcow2,node-name={name},file.driver=file,file.filename={file}")
            })
            .collect();
        startup.nbd_server = Some(format!("addr.type=unix,addr.path={}", path("nbd")));
        startup.exports = vec![format!("nbd,id=e,node-name={},name=disk,writable=on", images[0])];
        startup.chardevs = vec![format!("socket,id=c,path={},server=on,wait=off", path("qmp"))];
        startup.monitors = vec!["chardev=c".into()];
        let daemon = Daemon::new(Vec::new());
        startup.apply(&daemon).expect("start");
        let runs = Arc::clone(&daemon);
        let thread = thread::spawn(move || runs.run());
        let socket = UnixStream::connect(dir.join("qmp")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut running =
            Self { daemon, thread: Some(thread), lines: BufReader::new(socket), events: Vec::new() };
        running.line();
        running.must("qmp_capabilities", json!({}));
        running
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.lines.read_line(&mut line).expect("an answer in time"), 0, "the monitor hung up");
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        self.lines.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push(line);
        }
    }

    /// A command that must succeed.
    fn must(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        answer.get("return").cloned().unwrap_or_else(|| panic!("{command}: {answer}"))
    }

    /// Waits for an event; what came before it is dropped.
    fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let next = if self.events.is_empty() { self.line() } else { self.events.remove(0) };
            if next["event"] == event {
                return next["data"].clone();
            }
        }
    }

    fn quit(mut self) {
        let start = Instant::now();
        self.must("quit", json!({}));
        self.thread.take().unwrap().join().unwrap();
        assert!(start.elapsed() < PATIENCE);
        // Threads that have nothing left to do may not have ended yet.
        eventually("no thread uses the daemon", || Arc::strong_count(&self.daemon) == 1);
    }
}

/// Writes a pattern of its own all over the disk, then reads it all back.
fn fio(dir: &Path, more: &[&str]) -> Child {
    Command::new("fio")
        .current_dir(dir)
        .args(["--name=w", "--rw=randwrite", "--bs=4k", "--size=32M", "--iodepth=16", "--minimal"])
        .args(["--verify=crc32c", "--verify_fatal=1"])
        .args(more)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("fio")
}

fn fio_is_there() -> bool {
    let engines = Command::new("fio").arg("--enghelp").output();
    let there = engines.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("nbd"));
    if !there {
        skip("a guest that is fio", format_args!("fio with its nbd engine cannot be run"));
    }
    there
}

/// fio writes with checksums through the export while the disk is mirrored, and goes on through the pivot.
/// Then all it wrote is in the target, at whatever granularity.
#[test]
fn a_client_writes_through_mirror_and_pivot() {
    let Some(qemu) = Qemu::find("a_client_writes_through_mirror_and_pivot") else { return };
    if !fio_is_there() {
        return;
    }
    for (granularity, mode) in
        [(4 << 10, "background"), (64 << 10, "auto"), (1 << 20, "write-blocking"), (64 << 20, "auto")]
    {
        let dir = scratch().unwrap();
        let dir = dir.path();
        for name in ["source", "target"] {
            qemu.img_in(dir, ["create", "-q", "-f", "qcow2", &format!("{name}.qcow2"), "128M"]).unwrap();
        }
        qemu.io("qcow2", &dir.join("source.qcow2"), &["write -P 3 0 100M"]).unwrap();
        let mut daemon = Running::start(dir, &["source", "target"]);
        let uri = format!("--uri=nbd+unix:///disk?socket={}", dir.join("nbd").display());
        let mut guest = fio(dir, &["--ioengine=nbd", &uri, "--rate_iops=2000"]);
        daemon.must(
            "blockdev-mirror",
            json!({"job-id": "m", "device": "source", "target": "target", "sync": "full",
                   "granularity": granularity, "copy-mode": mode}),
        );
        daemon.wait_for("BLOCK_JOB_READY");
        daemon.must("job-complete", json!({"id": "m"}));
        let end = daemon.wait_for("BLOCK_JOB_COMPLETED");
        assert_eq!(end.get("error"), None, "{granularity} {mode}: {end}");
        let exports = daemon.must("query-block-exports", json!({}));
        assert_eq!(exports[0]["node-name"], "target", "the export has moved");
        // The source has no user any more.
        daemon.must("blockdev-del", json!({"node-name": "source"}));
        assert!(guest.wait().unwrap().success(), "{granularity} {mode}: fio found what it had not written");
        daemon.quit();
        qemu.check(&dir.join("target.qcow2")).unwrap();
        qemu.to_raw("qcow2", &dir.join("target.qcow2"), &dir.join("raw")).unwrap();
        let raw = format!("--filename={}", dir.join("raw").display());
        let mut again = fio(dir, &["--verify_only", "--ioengine=psync", &raw]);
        assert!(
            again.wait().unwrap().success(),
            "{granularity} {mode}: the target lacks what fio had written"
        );
    }
}

/// Two disks whose mirrors were started by one transaction, grouped, move at one instant; the first
/// `job-complete` alone moves neither.
#[test]
fn a_grouped_transaction_moves_all_disks_at_once() {
    let Some(qemu) = Qemu::find("a_grouped_transaction_moves_all_disks_at_once") else { return };
    let dir = scratch().unwrap();
    let dir = dir.path();
    for name in ["a", "b", "a2", "b2"] {
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", &format!("{name}.qcow2"), "16M"]).unwrap();
    }
    let mut daemon = Running::start(dir, &["a", "b", "a2", "b2"]);
    daemon.must(
        "block-export-add",
        json!({"type": "nbd", "id": "e2", "node-name": "b", "name": "second", "writable": true}),
    );
    let mirror = |id, device, target| {
        let data = json!({"job-id": id, "device": device, "target": target, "sync": "full"});
        json!({"type": "blockdev-mirror", "data": data})
    };
    // One action that cannot be done undoes all.
    let answer = daemon.ask(
        "transaction",
        json!({"actions": [mirror("m1", "a", "a2"), mirror("m2", "b", "nowhere")],
               "properties": {"completion-mode": "grouped"}}),
    );
    assert!(answer["error"]["desc"].as_str().unwrap().contains("nowhere"), "{answer}");
    assert_eq!(daemon.must("query-jobs", json!({})), json!([]));
    daemon.must(
        "transaction",
        json!({"actions": [mirror("m1", "a", "a2"), mirror("m2", "b", "b2")],
               "properties": {"completion-mode": "grouped"}}),
    );
    daemon.wait_for("BLOCK_JOB_READY");
    daemon.wait_for("BLOCK_JOB_READY");
    daemon.must("job-complete", json!({"id": "m1"}));
    let nodes = |daemon: &mut Running| {
        let exports = daemon.must("query-block-exports", json!({}));
        let names = exports.as_array().unwrap().iter().map(|e| e["node-name"].as_str().unwrap().to_owned());
        // The newest first.
        names.collect::<Vec<_>>()
    };
    assert_eq!(nodes(&mut daemon), ["b", "a"]);
    daemon.must("job-complete", json!({"id": "m2"}));
    daemon.wait_for("BLOCK_JOB_COMPLETED");
    daemon.wait_for("BLOCK_JOB_COMPLETED");
    assert_eq!(nodes(&mut daemon), ["b2", "a2"]);
    daemon.quit();
    qemu.check(&dir.join("a2.qcow2")).unwrap();
}

/// `quit` ends the daemon in spite of a mirror to a server that has stopped answering.
#[test]
fn quit_does_not_wait_for_a_dead_peer() {
    let Some(qemu) = Qemu::find("quit_does_not_wait_for_a_dead_peer") else { return };
    let dir = scratch().unwrap();
    let dir = dir.path();
    qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "source.qcow2", "16M"]).unwrap();
    qemu.io("qcow2", &dir.join("source.qcow2"), &["write -P 3 0 16M"]).unwrap();
    qemu.img_in(dir, ["create", "-q", "-f", "raw", "peer.raw", "16M"]).unwrap();
    let socket = dir.join("peer");
    let mut peer = Command::new("qemu-nbd")
        .args(["-f", "raw", "-x", "copy", "-t", "-k"])
        .args([&socket, &dir.join("peer.raw")])
        .spawn()
        .expect("qemu-nbd");
    while UnixStream::connect(&socket).is_err() {
        thread::sleep(Duration::from_millis(20));
    }
    let mut daemon = Running::start(dir, &["source"]);
    daemon.must(
        "blockdev-add",
        json!({"driver": "nbd", "node-name": "peer", "export": "copy", "reconnect-delay": 600,
               "server": {"type": "unix", "path": socket}}),
    );
    Command::new("kill").args(["-STOP", &peer.id().to_string()]).status().unwrap();
    daemon.must(
        "blockdev-mirror",
        json!({"job-id": "m", "device": "source", "target": "peer", "sync": "full"}),
    );
    daemon.quit();
    peer.kill().unwrap();
    peer.wait().unwrap();
}
