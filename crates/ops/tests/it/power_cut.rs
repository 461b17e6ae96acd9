//! Power cuts during a copy with a checkpoint: whatever the log says is done, the target has, and the digests
//! in the log are those of what it has.
//!
//! Target and log are recorded. For every state that a power cut could leave of the log, the target is put
//! into states that the same instant could leave of it: all that was not flushed is lost, or none of it, or
//! any part, torn between sectors. Now and then a copy goes on from there. `BLOCKMIRROR_POWER_CUTS` asks
//! for more states (`cargo xtask power-cut`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod history;
mod live;

use std::num::NonZeroUsize;
use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{MemoryDisk, MemoryStorage, Rng};
use blockmirror_block::{BlockDevice, ByteRange, Result, Storage};
use blockmirror_checkpoint::{Checkpoint, Digest, Identity};
use blockmirror_hash::block_digest;
use blockmirror_mirror::{CheckpointSink, Checkpoints, MirrorJob, MirrorOptions};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Repair};
use blockmirror_raw::{Raw, RawOptions};
use history::{History, Part};

const LEN: u64 = 2 << 20;
const REGION: u64 = 64 << 10;
const INTERVAL: u64 = 192 << 10;

/// The storages of a copy's history.
const TARGET: usize = 0;
const LOG: usize = 1;

#[derive(Debug)]
struct Sink {
    log: Mutex<Checkpoint>,
    source: Arc<MemoryDisk>,
}

impl CheckpointSink for Sink {
    fn record(&self, missing: &[ByteRange]) -> Result<()> {
        let mut log = self.log.lock();
        if !log.has_digests() {
            log.mark_except(missing).unwrap();
            return Ok(());
        }
        let done = log.all_except(missing);
        log.mark_with(&done, &mut |region| digest_of(&*self.source, region)).unwrap();
        Ok(())
    }
}

/// The digest of a region of `disk`.
fn digest_of(disk: &dyn BlockDevice, region: u64) -> Digest {
    let mut bytes = vec![0; REGION as usize];
    disk.read_at(&mut bytes, region * REGION).unwrap();
    *block_digest(&bytes).first_chunk().unwrap()
}

/// A copy that was recorded.
struct Copy {
    qcow2: bool,
    source: Arc<MemoryDisk>,
    history: Arc<History>,
    target: Arc<Part>,
    log: Arc<Part>,
}

fn disk(storage: Arc<dyn Storage>, qcow2: bool) -> Arc<dyn BlockDevice> {
    match qcow2 {
        true => Arc::new(OpenOptions::new().writable(true).open(storage).unwrap()),
        false => Arc::new(Raw::open(storage, RawOptions::new()).unwrap()),
    }
}

