//! Power cuts during a live mirror with a log: where the two disks differ, the log has the region marked.
//!
//! Log, source and target are recorded in one order. After each change of any of them the power fails: each
//! keeps what was flushed, and any part of the rest. Now and then the mirror goes on from there, under a
//! guest that writes, and is cut again.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{MemoryStorage, Rng};
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags, ZeroFlags};
use blockmirror_checkpoint::{ActivityLog, Error};
use blockmirror_mirror::{CopyMode, Event, LiveLog, MirrorJob, MirrorOptions, Tap};
use blockmirror_qcow2::CreateOptions;

use super::history::{History, Part};
use super::{disk, states};
use crate::region_log::LogOnStorage;

const LEN: u64 = 1 << 20;
const REGION: u64 = 32 << 10;
const NAMES: [&str; 3] = ["log", "source", "target"];
const LOG: usize = 0;
const SOURCE: usize = 1;
const TARGET: usize = 2;
/// Writes of each guest.
const WRITES: u64 = 24;
const FOREVER: Duration = Duration::from_secs(120);

/// What is on stable storage of log, source and target.
type Stored = [Vec<u8>; 3];

/// Which of source and target are qcow2 images.
type Formats = [bool; 2];

/// A mirror that was recorded.
struct Mirror {
    formats: Formats,
    history: Arc<History>,
    parts: [Arc<Part>; 3],
    /// Changes when the log was there.
    logged: usize,
    /// Both disks are equal at the end.
    whole: bool,
}

/// Disks before their first mirror: the source has contents, the target none.
fn new_disks(rng: &mut Rng, formats: Formats) -> Stored {
    let disks = formats.map(|qcow2| {
        let storage = Arc::new(MemoryStorage::new());
        match qcow2 {
            true => CreateOptions::new(LEN).create(&*storage, None).unwrap(),
            false => storage.set_len(LEN).unwrap(),
        }
        storage
    });
    let source = disk(Arc::clone(&disks[0]) as _, formats[0]);
    for at in (0..LEN).step_by(16 << 10).filter(|_| !rng.one_in(3)).collect::<Vec<_>>() {
        source.write_at(&[rng.range(1, 255) as u8; 16 << 10], at, WriteFlags::NONE).unwrap();
    }
    source.flush().unwrap();
    drop(source);
    [Vec::new(), disks[0].to_vec(), disks[1].to_vec()]
}

/// Writes to `tap`, and now and then flushes it.
fn guest(tap: &Tap, mut rng: Rng) {
    for _ in 0..WRITES {
        let range = rng.byte_range(ByteRange::new(0, LEN), 12 << 10);
        let range = range.align_outward(512).intersect(ByteRange::new(0, LEN));
        let bytes = vec![rng.range(1, 255) as u8; range.len() as usize];
        match rng.below(8) {
            0 => tap.flush(),
            1 => tap.discard(range),
            2 => tap.write_zeroes(range, ZeroFlags::NONE),
            _ => tap.write_at(&bytes, range.start(), WriteFlags::NONE),
        }
        .unwrap();
    }
}

impl Mirror {
    /// A mirror of what is `stored`: with the log that is there, or a new one where there is none.
    fn record(rng: &mut Rng, formats: Formats, stored: Stored) -> Self {
        let history = Arc::new(History::default());
        let mut index = 0..;
        let parts = stored.map(|base| {
            let index = index.next().unwrap();
            history.part(index, NAMES[index], base)
        });
        let storage = Arc::clone(&parts[LOG]) as _;
        let resumed = parts[LOG].own().len().unwrap() > 0;
        let log = match resumed {
            true => LogOnStorage::open(storage),
            false => LogOnStorage::create(storage, LEN, REGION),
        };
        let logged = history.len();
        let [source, target] = [(SOURCE, formats[0]), (TARGET, formats[1])]
            .map(|(part, qcow2)| disk(Arc::clone(&parts[part]) as _, qcow2));
        let mode = rng.pick(&[CopyMode::Background, CopyMode::WriteBlocking]);
        let live = LiveLog::new(log).active_regions(rng.range(1, 6) as usize).interval(128 << 10);
        let options = MirrorOptions::new().buf_size(64 << 10).copy_mode(mode).live_log(live);
        let tap = Tap::new(Arc::clone(&source));
        let job = MirrorJob::attach(&tap, Arc::clone(&target), options).unwrap();
        let seeds = [rng.next(), rng.next()];
        thread::scope(|scope| {
            for seed in seeds {
                let tap = &tap;
                scope.spawn(move || guest(tap, Rng::new(seed, 6)));
            }
        });
        let whole = Self::end(rng, &job);
        assert_eq!(job.wait().is_ok(), whole);
        drop(tap);
        if whole {
            assert!(contents(&*source) == contents(&*target), "the copy differs");
        }
        Self { formats, history, parts, logged, whole }
    }

