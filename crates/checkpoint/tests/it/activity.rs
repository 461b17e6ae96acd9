//! Logs of live jobs: what they say after they are opened again, after every power cut, and after failures.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a run of regions is a range")]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use blockmirror_block::testing::{
    Fault, FaultStorage, Faults, Logged, MemoryStorage, OpKind, RecordingStorage, Rng,
};
use blockmirror_block::{ByteRange, ErrorKind, Storage};
use blockmirror_checkpoint::{ActivityLog, Checkpoint, Error, Identity, MAX_REGIONS};

const REGION: u64 = 1 << 20;

fn new(storage: &Arc<MemoryStorage>, regions: u64) -> ActivityLog {
    ActivityLog::create(Arc::clone(storage) as _, regions * REGION, REGION, Identity::new()).unwrap()
}

fn marked(log: &ActivityLog) -> Vec<u64> {
    let regions = log.regions();
    (0..regions.len()).filter(|region| regions.get(*region)).collect()
}

#[test]
fn all_is_marked_at_first_and_changes_are_there_when_it_is_opened_again() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 10);
    assert_eq!(log.marked_bytes(), 10 * REGION);
    log.update(&[], &[0..4, 3..99]).unwrap();
    log.update(&[2..4, 9..100], &[1..3]).unwrap();
    let mut log = ActivityLog::open(Arc::clone(&storage) as _).unwrap();
    assert_eq!((marked(&log), log.is_ended()), (vec![2, 3, 9], false));
    let mib = |from: u64, to: u64| ByteRange::new(from * REGION, to * REGION);
    assert_eq!(log.marked().collect::<Vec<_>>(), [mib(2, 4), mib(9, 10)]);
    log.update(&[0..1], &[3..4]).unwrap();
    assert_eq!(marked(&ActivityLog::open(storage).unwrap()), [0, 2, 9]);
}

#[test]
fn a_region_that_is_marked_and_cleared_is_marked() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.update(&[5..6], &[0..8]).unwrap();
    assert_eq!((marked(&log), marked(&ActivityLog::open(storage).unwrap())), (vec![5], vec![5]));
}

#[test]
fn a_call_that_changes_nothing_writes_nothing() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.update(&[], &[0..4]).unwrap();
    let before = storage.to_vec();
    log.update(&[5..7, 8..9], &[1..2, 4..4, 6..7]).unwrap();
    log.update(&[], &[]).unwrap();
    assert!(storage.to_vec() == before);
}

/// Each area holds some thousands of records; several are filled here, and the file does not grow.
#[test]
fn a_full_area_is_left_for_the_other() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 20_000);
    let len = storage.len().unwrap();
    log.update(&[], &[0..20_000]).unwrap();
    for region in 0..10_000 {
        let before = region.max(100) - 100;
        log.update(&[region..region + 1], &[before..before + 1]).unwrap();
    }
    assert_eq!(storage.len().unwrap(), len);
    assert_eq!(
        marked(&ActivityLog::open(Arc::clone(&storage) as _).unwrap()),
        (9900..10_000).collect::<Vec<_>>()
    );
    // More runs than any record has room for.
    let mut log = new(&storage, MAX_REGIONS);
    let runs: Vec<_> = (0..MAX_REGIONS / 2).map(|n| 2 * n..2 * n + 1).collect();
    log.update(&[], &runs).unwrap();
    assert_eq!(ActivityLog::open(storage).unwrap().marked_bytes(), MAX_REGIONS / 2 * REGION);
}

#[test]
fn the_end_is_kept_and_is_the_last() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.update(&[], &[0..8]).unwrap();
    log.end().unwrap();
    log.end().unwrap();
    for log in [&mut log, &mut ActivityLog::open(Arc::clone(&storage) as _).unwrap()] {
        assert!(log.is_ended());
        assert!(matches!(log.update(&[0..1], &[]), Err(Error::Ended { .. })));
    }
    // As the first thing that is done to it, too.
    new(&storage, 8);
    ActivityLog::open(Arc::clone(&storage) as _).unwrap().end().unwrap();
    assert!(ActivityLog::open(storage).unwrap().is_ended());
}

#[test]
fn one_that_was_made_invalid_is_none_and_stays_so() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.update(&[], &[1..3]).unwrap();
    log.invalidate().unwrap();
    assert_eq!(log.marked_bytes(), 8 * REGION, "nothing is known");
    log.update(&[], &[1..3]).unwrap_err();
    assert!(matches!(ActivityLog::open(storage), Err(Error::NoCheckpoint { .. })));
}

