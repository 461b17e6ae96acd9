//! Two hosts: a daemon in each of two network namespaces, and a mirror from one to the other over TLS while a
//! guest writes.
//!
//! The wire between them is cut, slowed and healed, and the peer is killed. Nothing that the guest wrote may
//! be lost, and no write of the guest may fail for it.
//!
//! Needs root, for the namespaces (Debian: iproute2). Skipped, visibly, without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::guest::{Guest, Written};
use crate::common::host::Host;
use blockmirror_testing::qemu::{Qemu, run};
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::{report, skip};
use serde_json::{Value, json};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Length of the disks, and how much of the source is data.
const DISK: u64 = 128 * MIB;
const DATA: u64 = 96 * MIB;
/// Between two writes of each of the guest's threads.
const PAUSE: Duration = Duration::from_millis(4);
/// What "in seconds" means on a machine that does other things as well.
const SECONDS: Duration = Duration::from_secs(15);
const PEER: &str = "10.77.0.2";

/// Two network namespaces with a wire between them. Gone when dropped.
struct Wire {
    ends: [String; 2],
}

impl Wire {
    /// Lays a wire, if that is possible here.
    fn lay() -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("bm{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let wire = Self { ends: ["a", "b"].map(|end| format!("{name}{end}")) };
        let [a, b] = &wire.ends;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add wire netns {a} type veth peer name wire netns {b}"))?;
        for (end, address) in [(a, "10.77.0.1"), (b, PEER)] {
            ip(&format!("-n {end} addr add {address}/24 dev wire"))?;
            ip(&format!("-n {end} link set lo up"))?;
            ip(&format!("-n {end} link set wire up"))?;
        }
        Ok(wire)
    }

    fn cut(&self) {
        ip(&format!("-n {} link set wire down", self.ends[1])).unwrap();
    }

    fn heal(&self) {
        ip(&format!("-n {} link set wire up", self.ends[1])).unwrap();
        // The other end learns of it a while later.
        let is_up = |end: &str| tool("ip", &format!("-n {end} -o link show up dev wire")).unwrap();
        while self.ends.iter().any(|end| !is_up(end).contains("state UP")) {
            thread::sleep(Duration::from_millis(10));
        }
        // While no host answers for an address, it counts as unreachable for some seconds.
        ip(&format!("-n {} neigh flush dev wire", self.ends[0])).unwrap();
    }

    /// Lets through so many megabits a second, if possible each only after a while; how that was done.
    fn slow_down(&self, megabits: u32) -> &'static str {
        let tc =
            |what: String| tool("tc", &format!("-n {} qdisc replace dev wire root {what}", self.ends[0]));
        if tc(format!("netem delay 20ms rate {megabits}mbit limit 10000")).is_ok() {
            return "netem, 20 ms";
        }
        // Not every kernel has netem.
        tc(format!("tbf rate {megabits}mbit burst 64kb latency 100ms")).unwrap();
        "tbf"
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for end in &self.ends {
            // It may never have been there.
            let _ = ip(&format!("netns del {end}"));
        }
    }
}

fn ip(line: &str) -> Result<String, String> {
    tool("ip", line)
}

