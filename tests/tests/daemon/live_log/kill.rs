//! SIGKILL of a daemon at random instants of live mirrors, under guests that reconnect and go on writing: at
//! the end both disks are equal, and have what was acknowledged and flushed. `BLOCKMIRROR_LIVE_KILLS` asks
//! for more mirrors than the few of a test run, `BLOCKMIRROR_KILL_SEED` for other ones (`cargo xtask kill
//! --live`).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_nbd::{Client, ClientOptions};
use blockmirror_testing::scratch::scratch;
use serde_json::json;

use super::daemon::{Daemon, export_args, mirror_args};
use super::disks::{self, BLOCK, Known, LEN, MIB, block, check, found, place, region_of};

/// How long a guest waits for its disk to come back.
const AWAY: Duration = Duration::from_secs(120);
/// Each writes blocks of its own: their numbers modulo this.
const GUESTS: u64 = 3;
/// Writes of a guest from one flush to the next.
const BURST: u64 = 8;

/// What is known of the blocks of one guest, and the region that it writes to now.
#[derive(Debug)]
struct Journal {
    known: Known,
    writing: Option<u64>,
}

/// A client of the export for the time of a whole mirror: it outlives the daemons, and waits for the next
/// one.
struct Guest {
    journal: Arc<Mutex<Journal>>,
    thread: JoinHandle<()>,
}

impl Guest {
    fn start(dir: &Path, seed: u64, id: u64, stop: &Arc<AtomicBool>) -> Self {
        let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd").display());
        let options = ClientOptions::new(uri.parse().unwrap()).writable(true).connections(1);
        let options = options.open_timeout(AWAY).reconnect_delay(AWAY);
        let journal = Arc::new(Mutex::new(Journal { known: Known::new(), writing: None }));
        let (own, stop) = (Arc::clone(&journal), Arc::clone(stop));
        let thread = thread::spawn(move || {
            let client = options.open().unwrap();
            let mut rng = Rng::new(seed, 10 + id);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..BURST {
                    let number = place(&mut rng, 100);
                    write(&client, &own, number - number % GUESTS + id);
                }
                flush(&client, &own);
            }
            // A flush that fails says once that writes are lost.
            assert!(flush(&client, &own) || flush(&client, &own), "the last flush fails");
        });
        Self { journal, thread }
    }
}

fn write(client: &Client, journal: &Mutex<Journal>, number: u64) {
    let version = {
        let mut journal = journal.lock().unwrap();
        journal.writing = Some(region_of(number));
        journal.known.send(number)
    };
    client.write_at(&block(number, version), number * BLOCK, WriteFlags::NONE).unwrap();
    let mut journal = journal.lock().unwrap();
    journal.writing = None;
    journal.known.acknowledged[number as usize] = version;
}

/// Whether what was acknowledged before is durable.
fn flush(client: &Client, journal: &Mutex<Journal>) -> bool {
    let flushed = client.flush();
    let known = &mut journal.lock().unwrap().known;
    match &flushed {
        Ok(()) => known.flushed.clone_from(&known.acknowledged),
        // Any of what it would have covered may have gone with a daemon.
        Err(_) => known.acknowledged.clone_from(&known.flushed),
    }
    flushed.is_ok()
}

/// A mirror that is killed several times.
struct Mirror<'a> {
    dir: &'a Path,
    format: &'static str,
    mode: &'static str,
    /// Bytes a second.
    speed: u64,
    guests: Vec<Guest>,
    case: String,
    /// Bytes in marked regions that the daemons after the first have found.
    again: u64,
    /// Kills before the mirror was ready, and after that.
    kills: [u32; 2],
}