impl Copy {
    fn record(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0);
        let mut bytes = vec![0; LEN as usize];
        for piece in bytes.chunks_mut(32 << 10) {
            if !rng.one_in(4) {
                piece.fill(rng.range(1, 255) as u8);
            }
        }
        let source = Arc::new(MemoryDisk::with_contents(&bytes));
        let (history, qcow2) = (Arc::new(History::default()), rng.one_in(2));
        let target = history.part(TARGET, "target", Vec::new());
        match qcow2 {
            true => CreateOptions::new(LEN).create(&*target, None).unwrap(),
            false => target.set_len(LEN).unwrap(),
        }
        let log = history.part(LOG, "log", Vec::new());
        let storage = Arc::clone(&log) as _;
        let checkpoint = match rng.one_in(2) {
            true => Checkpoint::create_with_digests(storage, LEN, REGION, Identity::new()),
            false => Checkpoint::create(storage, LEN, REGION, Identity::new()),
        };
        let sink = Sink { log: Mutex::new(checkpoint.unwrap()), source: Arc::clone(&source) };
        let checkpoints = Checkpoints::new(Arc::new(sink), INTERVAL);
        let threads = NonZeroUsize::new(rng.range(1, 4) as usize);
        let options = MirrorOptions::new().buf_size(256 << 10).threads(threads);
        let image = disk(Arc::clone(&target) as _, qcow2);
        let job = MirrorJob::start_with_checkpoints(Arc::clone(&source) as _, image, options, checkpoints);
        job.unwrap().wait().unwrap();
        Self { qcow2, source, history, target, log }
    }

    /// Checks states until there are `most`; how many, and in how many of them something was done.
    fn check(&self, seed: u64, most: usize) -> (usize, usize) {
        let (want, entries) = (self.source.contents().unwrap(), self.target.own().log());
        let mut rng = Rng::new(seed, 1);
        let (mut points, mut telling) = (0, 0);
        for point in self.log.own().crash_points() {
            let Ok(log) = Checkpoint::open(Arc::new(point.storage())) else { continue };
            let at = self.history.position(TARGET, self.history.reaching(LOG, point.position()));
            for _ in 0..3 {
                points += 1;
                if points > most {
                    return (points - 1, telling);
                }
                let state = self.target.after_cut(&entries, at, &mut rng);
                telling += usize::from(log.marked_bytes() > 0);
                self.check_state(&log, &state, &want, &format!("seed {seed}, {point}"));
                if rng.one_in(16) {
                    self.go_on(&log, &state, &want);
                }
            }
        }
        (points, telling)
    }

    fn check_state(&self, log: &Checkpoint, state: &[u8], want: &[u8], what: &str) {
        if log.marked_bytes() == 0 {
            return;
        }
        let image = disk(Arc::new(MemoryStorage::with_contents(state)), self.qcow2);
        for done in log.marked() {
            let mut found = vec![0; done.len() as usize];
            image.read_at(&mut found, done.start()).unwrap();
            let want = &want[done.start() as usize..done.end() as usize];
            let differs = || found.iter().zip(want).position(|(a, b)| a != b).unwrap() as u64;
            assert!(found == want, "{what}: {:#x} is done, and not there", done.start() + differs());
            for region in (done.start() / REGION..done.end() / REGION).filter(|_| log.has_digests()) {
                assert_eq!(log.digest(region), Some(digest_of(&*image, region)), "{what}: region {region}");
            }
        }
    }

    /// Another run copies what is left.
    fn go_on(&self, log: &Checkpoint, state: &[u8], want: &[u8]) {
        if log.marked_bytes() == 0 {
            return;
        }
        let storage = Arc::new(MemoryStorage::with_contents(state));
        if self.qcow2 {
            let report = blockmirror_qcow2::repair(&*storage, Repair::Leaks, &mut ()).unwrap();
            assert_eq!(report.corruptions, 0);
        }
        let image = disk(Arc::clone(&storage) as _, self.qcow2);
        let mut left = DirtyBitmap::new(LEN, REGION).unwrap();
        left.set_all();
        log.marked().for_each(|done| _ = left.clear(done.start()..done.end()));
        let options = MirrorOptions::new().only(left);
        let job = MirrorJob::start(Arc::clone(&self.source) as _, Arc::clone(&image), options).unwrap();
        job.wait().unwrap();
        let mut found = vec![0; want.len()];
        image.read_at(&mut found, 0).unwrap();
        assert!(found == want, "what was gone on with is another disk");
    }
}

/// How many states a test looks at: `few`, or as many as the environment asks for.
fn states(few: usize) -> usize {
    std::env::var("BLOCKMIRROR_POWER_CUTS").ok().map_or(few, |most| most.parse().unwrap())
}

#[test]
fn what_the_log_says_is_done_the_target_has() {
    let most = states(600);
    let (mut points, mut telling) = (0, 0);
    for seed in 0.. {
        let (more, some) = Copy::record(seed).check(seed, most - points);
        (points, telling) = (points + more, telling + some);
        if points >= most {
            break;
        }
    }
    assert!(telling * 2 > points, "{telling} of {points}");
    println!("{points} states, in {telling} of them something was done");
}
