//! What a log says after it is opened again, however it was filled.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a run of regions is a range")]

use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{ByteRange, ErrorKind, Storage};
use blockmirror_checkpoint::{Checkpoint, Error, Identity, MAX_IDENTITY, MAX_REGIONS, region_size};

const REGION: u64 = 1 << 20;

fn new(storage: &Arc<MemoryStorage>, regions: u64) -> Checkpoint {
    Checkpoint::create(Arc::clone(storage) as _, regions * REGION, REGION, Identity::new()).unwrap()
}

fn marked(log: &Checkpoint) -> Vec<u64> {
    let regions = log.regions();
    (0..regions.len()).filter(|region| regions.get(*region)).collect()
}

#[test]
fn regions_are_no_more_than_a_log_can_hold() {
    for (len, unit, size) in [
        (0, 1, 1 << 20),
        (1 << 40, 65_536, 1 << 20),
        ((1 << 40) + 1, 65_536, 2 << 20),
        (1, 2 << 20, 2 << 20),
        (i64::MAX as u64, 1, 1 << 43),
    ] {
        assert_eq!(region_size(len, unit), size, "{len}");
        assert!(len.div_ceil(size) <= MAX_REGIONS);
    }
}

#[test]
fn marks_are_there_when_the_log_is_opened_again() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log =
        Checkpoint::create(Arc::clone(&storage) as _, 10 * REGION - 1, REGION, Identity::new()).unwrap();
    assert_eq!((log.marked_bytes(), log.region_size(), log.disk_len()), (0, REGION, 10 * REGION - 1));
    log.mark(&[1..3, 5..6]).unwrap();
    log.mark(&[2..4, 9..100]).unwrap();
    let log = Checkpoint::open(storage).unwrap();
    assert_eq!(marked(&log), [1, 2, 3, 5, 9]);
    let ranges: Vec<_> = log.marked().collect();
    let mib = |from: u64, to: u64| ByteRange::new(from * REGION, to * REGION);
    assert_eq!(ranges, [mib(1, 4), mib(5, 6), ByteRange::new(9 * REGION, 10 * REGION - 1)]);
    assert_eq!(log.marked_bytes(), 5 * REGION - 1);
}

#[test]
fn one_that_was_made_invalid_is_none_and_stays_so() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.mark(&[1..3]).unwrap();
    log.invalidate().unwrap();
    assert_eq!(log.marked_bytes(), 0);
    log.mark(&[1..3]).unwrap_err();
    assert!(matches!(Checkpoint::open(storage), Err(Error::NotBegun { .. })));
}

#[test]
fn a_copy_that_is_to_be_verified_stays_so() {
    for digests in [true, false] {
        let storage = Arc::new(MemoryStorage::new());
        let own = Arc::clone(&storage) as _;
        let make = if digests { Checkpoint::create_with_digests } else { Checkpoint::create };
        let mut log = make(own, 8 * REGION, REGION, Identity::new()).unwrap();
        let mark = |log: &mut Checkpoint, region: u64| match digests {
            true => log.mark_with(&[region..region + 1], &mut |_| [7; 16]).unwrap(),
            false => log.mark(&[region..region + 1]).unwrap(),
        };
        mark(&mut log, 1);
        assert!(!log.requires_verification());
        log.require_verification().unwrap();
        mark(&mut log, 3);
        let mut log = Checkpoint::open(Arc::clone(&storage) as _).unwrap();
        assert!(log.requires_verification());
        assert_eq!(marked(&log), [1, 3]);
        mark(&mut log, 5);
        log.require_verification().unwrap();
        let log = Checkpoint::open(storage).unwrap();
        assert!(log.requires_verification());
        assert_eq!(marked(&log), [1, 3, 5]);
    }
}

#[test]
fn a_region_that_lacks_a_byte_is_not_marked() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    let at = |start, len| ByteRange::at(start, len);
    log.mark_except(&[at(REGION - 1, 1), at(3 * REGION - 1, 2), at(5 * REGION, 0), at(6 * REGION, 512)])
        .unwrap();
    assert_eq!(marked(&Checkpoint::open(Arc::clone(&storage) as _).unwrap()), [1, 4, 5, 7]);
    log.mark_except(&[at(0, 8 * REGION)]).unwrap();
    assert_eq!(marked(&log), [1, 4, 5, 7], "a mark stays");
    log.mark_except(&[]).unwrap();
    assert_eq!(log.marked_bytes(), 8 * REGION);
}

#[test]
fn a_call_that_marks_nothing_new_writes_nothing() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.mark(&[0..4]).unwrap();
    let before = storage.to_vec();
    log.mark(&[1..2, 3..4, 8..9]).unwrap();
    log.mark(&[]).unwrap();
    assert!(storage.to_vec() == before);
}

