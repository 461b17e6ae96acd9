//! A daemon is killed in the middle of live mirrors with a log, under a guest that writes, and the same
//! daemon with the same mirror goes on: at the end both disks are equal, and have what the guest has flushed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_checkpoint::ActivityLog;
use blockmirror_file::FileOptions;
use blockmirror_nbd::ClientOptions;
use blockmirror_qmp::Client;
use blockmirror_testing::eventually;
use blockmirror_testing::qemu::listens;
use blockmirror_testing::scratch::scratch;
use serde_json::{Value, json};

use crate::activation::CHILD;
use crate::common::ours_ok;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const LEN: u64 = 48 * MIB;
const BLOCK: u64 = 4096;

/// A daemon in a process of its own, with the nodes `s` and `t`.
struct Daemon {
    child: Child,
    client: Client,
    dir: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, format: &str) -> Self {
        let node = |name: &str| {
            let file = dir.join(name).display().to_string();
            let file = json!({"driver": "file", "filename": file});
            json!({"driver": format, "node-name": name, "file": file}).to_string()
        };
        let (nbd, qmp) = (dir.join("nbd"), dir.join("qmp"));
        for socket in [&nbd, &qmp] {
            let _ = fs::remove_file(socket);
        }
        let args = [
            "--blockdev".to_owned(),
            node("s"),
            "--blockdev".to_owned(),
            node("t"),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", nbd.display()),
            "--chardev".to_owned(),
            format!("socket,id=c,path={},server=on,wait=off", qmp.display()),
            "--monitor".to_owned(),
            "chardev=c".to_owned(),
        ];
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "activation::child", "--nocapture"])
            .env(CHILD, args.join("\n"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the daemon listens", || {
            assert!(child.try_wait().unwrap().is_none(), "the daemon ended");
            listens(&qmp)
        });
        let client = Client::connect(qmp, LIMIT).unwrap();
        Self { child, client, dir: dir.to_owned() }
    }

    fn must(&mut self, command: &str, arguments: Value) -> Value {
        self.client.execute(command, arguments).unwrap()
    }

    fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let next = self.client.next_event(LIMIT).unwrap().expect("an event in time");
            if next.name == event {
                return next.data.into();
            }
        }
    }

    /// Starts the mirror; before that nothing writes.
    fn mirror(&mut self, mode: &str) {
        let log = self.dir.join("log").display().to_string();
        let args = json!({
            "job-id": "m", "device": "s", "target": "t", "sync": "full", "copy-mode": mode, "x-log": log,
        });
        self.must("blockdev-mirror", args);
    }

    fn export(&mut self) {
        let export = json!({"type": "nbd", "id": "e", "node-name": "s", "name": "disk", "writable": true});
        self.must("block-export-add", export);
    }

    fn kill(mut self) {
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

/// What the guest knows of its blocks, by number: the last version that it has sent, and the last of which it
/// has seen a flush.
#[derive(Debug)]
struct Known {
    sent: Vec<u64>,
    acknowledged: Vec<u64>,
    flushed: Vec<u64>,
    /// The regions that were written to, or may have been, since they were last taken.
    regions: BTreeSet<u64>,
}

impl Known {
    fn new() -> Self {
        let none = vec![0; (LEN / BLOCK) as usize];
        Self { sent: none.clone(), acknowledged: none.clone(), flushed: none, regions: BTreeSet::new() }
    }
}

/// A block of this version: its number and the version, all over.
fn block(number: u64, version: u64) -> Vec<u8> {
    let word = [number.to_be_bytes(), version.to_be_bytes()].concat();
    word.repeat(BLOCK as usize / 16)
}

/// A guest that writes to the export until it is lost. `written` counts what was acknowledged.
fn guest(dir: &Path, seed: u64, known: &Arc<Mutex<Known>>, written: &Arc<AtomicU64>) -> JoinHandle<()> {
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd").display());
    let options = ClientOptions::new(uri.parse().unwrap()).writable(true).reconnect_delay(Duration::ZERO);
    let client = options.open().unwrap();
    let (known, written) = (Arc::clone(known), Arc::clone(written));
    thread::spawn(move || {
        let mut rng = Rng::new(seed, 3);
        loop {
            // Two places get most of the writes.
            let number = match rng.below(4) {
                0 => rng.below(LEN / BLOCK),
                1 => 5 * MIB / BLOCK + rng.below(300),
                _ => 30 * MIB / BLOCK + rng.below(100),
            };
            let version = {
                let mut known = known.lock().unwrap();
                known.regions.insert(number * BLOCK / MIB);
                known.sent[number as usize] += 1;
                known.sent[number as usize]
            };
            if client.write_at(&block(number, version), number * BLOCK, WriteFlags::NONE).is_err() {
                return;
            }
            known.lock().unwrap().acknowledged[number as usize] = version;
            if written.fetch_add(1, Ordering::Relaxed) % 8 == 7 {
                let before = known.lock().unwrap().acknowledged.clone();
                if client.flush().is_err() {
                    return;
                }
                known.lock().unwrap().flushed = before;
            }
        }
    })
}

/// Bytes in regions that the log has marked.
fn marked(dir: &Path) -> (u64, BTreeSet<u64>) {
    let log = ActivityLog::open(Arc::new(FileOptions::new().open(dir.join("log")).unwrap())).unwrap();
    let regions = log.regions();
    (log.marked_bytes(), (0..regions.len()).filter(|region| regions.get(*region)).collect())
}

/// How far the mirror has come when the daemon is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instant {
    /// So many writes after its start.
    Copying(u64),
    /// So many after it was ready.
    Ready(u64),
}

