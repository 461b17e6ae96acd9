//! Every image that a crash could leave behind, from the log of a `RecordingStorage`.
//!
//! At a crash, all that was logged before the last flush is there; of what came after, any part may be, in
//! any order, and a write may be torn between sectors of 512 bytes. For every position in the log the points
//! are:
//!
//! - all of it;
//! - the last entry with any subset of the unflushed ones before it, as long as these are few
//!   (`SUBSET_LIMIT`); beyond that with each of them missing, each alone, and each contiguous group missing;
//! - the last entry torn: the first or the last of its sectors missing, halves, or one in the middle, with
//!   all of the others and with none of them.
//!
//! Subsets without the last entry are the points of an earlier position, so nothing is made twice.

use std::fmt;
use std::ops::Range;

use super::log::{Logged, SECTOR};
use super::memory_storage::MemoryStorage;
use super::sparse::SparseBytes;
use crate::ByteRange;

/// Up to so many unflushed entries before the last, every subset of them is tried.
const SUBSET_LIMIT: usize = 4;

/// One image that a crash could leave.
#[derive(Clone)]
pub struct CrashPoint {
    base: SparseBytes,
    /// Log entries of the epoch, the torn or last one included, that reached the disk.
    kept: Vec<(usize, Logged)>,
    dropped: Vec<usize>,
    torn: Option<Torn>,
    position: usize,
}

/// Which sectors of the last write of a crash point are missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Torn {
    /// The missing bytes, whole sectors of the storage.
    pub missing: ByteRange,
}

impl CrashPoint {
    /// How many entries of the log had been issued when the power failed.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The image, as a storage to open.
    pub fn storage(&self) -> MemoryStorage {
        let mut bytes = self.base.clone();
        for (i, (_, entry)) in self.kept.iter().enumerate() {
            match &self.torn {
                Some(torn) if i + 1 == self.kept.len() => apply_torn(entry, torn.missing, &mut bytes),
                _ => entry.apply(&mut bytes),
            }
        }
        MemoryStorage::from_sparse(bytes)
    }
}

/// Says what was lost, to find the point again: `crash after 17 of the log, dropped [14, 15], torn without
/// 0x200..0x400`.
impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "crash after {} of the log, dropped {:?}", self.position, self.dropped)?;
        if let Some(torn) = &self.torn {
            write!(f, ", torn without {:?}", torn.missing)?;
        }
        Ok(())
    }
}

impl fmt::Debug for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}; kept: ")?;
        let mut list = f.debug_list();
        for (index, entry) in &self.kept {
            match entry {
                Logged::Write { offset, data } => list
                    .entry(&format_args!("{index}: write {:?}", ByteRange::at(*offset, data.len() as u64))),
                Logged::Zero(range) => list.entry(&format_args!("{index}: zero {range:?}")),
                Logged::SetLen(len) => list.entry(&format_args!("{index}: length {len:#x}")),
                Logged::Flush => list.entry(&format_args!("{index}: flush")),
            };
        }
        list.finish()
    }
}

/// The iterator over the points of one log.
#[derive(Debug)]
pub struct CrashPoints {
    /// What is durable at the start of the present epoch.
    durable: SparseBytes,
    log: Vec<Logged>,
    /// First entry of the present epoch.
    epoch: usize,
    /// Entries issued at the points in `queue`.
    position: usize,
    queue: std::vec::IntoIter<Loss>,
}

/// What one point loses of its epoch.
#[derive(Clone, Debug)]
struct Loss {
    dropped: Vec<usize>,
    torn: Option<Torn>,
}

impl CrashPoints {
    pub(crate) fn new(base: SparseBytes, log: Vec<Logged>) -> Self {
        let start = vec![Loss { dropped: Vec::new(), torn: None }];
        Self { durable: base, log, epoch: 0, position: 0, queue: start.into_iter() }
    }