#[test]
fn neither_kind_of_log_is_taken_for_the_other() {
    let storage = Arc::new(MemoryStorage::new());
    new(&storage, 8);
    assert!(matches!(Checkpoint::open(Arc::clone(&storage) as _), Err(Error::OtherKind { kind: 2, .. })));
    Checkpoint::create(Arc::clone(&storage) as _, REGION, REGION, Identity::new()).unwrap();
    assert!(matches!(ActivityLog::open(storage), Err(Error::OtherKind { kind: 1, .. })));
}

/// Every write and flush of a sequence of calls fails once: what was reported is there, and nothing is
/// cleared that was not asked for.
#[test]
fn after_a_failure_the_log_can_be_used_on_or_says_that_it_cannot() {
    for kind in [OpKind::Write, OpKind::Flush] {
        for nth in 0.. {
            let memory = Arc::new(MemoryStorage::new());
            new(&memory, 8).update(&[], &[1..8]).unwrap();
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(memory.clone(), faults.clone()));
            let mut log = ActivityLog::open(storage).unwrap();
            faults.inject(Fault::on(kind).after(nth));
            let mut reported = vec![0];
            for region in 1..5 {
                match log.update(&[region..region + 1], &[6..8]) {
                    Ok(()) => reported.push(region),
                    Err(Error::Storage(_)) => {}
                    Err(other) => unreachable!("{other}"),
                }
            }
            let found = marked(&ActivityLog::open(memory).unwrap());
            assert!(reported.iter().all(|region| found.contains(region)), "{kind:?} {nth}: {found:?}");
            if faults.failed() == 0 {
                assert_eq!(found, [0, 1, 2, 3, 4]);
                break;
            }
        }
    }
}

#[test]
fn a_header_that_may_be_there_ends_the_log() {
    let memory = Arc::new(MemoryStorage::new());
    new(&memory, 8);
    let faults = Faults::new();
    let mut log = ActivityLog::open(Arc::new(FaultStorage::new(memory, faults.clone()))).unwrap();
    // The third flush of a new area is that of its header.
    faults.inject(Fault::on(OpKind::Flush).after(2));
    assert!(log.update(&[], &[1..2]).is_err());
    let Err(Error::Storage(error)) = log.update(&[], &[1..2]) else { unreachable!("it was used on") };
    assert_eq!(error.kind(), ErrorKind::Poisoned);
}

/// One change of a session: where in the recording it had returned, and what it asked for.
struct Call {
    returned: usize,
    mark: Range<u64>,
    clear: Range<u64>,
}

const REGIONS: u64 = 600;

/// Calls on a log that is opened anew every few of them, so that areas change often.
fn play(seed: u64, calls: usize) -> (Arc<RecordingStorage>, usize, Vec<Call>) {
    let storage = Arc::new(RecordingStorage::default());
    let mut log =
        ActivityLog::create(Arc::clone(&storage) as _, REGIONS * REGION, REGION, Identity::new()).unwrap();
    let created = storage.position();
    let mut rng = Rng::new(seed, 2);
    let run = |rng: &mut Rng| {
        let first = rng.below(REGIONS);
        first..(first + rng.range(0, 80)).min(REGIONS)
    };
    let calls = (0..calls).map(|_| {
        if rng.one_in(3) {
            log = ActivityLog::open(Arc::clone(&storage) as _).unwrap();
        }
        let (mark, clear) = (run(&mut rng), run(&mut rng));
        log.update(std::slice::from_ref(&mark), std::slice::from_ref(&clear)).unwrap();
        // What the last write of all leaves is no state of its own among those below.
        assert!(matches!(storage.log().last(), Some(Logged::Flush)), "it returns before it is durable");
        Call { returned: storage.position(), mark, clear }
    });
    let calls = calls.collect();
    (storage, created, calls)
}

/// What is marked after the calls that had returned by `position`, and the call under way then.
fn model(calls: &[Call], position: usize) -> (BTreeSet<u64>, Option<&Call>) {
    let mut marked: BTreeSet<u64> = (0..REGIONS).collect();
    for call in calls {
        if call.returned > position {
            return (marked, Some(call));
        }
        call.clear.clone().filter(|region| !call.mark.contains(region)).for_each(|region| {
            marked.remove(&region);
        });
        marked.extend(call.mark.clone());
    }
    (marked, None)
}