/// Each area holds some thousands of records; several are filled here, and the file does not grow.
#[test]
fn a_full_area_is_left_for_the_other() {
    let storage = Arc::new(MemoryStorage::new());
    let regions = 20_000;
    let mut log = new(&storage, regions);
    let len = storage.len().unwrap();
    for region in (0..regions).rev() {
        log.mark(&[region..region + 1]).unwrap();
    }
    assert_eq!(storage.len().unwrap(), len);
    assert_eq!(Checkpoint::open(Arc::clone(&storage) as _).unwrap().marked_bytes(), regions * REGION);
    // More runs than any record has room for.
    let mut log = new(&storage, MAX_REGIONS);
    let runs: Vec<_> = (0..MAX_REGIONS / 2).map(|n| 2 * n..2 * n + 1).collect();
    log.mark(&runs).unwrap();
    assert_eq!(Checkpoint::open(storage).unwrap().marked_bytes(), MAX_REGIONS / 2 * REGION);
}

#[test]
fn a_log_that_was_opened_can_be_extended() {
    let storage = Arc::new(MemoryStorage::new());
    new(&storage, 8).mark(&[0..1]).unwrap();
    for region in 1..8 {
        let mut log = Checkpoint::open(Arc::clone(&storage) as _).unwrap();
        log.mark(&[region..region + 1]).unwrap();
        assert_eq!(log.marked_bytes(), (region + 1) * REGION);
    }
    assert_eq!(marked(&Checkpoint::open(storage).unwrap()).len(), 8);
}

#[test]
fn another_log_in_the_same_storage_has_nothing_of_the_first() {
    let storage = Arc::new(MemoryStorage::new());
    new(&storage, 8).mark(&[0..8]).unwrap();
    new(&storage, 8);
    assert_eq!(Checkpoint::open(storage).unwrap().marked_bytes(), 0);
}

#[test]
fn what_cannot_be_held_is_refused() {
    let create = |len, region, identity| {
        Checkpoint::create(Arc::new(MemoryStorage::new()), len, region, identity).map(drop)
    };
    assert!(matches!(create(MAX_REGIONS * REGION + 1, REGION, Identity::new()), Err(Error::TooLarge { .. })));
    assert!(matches!(create(REGION, REGION + 1, Identity::new()), Err(Error::TooLarge { .. })));
    assert!(matches!(create(REGION, 0, Identity::new()), Err(Error::TooLarge { .. })));
    let mut identity = Identity::new();
    identity.push("long", vec![b'x'; MAX_IDENTITY]);
    assert!(matches!(create(REGION, REGION, identity), Err(Error::TooLarge { .. })));
    create(0, REGION, Identity::new()).unwrap();
}

/// Every write and flush of a sequence of calls fails once: no mark is lost that was reported, and none is
/// there that was not asked for.
#[test]
fn after_a_failure_the_log_can_be_used_on_or_says_that_it_cannot() {
    for kind in [OpKind::Write, OpKind::Flush] {
        for nth in 0.. {
            let memory = Arc::new(MemoryStorage::new());
            let mut log = new(&memory, 8);
            log.mark(&[0..1]).unwrap();
            drop(log);
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(memory.clone(), faults.clone()));
            let mut log = Checkpoint::open(storage).unwrap();
            faults.inject(Fault::on(kind).after(nth));
            let mut reported = vec![0];
            for region in 1..5 {
                match log.mark(&[region..region + 1]) {
                    Ok(()) => reported.push(region),
                    Err(Error::Storage(_)) => {}
                    Err(other) => unreachable!("{other}"),
                }
            }
            let found = marked(&Checkpoint::open(memory).unwrap());
            assert!(reported.iter().all(|region| found.contains(region)), "{kind:?} {nth}: {found:?}");
            assert!(found.iter().all(|region| *region < 5), "{kind:?} {nth}: {found:?}");
            if faults.failed() == 0 {
                assert_eq!(reported, [0, 1, 2, 3, 4]);
                break;
            }
        }
    }
}

#[test]
fn a_header_that_may_be_there_ends_the_log() {
    let memory = Arc::new(MemoryStorage::new());
    new(&memory, 8).mark(&[0..1]).unwrap();
    let faults = Faults::new();
    let mut log = Checkpoint::open(Arc::new(FaultStorage::new(memory, faults.clone()))).unwrap();
    // The third flush of a new area is that of its header.
    faults.inject(Fault::on(OpKind::Flush).after(2));
    assert!(log.mark(&[1..2]).is_err());
    let Err(Error::Storage(error)) = log.mark(&[1..2]) else { unreachable!("it was used on") };
    assert_eq!(error.kind(), ErrorKind::Poisoned);
}
