//! Logs that were made or changed by a stranger: an error or some regions, never a panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::single_range_in_vec_init, reason = "a run of regions is a range")]

use std::sync::Arc;

use blockmirror_block::testing::{MemoryStorage, Rng};
use blockmirror_checkpoint::{Checkpoint, Error, Identity};

const REGION: u64 = 1 << 20;

fn sample() -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new());
    let mut identity = Identity::new();
    identity.push("source", "disk.raw");
    let mut log = Checkpoint::create(Arc::clone(&storage) as _, 100 * REGION, REGION, identity).unwrap();
    log.mark(&[3..9]).unwrap();
    log.mark(&[50..51]).unwrap();
    storage.to_vec()
}

/// The same regions, with digests.
fn sample_with_digests() -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new());
    let made =
        Checkpoint::create_with_digests(Arc::clone(&storage) as _, 100 * REGION, REGION, Identity::new());
    let mut log = made.unwrap();
    log.mark_with(&[3..9], &mut |region| [region as u8; 16]).unwrap();
    log.mark_with(&[50..51], &mut |region| [region as u8; 16]).unwrap();
    storage.to_vec()
}

fn open(bytes: &[u8]) -> Result<Checkpoint, Error> {
    Checkpoint::open(Arc::new(MemoryStorage::with_contents(bytes)))
}

/// CRC-32C, written anew.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// The sample with `field` at `at` of the header in use, whose CRC is right.
fn with_field(at: usize, field: &[u8]) -> Vec<u8> {
    let mut bytes = sample();
    bytes[at..at + field.len()].copy_from_slice(field);
    let crc = crc32c(&bytes[..508]);
    bytes[508..512].copy_from_slice(&crc.to_be_bytes());
    bytes
}

#[test]
fn nothing_that_is_no_log_is_taken_for_one() {
    assert!(matches!(open(b"BMCKPT\r\n"), Err(Error::NotBegun { .. })));
    for bytes in [&[][..], &[0; 512], &[0xff; 10_000], b"BMCKPT\n\n"] {
        assert!(matches!(open(bytes), Err(Error::NoCheckpoint { .. })));
    }
}

#[test]
fn each_changed_byte_costs_at_most_the_records_from_there_on() {
    let sample = sample();
    for at in 0..sample.len().min(20_000) {
        let mut bytes = sample.clone();
        bytes[at] ^= 0x40;
        let Ok(log) = open(&bytes) else { continue };
        let marked = log.marked_bytes() / REGION;
        assert!([0, 6, 7].contains(&marked), "byte {at}: {marked}");
    }
}

#[test]
fn figures_beyond_the_format_are_refused_and_allocate_nothing() {
    let max = u64::MAX.to_be_bytes();
    for (at, field) in [
        (32, &max[..]),                     // generation
        (32, &(1_u64 << 62).to_be_bytes()), // generation
        (40, &max),                         // length: too many regions
        (48, &max),                         // region
        (48, &0_u64.to_be_bytes()),         // region
        (48, &3_u64.to_be_bytes()),         // region
        (48, &1_u64.to_be_bytes()),         // region
        (56, &u32::MAX.to_be_bytes()),      // identity
        (56, &5_u32.to_be_bytes()),         // identity: its CRC
    ] {
        let found = open(&with_field(at, field));
        assert!(matches!(found, Err(Error::Damaged { .. })), "{at} {field:?}: {found:?}");
    }
    assert!(matches!(open(&with_field(8, &3_u32.to_be_bytes())), Err(Error::Version { version: 3, .. })));
    // The records are those of a log without digests.
    assert!(matches!(open(&with_field(8, &2_u32.to_be_bytes())), Err(Error::Damaged { .. })));
    for kind in [0, 2, 3] {
        let found = open(&with_field(12, &u32::to_be_bytes(kind)));
        assert!(matches!(found, Err(Error::OtherKind { .. })), "{found:?}");
    }
}

/// Records with digests whose figures do not fit together, and whose CRC is right.
#[test]
fn runs_and_digests_that_do_not_fit_together_are_damage() {
    let sample = sample_with_digests();
    let id: [u8; 16] = sample[16..32].try_into().unwrap();
    // Header and identity; the snapshot of 100 regions.
    let (area, snapshot) = (8192, 24 + 16);
    let at = area + snapshot;
    let with = |payload: &[u8]| {
        let mut record = vec![0; 4];
        record.extend_from_slice(&3_u32.to_be_bytes());
        record.extend_from_slice(&1_u64.to_be_bytes());
        record.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        record.extend_from_slice(payload);
        let crc = crc32c(&[&id[..], &0_u64.to_be_bytes(), &record[4..]].concat());
        record[..4].copy_from_slice(&crc.to_be_bytes());
        let mut bytes = sample.clone();
        bytes[at..at + record.len()].copy_from_slice(&record);
        bytes
    };
    let run = |first: u64, count: u64| (first << 32 | count).to_be_bytes();
    let payload = |count: u64, runs: &[[u8; 8]], digests: usize| {
        [&count.to_be_bytes()[..], runs.as_flattened(), &vec![7; digests * 16]].concat()
    };
    let good = open(&with(&payload(1, &[run(8, 2)], 2))).unwrap();
    assert_eq!((good.marked_bytes(), good.digest(9)), (2 * REGION, Some([7; 16])));
    for payload in [
        payload(1, &[run(8, 2)], 1),
        payload(1, &[run(8, 2)], 3),
        payload(2, &[run(8, 2)], 2),
        payload(u64::MAX, &[run(8, 2)], 2),
        payload(1, &[run(99, 2)], 2),
        payload(1, &[run(u64::from(u32::MAX), u64::from(u32::MAX))], 2),
        payload(1, &[], 0),
        vec![0; 3],
        vec![],
    ] {
        let found = open(&with(&payload));
        assert!(matches!(found, Err(Error::Damaged { .. })), "{payload:?}: {found:?}");
    }
}

#[test]
fn random_changes_never_panic() {
    let samples = [sample(), sample_with_digests()];
    for seed in 0..300 {
        let mut rng = Rng::new(seed, 1);
        let mut bytes = samples[rng.index(2)].clone();
        for _ in 0..rng.range(1, 8) {
            let end = if rng.one_in(2) { 24_000 } else { bytes.len() };
            let at = rng.index(end);
            bytes[at] = rng.next() as u8;
        }
        if rng.one_in(4) {
            bytes.truncate(rng.index(bytes.len()));
        }
        let _ = open(&bytes);
    }
}