fn survives(format: &str, mode: &str, seed: u64, kills: &[Instant]) {
    let dir = scratch().unwrap();
    let dir = dir.path();
    for name in ["s", "t"] {
        let path = dir.join(name).display().to_string();
        ours_ok(["create", "-q", "-f", format, &path, &LEN.to_string()]);
    }
    fs::write(dir.join("fill"), vec![0x55; LEN as usize]).unwrap();
    ours_ok(["convert", "-f", "raw", "-O", format, "fill", "s"].map(|word| match word {
        "fill" | "s" => dir.join(word).display().to_string(),
        word => word.to_owned(),
    }));
    let known = Arc::new(Mutex::new(Known::new()));
    for (round, instant) in kills.iter().enumerate() {
        let case = format!("{format} {mode} {seed}, kill {round} at {instant:?}");
        let before = (round > 0).then(|| marked(dir));
        known.lock().unwrap().regions.clear();
        let written = Arc::new(AtomicU64::new(0));
        let mut daemon = Daemon::start(dir, format);
        daemon.mirror(mode);
        daemon.export();
        let guest = guest(dir, seed * 100 + round as u64, &known, &written);
        let more = match instant {
            Instant::Copying(writes) => *writes,
            Instant::Ready(writes) => {
                daemon.wait_for("BLOCK_JOB_READY");
                written.load(Ordering::Relaxed) + writes
            }
        };
        eventually("the guest has written", || written.load(Ordering::Relaxed) >= more);
        daemon.kill();
        guest.join().unwrap();
        // What the log says now: nothing that was not marked before, or written since.
        let (_, now) = marked(dir);
        let known = known.lock().unwrap();
        let mut may = known.regions.clone();
        if matches!(instant, Instant::Copying(_)) {
            may.extend(before.map_or_else(|| (0..LEN / MIB).collect(), |(_, before)| before));
        }
        assert!(now.is_subset(&may), "{case}: {:?}", now.difference(&may).collect::<Vec<_>>());
    }
    // The last run copies what is marked, and no more.
    let (bytes, _) = marked(dir);
    let mut daemon = Daemon::start(dir, format);
    daemon.mirror(mode);
    let ready = daemon.wait_for("BLOCK_JOB_READY");
    assert_eq!(ready["offset"], bytes, "{format} {mode} {seed}");
    // One that is made to quit leaves the log as it is.
    daemon.must("quit", json!({}));
    daemon.child.wait().unwrap();
    let left = marked(dir);
    let mut daemon = Daemon::start(dir, format);
    daemon.mirror(mode);
    assert_eq!(daemon.wait_for("BLOCK_JOB_READY")["offset"], left.0, "{format} {mode} {seed}");
    assert!(left.0 <= bytes, "{left:?}");
    daemon.must("block-job-cancel", json!({"device": "m"}));
    daemon.wait_for("BLOCK_JOB_COMPLETED");
    // One that has ended is refused.
    let log = ActivityLog::open(Arc::new(FileOptions::new().open(dir.join("log")).unwrap())).unwrap();
    assert!(log.is_ended());
    daemon.must("quit", json!({}));
    daemon.child.wait().unwrap();
    let (source, target) = (dir.join("s").display().to_string(), dir.join("t").display().to_string());
    ours_ok(["compare", "-f", format, "-F", format, &source, &target]);
    check(dir, format, &known.lock().unwrap());
}

/// Each block of the target is of a version that was sent, and no older than the last that was flushed.
fn check(dir: &Path, format: &str, known: &Known) {
    let raw = dir.join("raw").display().to_string();
    ours_ok(["convert", "-f", format, "-O", "raw", &dir.join("t").display().to_string(), &raw]);
    let bytes = fs::read(raw).unwrap();
    for (number, found) in bytes.chunks(BLOCK as usize).enumerate() {
        let (flushed, sent) = (known.flushed[number], known.sent[number]);
        let version = match found[0] {
            0x55 => 0,
            _ => u64::from_be_bytes(*found[8..].first_chunk().unwrap()),
        };
        assert!((flushed..=sent).contains(&version), "block {number}: {version}, {flushed} was flushed");
        if version > 0 {
            assert!(found == block(number as u64, version), "block {number} is torn");
        }
    }
}

use Instant::{Copying, Ready};

#[test]
fn a_mirror_of_raw_files_survives_its_daemon() {
    survives("raw", "background", 1, &[Copying(1), Copying(40), Ready(1), Ready(150), Copying(3), Ready(60)]);
    survives("raw", "write-blocking", 2, &[Copying(20), Ready(100), Ready(30), Copying(90)]);
}

#[test]
fn a_mirror_of_qcow2_images_survives_its_daemon() {
    survives(
        "qcow2",
        "background",
        3,
        &[Copying(1), Copying(40), Ready(1), Ready(150), Copying(3), Ready(60)],
    );
    survives("qcow2", "write-blocking", 4, &[Copying(20), Ready(100), Ready(30), Copying(90)]);
}