/// A process was killed between the write and the flush of an update; the next one believes the mark.
#[test]
fn what_an_opened_log_has_marked_survives_a_power_cut() {
    let memory = Arc::new(MemoryStorage::new());
    new(&memory, 8).update(&[], &[0..8]).unwrap();
    let mut log = ActivityLog::open(Arc::clone(&memory) as _).unwrap();
    log.update(&[1..2], &[]).unwrap();
    let clean = memory.to_vec();
    log.update(&[3..4], &[]).unwrap();
    let storage = Arc::new(RecordingStorage::with_contents(&clean));
    // The last update, without its flush.
    let after = memory.to_vec();
    let at = (0..clean.len()).find(|at| after[*at] != clean[*at]).unwrap() / 512 * 512;
    storage.write_at(&after[at..at + 512], at as u64).unwrap();
    let log = ActivityLog::open(Arc::clone(&storage) as _).unwrap();
    assert_eq!(marked(&log), [1, 3]);
    assert!(matches!(storage.log().last(), Some(Logged::Flush)), "what it says is not durable");
}

#[test]
fn after_a_power_cut_no_region_is_clear_that_was_marked() {
    let mut points = 0;
    for seed in 0..6 {
        let (storage, created, calls) = play(seed, 30);
        for point in storage.crash_points() {
            points += 1;
            let mut log = match ActivityLog::open(Arc::new(point.storage())) {
                Ok(log) => log,
                Err(Error::NoCheckpoint { .. } | Error::NotBegun { .. }) => {
                    assert!(point.position() < created, "{point}: the log is gone");
                    continue;
                }
                Err(error) => unreachable!("{point}: {error}"),
            };
            let (marked, under_way) = model(&calls, point.position());
            for region in 0..REGIONS {
                let may_clear = under_way.is_some_and(|call| call.clear.contains(&region));
                let may_mark = under_way.is_some_and(|call| call.mark.contains(&region));
                let (found, was) = (log.regions().get(region), marked.contains(&region));
                assert!(found || !was || may_clear, "{point}: region {region} was marked, and is clear");
                assert!(!found || was || may_mark, "{point}: region {region} is marked, and was not");
            }
            // The next run goes on from any of them.
            log.update(&[0..REGIONS], &[]).unwrap();
        }
    }
    assert!(points > 500, "{points}");
}

/// A log in its second area, whose last updates clear: what is lost of those does no harm.
fn sample() -> (Vec<u8>, Vec<u64>) {
    let storage = Arc::new(MemoryStorage::new());
    new(&storage, 100).update(&[], &[0..90]).unwrap();
    let mut log = ActivityLog::open(Arc::clone(&storage) as _).unwrap();
    for region in [7, 8, 3, 20, 21] {
        log.update(&[region..region + 1], &[]).unwrap();
    }
    log.update(&[40..42], &[95..99]).unwrap();
    log.update(&[], &[93..94]).unwrap();
    log.update(&[], &[94..95]).unwrap();
    let marked = marked(&log);
    (storage.to_vec(), marked)
}

#[test]
fn no_changed_byte_clears_a_region() {
    let (sample, wanted) = sample();
    let mut refused = 0;
    for at in 0..sample.len() {
        // Of the zeros that nothing has taken, some will do.
        if sample[at] == 0 && at % 509 > 0 {
            continue;
        }
        for flip in [0x40, 0xff] {
            let mut bytes = sample.clone();
            bytes[at] ^= flip;
            match ActivityLog::open(Arc::new(MemoryStorage::with_contents(&bytes))) {
                Ok(log) => {
                    let found = marked(&log);
                    assert!(wanted.iter().all(|region| found.contains(region)), "byte {at}: {found:?}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn random_changes_never_panic() {
    let (sample, _) = sample();
    for seed in 0..300 {
        let mut rng = Rng::new(seed, 4);
        let mut bytes = sample.clone();
        for _ in 0..rng.range(1, 8) {
            let at = rng.index(bytes.len());
            bytes[at] = rng.next() as u8;
        }
        if rng.one_in(4) {
            bytes.truncate(rng.index(bytes.len()));
        }
        let _ = ActivityLog::open(Arc::new(MemoryStorage::with_contents(&bytes)));
    }
}
