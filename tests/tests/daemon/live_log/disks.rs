//! The two disks of a mirror with a log: how they begin, what the guest knows of their blocks, and how they
//! have to end.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::testing::Rng;
use blockmirror_checkpoint::{ActivityLog, Error};
use blockmirror_file::FileOptions;

use crate::common::ours_ok;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const LEN: u64 = 48 * MIB;
pub(super) const BLOCK: u64 = 4096;

/// Makes both; the source is full.
pub(super) fn create(dir: &Path, format: &str) {
    for name in ["s", "t"] {
        let path = dir.join(name).display().to_string();
        ours_ok(["create", "-q", "-f", format, &path, &LEN.to_string()]);
    }
    fs::write(dir.join("fill"), vec![0x55; LEN as usize]).unwrap();
    ours_ok(["convert", "-f", "raw", "-O", format, "fill", "s"].map(|word| match word {
        "fill" | "s" => dir.join(word).display().to_string(),
        word => word.to_owned(),
    }));
}

/// What the guest knows of its blocks, by number: the last version that it has sent, and the last of which it
/// has seen a flush.
#[derive(Debug)]
pub(super) struct Known {
    sent: Vec<u64>,
    pub(super) acknowledged: Vec<u64>,
    pub(super) flushed: Vec<u64>,
    /// The regions that were written to, or may have been, since they were last taken.
    pub(super) regions: BTreeSet<u64>,
}

impl Known {
    pub(super) fn new() -> Self {
        let none = vec![0; (LEN / BLOCK) as usize];
        Self { sent: none.clone(), acknowledged: none.clone(), flushed: none, regions: BTreeSet::new() }
    }

    /// The block is about to be written: its next version.
    pub(super) fn send(&mut self, number: u64) -> u64 {
        self.regions.insert(region_of(number));
        self.sent[number as usize] += 1;
        self.sent[number as usize]
    }

    /// Takes over what `other` knows of the blocks that are `whose`.
    pub(super) fn adopt(&mut self, other: &Self, whose: impl Fn(u64) -> bool) {
        for number in (0..LEN / BLOCK).filter(|number| whose(*number)).map(|number| number as usize) {
            self.sent[number] = other.sent[number];
            self.acknowledged[number] = other.acknowledged[number];
            self.flushed[number] = other.flushed[number];
        }
    }
}

/// The region of the log that has the block.
pub(super) fn region_of(number: u64) -> u64 {
    number * BLOCK / MIB
}

/// A block of this version: its number and the version, all over.
pub(super) fn block(number: u64, version: u64) -> Vec<u8> {
    let word = [number.to_be_bytes(), version.to_be_bytes()].concat();
    word.repeat(BLOCK as usize / 16)
}

/// The number of a block to write: one in so many is anywhere, the others are at two places.
pub(super) fn place(rng: &mut Rng, anywhere_one_in: u64) -> u64 {
    match (rng.one_in(anywhere_one_in), rng.one_in(3)) {
        (true, _) => rng.below(LEN / BLOCK),
        (false, true) => 5 * MIB / BLOCK + rng.below(300),
        (false, false) => 30 * MIB / BLOCK + rng.below(100),
    }
}

/// Bytes in regions that the log has marked, and which those are; `None` if there is none that has begun.
pub(super) fn found(dir: &Path) -> Option<(u64, BTreeSet<u64>)> {
    let path = dir.join("log");
    if !path.exists() {
        return None;
    }
    let log = match ActivityLog::open(Arc::new(FileOptions::new().open(path).unwrap())) {
        Err(Error::NoCheckpoint { .. } | Error::NotBegun { .. }) => return None,
        log => log.unwrap(),
    };
    let regions = log.regions();
    Some((log.marked_bytes(), (0..regions.len()).filter(|region| regions.get(*region)).collect()))
}

/// The same of a log that has begun.
pub(super) fn marked(dir: &Path) -> (u64, BTreeSet<u64>) {
    found(dir).expect("a log")
}

/// The two are equal, and each block is of a version that was sent, and no older than the last that was
/// flushed.
pub(super) fn check(dir: &Path, format: &str, known: &Known) {
    let (source, target) = (dir.join("s").display().to_string(), dir.join("t").display().to_string());
    ours_ok(["compare", "-f", format, "-F", format, &source, &target]);
    let raw = dir.join("raw").display().to_string();
    ours_ok(["convert", "-f", format, "-O", "raw", &dir.join("t").display().to_string(), &raw]);
    let bytes = fs::read(raw).unwrap();
    for (number, found) in bytes.chunks(BLOCK as usize).enumerate() {
        let (flushed, sent) = (known.flushed[number], known.sent[number]);
        let version = match found[0] {
            0x55 => 0,
            _ => u64::from_be_bytes(*found[8..].first_chunk().unwrap()),
        };
        assert!((flushed..=sent).contains(&version), "block {number}: {version}, {flushed} was flushed");
        if version > 0 {
            assert!(found == block(number as u64, version), "block {number} is torn");
        }
    }
}