    /// Ends `job`, in one way or another. Whether its copy is kept.
    fn end(rng: &mut Rng, job: &MirrorJob) -> bool {
        let control = job.control();
        let kind = rng.below(6);
        if kind > 1 {
            while control.next_event(Some(FOREVER)).unwrap() != Event::Ready {}
        }
        match kind {
            0 | 2 => control.cancel(),
            // The process is about to end: the log stays.
            1 | 3 => {
                control.keep_log();
                control.cancel();
            }
            4 => control.keep_copy().unwrap(),
            _ => control.complete().unwrap(),
        }
        kind > 3
    }

    /// Checks states until there are `most`.
    fn check(&self, rng: &mut Rng, most: usize, what: &str, seen: &mut Seen) {
        let entries = [LOG, SOURCE, TARGET].map(|part| self.parts[part].own().log());
        for changes in 0..=self.history.len() {
            for _ in 0..3 {
                if seen.states == most {
                    return;
                }
                seen.states += 1;
                let stored = [LOG, SOURCE, TARGET].map(|part| {
                    let position = self.history.position(part, changes);
                    self.parts[part].after_cut(&entries[part], position, rng)
                });
                let what = format!("{what}, cut after {changes}");
                if self.check_state(&stored, changes >= self.logged, &what, seen) && rng.one_in(24) {
                    seen.resumed += 1;
                    let next = Self::record(rng, self.formats, stored);
                    seen.whole += usize::from(next.whole);
                    if rng.one_in(8) {
                        next.check(rng, most, &format!("{what}, gone on"), seen);
                    }
                }
            }
        }
    }

    /// Whether a mirror can go on from what is `stored`.
    fn check_state(&self, stored: &Stored, is_logged: bool, what: &str, seen: &mut Seen) -> bool {
        let log = match ActivityLog::open(Arc::new(MemoryStorage::with_contents(&stored[LOG]))) {
            Err(Error::NoCheckpoint { .. } | Error::NotBegun { .. }) => {
                assert!(!is_logged, "{what}: the log is gone");
                return false;
            }
            log => log.unwrap(),
        };
        if log.is_ended() {
            return false;
        }
        let [source, target] = [(SOURCE, self.formats[0]), (TARGET, self.formats[1])].map(|(part, qcow2)| {
            contents(&*disk(Arc::new(MemoryStorage::with_contents(&stored[part])), qcow2))
        });
        seen.telling += usize::from(log.marked_bytes() < LEN);
        for region in (0..LEN / REGION).filter(|region| !log.regions().get(*region)) {
            let bytes = (region * REGION) as usize..((region + 1) * REGION) as usize;
            assert!(source[bytes.clone()] == target[bytes], "{what}: {region} differs and is not marked");
        }
        true
    }
}

/// All of a disk.
fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Debug, Default)]
struct Seen {
    states: usize,
    /// In which a region was clear.
    telling: usize,
    /// From which a mirror has gone on, and in how many of those to its end.
    resumed: usize,
    whole: usize,
}

#[test]
fn where_the_disks_differ_the_log_has_marked_the_region() {
    let (most, mut seen) = (states(1200), Seen::default());
    for seed in 0.. {
        let mut rng = Rng::new(seed, 2);
        let formats = [rng.one_in(2), rng.one_in(2)];
        let stored = new_disks(&mut rng, formats);
        let mirror = Mirror::record(&mut rng, formats, stored);
        mirror.check(&mut rng, most, &format!("seed {seed}"), &mut seen);
        if seen.states >= most {
            break;
        }
    }
    assert!(seen.telling * 3 > seen.states && seen.resumed * 100 > seen.states, "{seen:?}");
    println!("{seen:?}");
}