fn tool(program: &str, line: &str) -> Result<String, String> {
    match Command::new(program).args(line.split(' ')).output() {
        Ok(out) if out.status.success() => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        Ok(out) => Err(format!("{program} {line}: {}", String::from_utf8_lossy(&out.stderr).trim_end())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// The disk `source` at `here`, which a guest writes to, and a peer that exports the empty disk `target`.
struct Stage {
    // In the order in which they must go.
    guest: Guest,
    here: Host,
    peer: Host,
    wire: Wire,
    qemu: Qemu,
    dir: TempDir,
}

impl Stage {
    fn set(name: &str) -> Option<Self> {
        let qemu = Qemu::find(name)?;
        let wire = match Wire::lay() {
            Ok(wire) => wire,
            Err(error) => {
                skip(name, format_args!("no network namespaces here: {error}"));
                return None;
            }
        };
        let dir = scratch().unwrap();
        let path = |name: &str| dir.path().join(name);
        crate::common::pki::credentials(dir.path(), "peer");
        fs::write(path("raw"), common::guest::fresh(DATA)).unwrap();
        qemu.img_in(dir.path(), ["convert", "-q", "-f", "raw", "-O", "qcow2", "raw", "source"]).unwrap();
        qemu.img_in(dir.path(), ["resize", "-q", "-f", "qcow2", "source", &DISK.to_string()]).unwrap();
        qemu.img_in(dir.path(), ["create", "-q", "-f", "qcow2", "target", &DISK.to_string()]).unwrap();
        let creds = |endpoint: &str| {
            let text = format!("tls-creds-x509,id=tls,endpoint={endpoint},dir={}", dir.path().display());
            ["--object".to_owned(), text]
        };

        let mut words: Vec<String> = creds("server").into();
        words.extend(crate::common::host::image("target", "qcow2", &path("target")));
        words.push("--nbd-server".into());
        words.push(format!("addr.type=inet,addr.host={PEER},addr.port=10809,tls-creds=tls"));
        words.extend(crate::common::host::export("target", "target"));
        let peer = Host::start(dir.path(), "peer", Some(&wire.ends[1]), &words);

        let mut words: Vec<String> = creds("client").into();
        words.extend(crate::common::host::image("source", "qcow2", &path("source")));
        words.extend(crate::common::host::nbd_server(dir.path(), "here"));
        words.extend(crate::common::host::export("source", "disk"));
        let here = Host::start(dir.path(), "here", Some(&wire.ends[0]), &words);
        let guest = Guest::start(here.open("disk"), DATA, PAUSE);
        Some(Self { guest, here, peer, wire, qemu, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds the peer's export as node `far`, with requests that wait so many seconds for a lost peer.
    fn add_far(&mut self, reconnect_delay: u64) {
        self.here.must(
            "blockdev-add",
            json!({"driver": "nbd", "node-name": "far", "export": "target", "tls-creds": "tls",
                   "tls-hostname": "peer", "reconnect-delay": reconnect_delay, "discard": "unmap",
                   "server": {"type": "inet", "host": PEER, "port": "10809"}}),
        );
    }

    /// Starts a mirror to it, with `more` arguments.
    fn mirror(&mut self, more: Value) {
        let mut arguments = json!({"job-id": "m", "device": "source", "target": "far", "sync": "full"});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        self.here.must("blockdev-mirror", arguments);
    }

    fn copied(&mut self, at_least: u64) -> Value {
        self.here.wait_until(|job| job["copied"].as_u64() >= Some(at_least))
    }

    /// Pivots a job that is ready. The guest writes before, meanwhile and after; returns what it wrote, with
    /// the daemons gone.
    fn pivot_and_end(mut self) -> Ended {
        self.guest.goes_on(50);
        self.here.must("job-complete", json!({"id": "m"}));
        let end = self.here.wait_for("BLOCK_JOB_COMPLETED");
        assert_eq!(end.get("error"), None, "{end}");
        let exports = self.here.must("query-block-exports", json!({}));
        assert_ne!(exports[0]["node-name"], "source", "the export has moved");
        self.guest.goes_on(200);
        let Self { guest, here, peer, wire, qemu, dir } = self;
        let written = guest.stop();
        here.quit();
        peer.quit();
        drop(wire);
        Ended { written, qemu, dir }
    }
}

/// What is left when all is over.
struct Ended {
    written: Written,
    qemu: Qemu,
    dir: TempDir,
}

impl Ended {
    /// That the target has no fault, and holds what the guest wrote. Where the peer was `killed`, clusters
    /// may have leaked.
    fn holds(self, killed: bool) {
        let target = self.dir.path().join("target");
        if killed {
            let check = ["check", "--output=json"].map(Path::new).into_iter().chain([target.as_path()]);
            let said = self.qemu.img_output(check).unwrap();
            let found: Value = serde_json::from_slice(&said.stdout).unwrap();
            for fault in ["corruptions", "check-errors"] {
                assert_eq!(found[fault].as_u64().unwrap_or(0), 0, "{found}");
            }
            report(format_args!("  leaks of a killed peer: {}", found["leaks"].as_u64().unwrap_or(0)));
        } else {
            self.qemu.check(&target).unwrap();
        }
        let raw = self.dir.path().join("target.raw");
        self.qemu.to_raw("qcow2", &target, &raw).unwrap();
        self.written.is_in(&raw);
    }
}

#[test]
fn a_disk_moves_to_the_peer_while_it_is_written() {
    let Some(mut stage) = Stage::set("a_disk_moves_to_the_peer_while_it_is_written") else { return };
    let credentials = stage.dir.path().display();
    let uri = format!("nbds://{PEER}/target?tls-certificates={credentials}&tls-hostname=peer");
    stage.here.must(
        "drive-mirror",
        json!({"job-id": "m", "device": "source", "target": uri, "format": "raw", "mode": "existing",
               "sync": "full"}),
    );
    stage.here.wait_for("BLOCK_JOB_READY");
    stage.pivot_and_end().holds(false);
}

/// Without a pivot the copy is the source at one instant.
#[test]
fn a_copy_is_kept_at_the_peer() {
    let Some(mut stage) = Stage::set("a_copy_is_kept_at_the_peer") else { return };
    stage.add_far(0);
    stage.mirror(json!({"copy-mode": "write-blocking"}));
    stage.here.wait_for("BLOCK_JOB_READY");
    stage.guest.goes_on(100);
    let Stage { guest, mut here, peer, wire, qemu, dir } = stage;
    let written = guest.stop();
    here.must("block-job-cancel", json!({"device": "m"}));
    assert_eq!(here.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
    here.quit();
    peer.quit();
    drop(wire);
    qemu.compare("qcow2", &dir.path().join("source"), "qcow2", &dir.path().join("target")).unwrap();
    Ended { written, qemu, dir }.holds(false);
}

/// A cut that the connection survives: neither the job nor the guest notices.
#[test]
fn a_short_cut_is_waited_out() {
    let Some(mut stage) = Stage::set("a_short_cut_is_waited_out") else { return };
    stage.add_far(0);
    stage.mirror(json!({"speed": 48 * MIB}));
    stage.copied(24 * MIB);
    stage.wire.cut();
    stage.guest.goes_on(400);
    thread::sleep(Duration::from_secs(2));
    let standing = stage.here.job();
    assert_eq!((&standing["paused"], &standing["io-status"]), (&false.into(), &"ok".into()));
    assert!(standing["copied"].as_u64().unwrap() < DATA);
    stage.wire.heal();
    stage.here.wait_until(|job| job["ready"] == true);
    assert!(!stage.here.has_heard("BLOCK_JOB_ERROR"));
    stage.pivot_and_end().holds(false);
}

/// A cut that outlives the connection stops the job, as its policy says, and the guest does not notice.
/// Resumed, it goes on from where it was.
#[test]
fn a_long_cut_stops_the_job_where_it_is() {
    let Some(mut stage) = Stage::set("a_long_cut_stops_the_job_where_it_is") else { return };
    stage.add_far(0);
    stage.mirror(json!({"speed": 32 * MIB, "on-target-error": "stop"}));
    stage.copied(80 * MIB);
    stage.wire.cut();
    let stopped = stopped(&mut stage);
    stage.guest.goes_on(100);
    stage.wire.heal();
    resume_and_be_ready(&mut stage, &stopped);
    stage.pivot_and_end().holds(false);
}

/// Waits until the policy has stopped the job, and returns what it says of itself then.
fn stopped(stage: &mut Stage) -> Value {
    let mut event = stage.here.wait_for("BLOCK_JOB_ERROR");
    let message = event.as_object_mut().and_then(|event| event.remove("message"));
    assert!(
        message.as_ref().and_then(Value::as_str).is_some_and(|m| m.starts_with("write: nbds://")),
        "{message:?}"
    );
    assert_eq!(event, json!({"device": "m", "operation": "write", "action": "stop"}));
    // What was in flight fails as well.
    let job = stage.here.wait_until(|job| job["paused"] == true && job["busy"] == false);
    assert_eq!(job["io-status"], "failed", "{job}");
    job
}

/// Resumes a job that was `stopped` after most of the disk was copied; what was made durable at the peer is
/// not copied again.
fn resume_and_be_ready(stage: &mut Stage, stopped: &Value) {
    stage.here.must("block-job-set-speed", json!({"device": "m", "speed": 0}));
    // What was in flight reported its own failures.
    stage.here.events.clear();
    stage.here.must("block-job-resume", json!({"device": "m"}));
    let ready = stage.here.wait_until(|job| job["ready"] == true || job["io-status"] != "ok");
    assert_eq!(ready["io-status"], "ok", "{ready}");
    assert!(!stage.here.has_heard("BLOCK_JOB_ERROR"));
    let figure = |job: &Value, name: &str| job[name].as_u64().unwrap();
    let before = figure(stopped, "copied");
    let after = figure(&ready, "copied") - before;
    report(format_args!(
        "  {} MiB copied before the stop, {} MiB after it, of {} MiB of data; the guest dirtied {} MiB",
        before / MIB,
        after / MIB,
        DATA / MIB,
        figure(&ready, "dirtied") / MIB
    ));
    assert!(after < before, "it began from the start");
}

#[test]
fn a_slow_wire_makes_a_slow_job_with_figures_that_are_true() {
    let name = "a_slow_wire_makes_a_slow_job_with_figures_that_are_true";
    let Some(mut stage) = Stage::set(name) else { return };
    const MEGABITS: u32 = 80;
    let how = stage.wire.slow_down(MEGABITS);
    stage.add_far(0);
    stage.mirror(json!({"copy-mode": "auto"}));
    let (mut last, mut rates, mut had_eta) = (0, Vec::new(), false);
    let ready = stage.here.wait_until(|job| {
        let figure = |name: &str| job[name].as_u64().unwrap();
        assert!(figure("offset") >= last, "the offset went back: {job}");
        assert!(figure("offset") <= figure("len"), "{job}");
        assert!(figure("copied") + figure("zeroed") + figure("skipped") <= figure("len"), "{job}");
        last = figure("offset");
        if figure("bulk-left") == 0 && figure("copied") > DATA / 4 && job["ready"] == false {
            rates.push(figure("copy-rate"));
            had_eta |= job.get("eta-ms").is_some();
        }
        job["ready"] == true
    });
    rates.sort_unstable();
    let wire = u64::from(MEGABITS) * 1_000_000 / 8;
    let median = rates[rates.len() / 2];
    report(format_args!("  {how}: the wire carries {wire} bytes/s, the job says {median}"));
    assert!(median > wire / 4 && median < wire * 2, "{rates:?}");
    assert!(had_eta, "it never said how long it would take");
    assert!(ready["copied"].as_u64().unwrap() >= DATA);
    stage.pivot_and_end().holds(false);
}

#[test]
fn a_killed_peer_stops_the_job_which_goes_on_where_it_was() {
    let name = "a_killed_peer_stops_the_job_which_goes_on_where_it_was";
    let Some(mut stage) = Stage::set(name) else { return };
    stage.add_far(0);
    stage.mirror(json!({"speed": 32 * MIB, "on-target-error": "stop"}));
    stage.copied(80 * MIB);
    stage.peer.kill();
    let stopped = stopped(&mut stage);
    stage.guest.goes_on(100);
    // Still dead: resumed, it stops again.
    stage.here.must("block-job-resume", json!({"device": "m"}));
    let again = self::stopped(&mut stage);
    assert!(again["copied"].as_u64() <= stopped["copied"].as_u64().map(|n| n + 16 * MIB));
    stage.peer.restart();
    resume_and_be_ready(&mut stage, &again);
    stage.pivot_and_end().holds(true);
}

/// Requests that wait for the peer are done again when it is back; no policy is asked, though the peer has
/// forgotten some of what it had.
#[test]
fn a_killed_peer_is_waited_for() {
    let Some(mut stage) = Stage::set("a_killed_peer_is_waited_for") else { return };
    stage.add_far(100);
    stage.mirror(json!({"speed": 32 * MIB}));
    stage.copied(80 * MIB);
    stage.peer.kill();
    stage.guest.goes_on(200);
    stage.peer.restart();
    stage.here.must("block-job-set-speed", json!({"device": "m", "speed": 0}));
    let ready = stage.here.wait_until(|job| job["ready"] == true);
    assert!(!stage.here.has_heard("BLOCK_JOB_ERROR"));
    let copied = ready["copied"].as_u64().unwrap();
    report(format_args!("  {} MiB copied, of {} MiB of data", copied / MIB, DATA / MIB));
    assert!(copied < DATA + 64 * MIB, "it began from the start");
    stage.pivot_and_end().holds(true);
}

/// The peer goes while the job is ready and what the guest writes goes to both: the guest does not notice.
#[test]
fn a_peer_that_goes_when_the_job_is_ready_is_caught_up_with() {
    let name = "a_peer_that_goes_when_the_job_is_ready_is_caught_up_with";
    let Some(mut stage) = Stage::set(name) else { return };
    stage.add_far(0);
    stage.mirror(json!({"copy-mode": "write-blocking", "on-target-error": "stop"}));
    stage.here.wait_for("BLOCK_JOB_READY");
    stage.guest.goes_on(100);
    stage.peer.kill();
    let stopped = stopped(&mut stage);
    assert_eq!(stopped["status"], "standby");
    stage.guest.goes_on(400);
    stage.peer.restart();
    stage.here.must("block-job-resume", json!({"device": "m"}));
    stage.here.wait_until(|job| job["status"] == "ready" && job["actively-synced"] == true);
    let after = stage.here.job()["copied"].as_u64().unwrap() - stopped["copied"].as_u64().unwrap();
    report(format_args!("  {} MiB copied after the stop", after / MIB));
    assert!(after < DATA / 2, "it began from the start");
    stage.pivot_and_end().holds(true);
}

/// With a peer that says nothing any more, and requests that would wait for it for hours.
#[test]
fn the_end_does_not_wait_for_a_dead_peer() {
    let Some(mut stage) = Stage::set("the_end_does_not_wait_for_a_dead_peer") else { return };
    stage.add_far(10_000);
    stage.mirror(json!({"speed": 32 * MIB}));
    stage.copied(16 * MIB);
    stage.wire.cut();
    let Stage { guest, here, peer, wire, qemu, dir } = stage;
    guest.goes_on(200);
    let written = guest.stop();
    let took = here.terminate();
    report(format_args!("  the end took {took:?}"));
    assert!(took < SECONDS, "{took:?}");
    drop((peer, wire));
    // What the guest had was the source.
    qemu.check(&dir.path().join("source")).unwrap();
    fs::rename(dir.path().join("source"), dir.path().join("target")).unwrap();
    Ended { written, qemu, dir }.holds(false);
}

/// The same once more where the guest's disk has moved to the peer.
#[test]
fn the_end_does_not_wait_for_a_dead_peer_that_has_the_disk() {
    let Some(mut stage) = Stage::set("the_end_does_not_wait_for_a_dead_peer_that_has_the_disk") else {
        return;
    };
    stage.add_far(10_000);
    stage.mirror(json!({}));
    stage.here.wait_for("BLOCK_JOB_READY");
    stage.here.must("job-complete", json!({"id": "m"}));
    assert_eq!(stage.here.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
    stage.guest.goes_on(50);
    let path = stage.path("here.nbd");
    let Stage { guest, here, peer, wire, dir, .. } = stage;
    drop(guest.stop());
    // Something is under way when the wire is cut.
    wire.cut();
    let uri = format!("nbd+unix:///disk?socket={}", path.display());
    let mut waits = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 1M", &uri])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(200));
    let took = here.quit();
    report(format_args!("  the end took {took:?}"));
    assert!(took < SECONDS, "{took:?}");
    waits.wait().unwrap();
    drop(peer);
    run("qemu-img", dir.path(), ["info", "-U", "target"]).unwrap();
}
