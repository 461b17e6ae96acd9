//! Logs that have a digest of each marked region.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a run of regions is a range")]

use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_checkpoint::{Checkpoint, Digest, Error, Identity, MAX_REGIONS};

const REGION: u64 = 1 << 20;

fn new(storage: &Arc<MemoryStorage>, regions: u64) -> Checkpoint {
    let storage = Arc::clone(storage) as _;
    Checkpoint::create_with_digests(storage, regions * REGION, REGION, Identity::new()).unwrap()
}

fn digest(region: u64) -> Digest {
    u128::from(region + 1).to_be_bytes()
}

#[test]
fn a_region_has_the_digest_that_it_was_marked_with_first() {
    let storage = Arc::new(MemoryStorage::new());
    let mut log = new(&storage, 8);
    log.mark_with(&[1..3, 5..6], &mut digest).unwrap();
    let mut asked = Vec::new();
    let mut other = |region| {
        asked.push(region);
        [0xff; 16]
    };
    log.mark_with(&[0..4, 7..100], &mut other).unwrap();
    assert_eq!(asked, [0, 3, 7]);
    for log in [log, Checkpoint::open(storage).unwrap()] {
        let found: Vec<_> = (0..9).map(|region| log.digest(region)).collect();
        let (own, other) = (|region| Some(digest(region)), Some([0xff; 16]));
        assert_eq!(found, [other, own(1), own(2), other, None, own(5), None, other, None]);
    }
}

/// Records of some areas, and one mark that no record has room for.
#[test]
fn digests_outlive_the_area_of_their_record() {
    let storage = Arc::new(MemoryStorage::new());
    let regions = 40_000;
    let mut log = new(&storage, regions);
    let len = storage.len().unwrap();
    for first in (0..regions / 500).rev().map(|n| n * 500) {
        log.mark_with(&[first..first + 500], &mut digest).unwrap();
    }
    assert_eq!(storage.len().unwrap(), len);
    let log = Checkpoint::open(Arc::clone(&storage) as _).unwrap();
    assert!((0..regions).all(|region| log.digest(region) == Some(digest(region))));
    let mut log = new(&storage, MAX_REGIONS);
    let runs: Vec<_> = (0..MAX_REGIONS / 2).map(|n| 2 * n..2 * n + 1).collect();
    log.mark_with(&runs, &mut digest).unwrap();
    let log = Checkpoint::open(storage).unwrap();
    assert!((0..MAX_REGIONS).all(|region| log.digest(region) == (region % 2 == 0).then(|| digest(region))));
}

#[test]
fn a_log_has_digests_of_all_marked_regions_or_of_none() {
    let storage = Arc::new(MemoryStorage::new());
    assert!(matches!(new(&storage, 8).mark(&[0..1]), Err(Error::NoDigest { .. })));
    let plain = Checkpoint::create(Arc::clone(&storage) as _, 8 * REGION, REGION, Identity::new());
    let mut plain = plain.unwrap();
    assert!(matches!(plain.mark_with(&[0..1], &mut digest), Err(Error::NoDigest { .. })));
    plain.mark(&[0..1]).unwrap();
    assert!(!plain.has_digests() && plain.digest(0).is_none());
    assert!(!Checkpoint::open(storage).unwrap().has_digests());
}

/// Every write and flush fails once: what is marked has its digest, that of the call that marked it.
#[test]
fn after_a_failure_no_marked_region_has_the_digest_of_another() {
    for kind in [OpKind::Write, OpKind::Flush] {
        for nth in 0.. {
            let memory = Arc::new(MemoryStorage::new());
            let mut log = new(&memory, 8);
            log.mark_with(&[0..1], &mut digest).unwrap();
            drop(log);
            let faults = Faults::new();
            let storage = Arc::new(FaultStorage::new(memory.clone(), faults.clone()));
            let mut log = Checkpoint::open(storage).unwrap();
            faults.inject(Fault::on(kind).after(nth));
            for region in 1..5 {
                let _ = log.mark_with(&[region..region + 1], &mut digest);
            }
            let found = Checkpoint::open(memory).unwrap();
            for region in 0..8 {
                let want = found.regions().get(region).then(|| digest(region));
                assert_eq!(found.digest(region), want, "{kind:?} {nth}: {region}");
            }
            if faults.failed() == 0 {
                break;
            }
        }
    }
}
