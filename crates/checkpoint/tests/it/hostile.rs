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
    assert!(matches!(open(&with_field(8, &2_u32.to_be_bytes())), Err(Error::Version { version: 2, .. })));
    for kind in [0, 2, 3] {
        let found = open(&with_field(12, &u32::to_be_bytes(kind)));
        assert!(matches!(found, Err(Error::OtherKind { .. })), "{found:?}");
    }
}

#[test]
fn random_changes_never_panic() {
    let sample = sample();
    for seed in 0..300 {
        let mut rng = Rng::new(seed, 1);
        let mut bytes = sample.clone();
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