    /// Moves on to the next position and queues its points; false at the end of the log.
    fn advance(&mut self) -> bool {
        let Some(entry) = self.log.get(self.position) else { return false };
        let before = self.epoch..self.position;
        self.position += 1;
        self.queue = if *entry == Logged::Flush {
            for entry in &self.log[before] {
                entry.apply(&mut self.durable);
            }
            self.epoch = self.position;
            vec![Loss { dropped: Vec::new(), torn: None }]
        } else {
            losses(before, entry)
        }
        .into_iter();
        true
    }
}

impl Iterator for CrashPoints {
    type Item = CrashPoint;

    fn next(&mut self) -> Option<CrashPoint> {
        loop {
            if let Some(Loss { dropped, torn }) = self.queue.next() {
                let kept = (self.epoch..self.position)
                    .filter(|i| !dropped.contains(i))
                    .map(|i| (i, self.log[i].clone()))
                    .collect();
                return Some(CrashPoint {
                    base: self.durable.clone(),
                    kept,
                    dropped,
                    torn,
                    position: self.position,
                });
            }
            if !self.advance() {
                return None;
            }
        }
    }
}

/// What may be lost when the last entry issued is `last` and `before` are the unflushed ones before it.
fn losses(before: Range<usize>, last: &Logged) -> Vec<Loss> {
    let mut groups: Vec<Vec<usize>> = if before.len() <= SUBSET_LIMIT {
        (0..1usize << before.len())
            .map(|mask| before.clone().filter(|i| mask >> (i - before.start) & 1 == 1).collect())
            .collect()
    } else {
        let mut groups = vec![Vec::new()];
        for start in before.clone() {
            groups.extend((start + 1..=before.end).map(|end| (start..end).collect()));
            groups.push(before.clone().filter(|i| *i != start).collect());
        }
        groups
    };
    // The first and the last entry alone are also contiguous groups seen from the other side.
    groups.sort();
    groups.dedup();
    let mut others = vec![Vec::new()];
    if !before.is_empty() {
        others.push(before.collect::<Vec<_>>());
    }
    let mut out: Vec<Loss> = Vec::new();
    for dropped in others {
        for missing in tears(last) {
            out.push(Loss { dropped: dropped.clone(), torn: Some(Torn { missing }) });
        }
    }
    out.extend(groups.into_iter().map(|dropped| Loss { dropped, torn: None }));
    out
}

/// The parts of an entry that may be missing.
fn tears(entry: &Logged) -> Vec<ByteRange> {
    let whole = match entry {
        Logged::Write { offset, data } => ByteRange::at(*offset, data.len() as u64),
        Logged::Zero(range) => *range,
        Logged::SetLen(_) | Logged::Flush => return Vec::new(),
    };
    let first = whole.start() / SECTOR;
    let last = whole.end().div_ceil(SECTOR);
    let sectors = |from: u64, to: u64| ByteRange::new(from * SECTOR, to * SECTOR).intersect(whole);
    let middle = first + (last - first) / 2;
    let mut out = vec![
        sectors(first, first + 1),
        sectors(first + 1, last),
        sectors(middle, last),
        sectors(first, middle),
        sectors(middle, middle + 1),
        sectors(last - 1, last),
        sectors(first, last - 1),
    ];
    out.retain(|missing| !missing.is_empty() && *missing != whole);
    out.sort();
    out.dedup();
    out
}

/// Does `entry` to `bytes` except for the `missing` part.
fn apply_torn(entry: &Logged, missing: ByteRange, bytes: &mut SparseBytes) {
    match entry {
        Logged::Write { offset, data } => {
            let whole = ByteRange::at(*offset, data.len() as u64);
            for part in around(whole, missing) {
                let start = (part.start() - offset) as usize;
                bytes.write(&data[start..start + part.len() as usize], part.start());
            }
        }
        Logged::Zero(range) => {
            for part in around(*range, missing) {
                Logged::Zero(part).apply(bytes);
            }
        }
        Logged::SetLen(_) | Logged::Flush => entry.apply(bytes),
    }
}

fn around(whole: ByteRange, missing: ByteRange) -> impl Iterator<Item = ByteRange> {
    [ByteRange::new(whole.start(), missing.start()), ByteRange::new(missing.end(), whole.end())]
        .into_iter()
        .filter(|part| !part.is_empty())
}
