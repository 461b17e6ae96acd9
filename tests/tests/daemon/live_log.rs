//! A daemon is killed in the middle of live mirrors with a log, under a guest that writes, and the same
//! daemon with the same mirror goes on: at the end both disks are equal, and have what the guest has flushed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod ctl;
mod daemon;
mod disks;
mod kill;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_checkpoint::ActivityLog;
use blockmirror_file::FileOptions;
use blockmirror_nbd::ClientOptions;
use blockmirror_testing::eventually;
use blockmirror_testing::scratch::scratch;
use serde_json::json;

use daemon::Daemon;
use disks::{BLOCK, Known, LEN, MIB, block, check, marked, place};

/// A guest that writes to the export until it is lost. `written` counts what was acknowledged.
fn guest(dir: &Path, seed: u64, known: &Arc<Mutex<Known>>, written: &Arc<AtomicU64>) -> JoinHandle<()> {
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd").display());
    let options = ClientOptions::new(uri.parse().unwrap()).writable(true).reconnect_delay(Duration::ZERO);
    let client = options.open().unwrap();
    let (known, written) = (Arc::clone(known), Arc::clone(written));
    thread::spawn(move || {
        let mut rng = Rng::new(seed, 3);
        loop {
            let number = place(&mut rng, 4);
            let version = known.lock().unwrap().send(number);
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
    disks::create(dir, format);
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
    check(dir, format, &known.lock().unwrap());
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