impl Mirror<'_> {
    /// The regions that guests write to at the moment, and have written to since this was asked last.
    fn take_written(&self) -> BTreeSet<u64> {
        let mut regions = BTreeSet::new();
        for guest in &self.guests {
            let mut journal = guest.journal.lock().unwrap();
            regions.append(&mut journal.known.regions);
            // It is sent again.
            journal.known.regions = journal.writing.into_iter().collect();
        }
        regions
    }

    /// A daemon whose mirror is ready, and which is killed `delay` later.
    fn killed_when_ready(&self, delay: Duration) {
        let child = Mutex::new(Daemon::spawn(self.dir, self.format));
        assert!(self.works(&child).is_some(), "{}: the daemon has ended", self.case);
        thread::sleep(delay);
        let mut child = child.into_inner().unwrap();
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "{}: {status}", self.case);
    }

    /// A daemon that is killed after `delay`. Whether the mirror was ready before.
    fn killed(&self, delay: Duration) -> bool {
        let child = Daemon::spawn(self.dir, self.format);
        let began = Instant::now();
        let child = Arc::new(Mutex::new(child));
        let killer = {
            let child = Arc::clone(&child);
            thread::spawn(move || {
                thread::sleep(delay.saturating_sub(began.elapsed()));
                child.lock().unwrap().kill().unwrap();
            })
        };
        let ready = self.works(&child).is_some();
        killer.join().unwrap();
        let status = child.lock().unwrap().wait().unwrap();
        assert_eq!(status.signal(), Some(9), "{}: {status}", self.case);
        ready
    }

    /// The same lines each time. `None` if the daemon has ended before the mirror is ready.
    fn works(&self, child: &Mutex<Child>) -> Option<()> {
        let mut client = Daemon::connect(self.dir, || child.lock().unwrap().try_wait().unwrap().is_some())?;
        let mut args = mirror_args(self.dir, self.mode);
        args["speed"] = json!(self.speed);
        for (command, args) in [("blockdev-mirror", args), ("block-export-add", export_args())] {
            if let Err(error) = client.execute(command, args) {
                // One that is there yet has refused it.
                assert!(client.execute("query-version", json!({})).is_err(), "{}: {error}", self.case);
                return None;
            }
        }
        while client.next_event(AWAY).ok()??.name != "BLOCK_JOB_READY" {}
        Some(())
    }

    /// The log after a kill says no more than what was written since the daemon began, and, if the mirror was
    /// not `ready`, what it said `before`.
    fn check_log(&mut self, before: Option<&BTreeSet<u64>>, ready: bool) -> Option<BTreeSet<u64>> {
        let mut may = self.take_written();
        let Some((bytes, now)) = found(self.dir) else {
            assert!(before.is_none(), "{}: the log is gone", self.case);
            let path = self.dir.join("log");
            if fs::metadata(&path).is_ok_and(|log| log.len() == 0) {
                // Killed between the first two system calls that make it: it is refused until it is removed.
                fs::remove_file(path).unwrap();
            }
            return None;
        };
        if !ready {
            may.extend(before.cloned().unwrap_or_else(|| (0..LEN / MIB).collect()));
        }
        let more: Vec<_> = now.difference(&may).collect();
        assert!(more.is_empty(), "{}: {more:?} are marked, neither written nor missing", self.case);
        self.again += bytes;
        Some(now)
    }

    /// The last daemon: the job copies what is marked and ends, with the guests on either disk.
    fn completes(&mut self, pivot: bool, stop: &AtomicBool) {
        let before = found(self.dir).map(|(bytes, _)| bytes);
        let mut daemon = Daemon::start(self.dir, self.format);
        daemon.mirror(self.mode);
        let ready = daemon.wait_for("BLOCK_JOB_READY");
        // No guest writes yet.
        assert_eq!(ready["offset"], before.unwrap_or(LEN), "{}", self.case);
        daemon.export();
        stop.store(true, Ordering::Relaxed);
        let mut known = Known::new();
        for (id, guest) in self.guests.drain(..).enumerate() {
            guest.thread.join().unwrap();
            known.adopt(&guest.journal.lock().unwrap().known, |number| number % GUESTS == id as u64);
        }
        let end = if pivot { "job-complete" } else { "block-job-cancel" };
        daemon.must(end, json!({(if pivot { "id" } else { "device" }): "m"}));
        let completed = daemon.wait_for("BLOCK_JOB_COMPLETED");
        assert!(completed.get("error").is_none(), "{}: {completed}", self.case);
        daemon.must("quit", json!({}));
        daemon.child.wait().unwrap();
        check(self.dir, self.format, &known);
    }
}

/// Bytes that were copied again, and kills before and after the mirror was ready.
fn survives(seed: u64, whole: Duration) -> (u64, [u32; 2]) {
    let mut rng = Rng::new(seed, 9);
    let format = rng.pick(&["raw", "qcow2"]);
    let mode = rng.pick(&["background", "write-blocking"]);
    // Every other one takes most of a second.
    let speed = rng.pick(&[0, 64 * MIB]);
    let (kills, pivot) = (rng.range(1, 3), rng.one_in(2));
    let dir = scratch().unwrap();
    disks::create(dir.path(), format);
    let stop = Arc::new(AtomicBool::new(false));
    let guests = (0..GUESTS).map(|id| Guest::start(dir.path(), seed, id, &stop)).collect();
    let case = format!("seed {seed}: {format}, {mode}, speed {speed}");
    let mut mirror = Mirror { dir: dir.path(), format, mode, speed, guests, case, again: 0, kills: [0, 0] };
    let mut before = None;
    for kill in 0..kills {
        let copying = Duration::from_secs(LEN.checked_div(speed).unwrap_or(0));
        let delay = (whole * 4 + copying).mul_f64(rng.below(1000) as f64 / 1000.0);
        // Of every other mirror the first one comes after it is ready, however slow the machine is.
        let ready = if kill == 0 && seed.is_multiple_of(2) {
            mirror.killed_when_ready(Duration::from_millis(rng.below(100)));
            true
        } else {
            mirror.killed(delay)
        };
        mirror.kills[usize::from(ready)] += 1;
        before = mirror.check_log(before.as_ref(), ready);
    }
    mirror.completes(pivot, &stop);
    (mirror.again, mirror.kills)
}

/// How long a daemon takes to be ready.
fn time() -> Duration {
    let dir = scratch().unwrap();
    disks::create(dir.path(), "qcow2");
    let began = Instant::now();
    let mut daemon = Daemon::start(dir.path(), "qcow2");
    daemon.mirror("background");
    daemon.wait_for("BLOCK_JOB_READY");
    began.elapsed()
}

#[test]
fn a_live_mirror_whose_daemon_is_killed_at_any_instant_goes_on() {
    let number = |name, default| std::env::var(name).ok().map_or(default, |text| text.parse().unwrap());
    let (mirrors, first) = (number("BLOCKMIRROR_LIVE_KILLS", 8), number("BLOCKMIRROR_KILL_SEED", 1) * 1000);
    let (whole, mut again, mut kills) = (time(), 0, [0, 0]);
    for seed in first..first + mirrors {
        let (bytes, more) = survives(seed, whole);
        again += bytes;
        kills = [kills[0] + more[0], kills[1] + more[1]];
    }
    assert!(u64::from(kills[1]) >= mirrors / 2, "{kills:?}");
    println!(
        "{mirrors} mirrors, killed {} times before they were ready and {} times after that; {} MiB of {} were \
         copied again",
        kills[0],
        kills[1],
        again / MIB,
        u64::from(kills[0] + kills[1]) * LEN / MIB,
    );
}
