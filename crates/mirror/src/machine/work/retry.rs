//! The `ignore` policy: ranges that wait for another try, and failed ranges.
//!
//! A range that failed is dirty again, but it is not taken before a delay. Each try is made in smaller pieces
//! than the one before, down to the granules of the dirty bitmap, so that one bad sector costs one small
//! range.

use std::collections::BTreeSet;
use std::io;
use std::ops::Bound;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{self as block, ByteRange};

use crate::progress::GivenUp;
use crate::range_map::RangeMap;
use crate::scan::SourceFailed;

/// After so many tries a range is left out and listed.
pub(in crate::machine) const MAX_TRIES: u32 = 10;
/// The wait before the second try; doubles with each further one.
const FIRST_DELAY: Duration = Duration::from_millis(20);
/// The longest wait between two tries.
const MAX_DELAY: Duration = Duration::from_millis(500);
/// A failed range comes back in at most so many pieces.
const SPLIT: u64 = 16;
/// While so many ranges wait for another try, nothing new is begun.
pub(in crate::machine) const MAX_WAITING: usize = 4096;
/// Separate failed ranges before the job fails all the same.
pub(in crate::machine) const MAX_GIVEN_UP: usize = 4096;

/// How long to wait before a range that failed `tries` times is tried again.
pub(in crate::machine) fn retry_delay(tries: u32) -> Duration {
    FIRST_DELAY.saturating_mul(1 << tries.saturating_sub(1).min(10)).min(MAX_DELAY)
}

/// A dirty range that is not taken before a delay is over.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct Waiting {
    pub(in crate::machine) range: ByteRange,
    /// How often it has failed.
    pub(in crate::machine) tries: u32,
    not_before: Duration,
}

/// The dirty ranges that wait for another try. Disjoint, in whole units of the detail.
#[derive(Debug, Default)]
pub(in crate::machine) struct Retries {
    waiting: RangeMap<Try>,
    /// Time and start of each.
    by_time: BTreeSet<(Duration, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Try {
    tries: u32,
    not_before: Duration,
}

impl Retries {
    /// Puts `range` (whole units of `detail`, or up to the end of the disk) back after `tries` failures, in
    /// pieces.
    pub(in crate::machine) fn put(&mut self, range: ByteRange, tries: u32, detail: u64, now: Duration) {
        let not_before = now.saturating_add(retry_delay(tries));
        let piece = range.len().div_ceil(SPLIT).next_power_of_two().max(detail);
        let mut at = range.start();
        while at < range.end() {
            let rest = ByteRange::new(at, range.end());
            let known = self.first_overlap(rest);
            let free = ByteRange::new(at, known.map_or(range.end(), |w| w.range.start()));
            for part in free.pieces(piece) {
                self.insert(Waiting { range: part, tries, not_before });
            }
            at = free.end();
            if let Some(mut known) = known {
                // Two operations inside one unit failed: the unit waits once, for the longer time.
                self.remove(known);
                known.tries = known.tries.max(tries);
                known.not_before = known.not_before.max(not_before);
                self.insert(known);
                at = known.range.end();
            }
        }
    }

    fn insert(&mut self, waiting: Waiting) {
        let Waiting { range, tries, not_before } = waiting;
        self.by_time.insert((not_before, range.start()));
        self.waiting.insert(range, Try { tries, not_before });
    }

    fn remove(&mut self, waiting: Waiting) {
        self.by_time.remove(&(waiting.not_before, waiting.range.start()));
        self.waiting.remove(waiting.range.start());
    }

    /// Something in `range` is not dirty any more, and has nothing to wait for.
    pub(in crate::machine) fn cleaned(&mut self, range: ByteRange, dirty: &DirtyBitmap) {
        let mut at = range.start();
        while let Some(waiting) = self.first_overlap(ByteRange::new(at, range.end().max(at))) {
            self.remove(waiting);
            let whole = waiting.range;
            let mut from = whole.start();
            while from < whole.end()
                && let Some(run) = dirty.next_dirty(from, whole.end() - from)
                && run.start < whole.end()
            {
                let run = ByteRange::new(run.start, run.end).intersect(whole);
                self.insert(Waiting { range: run, ..waiting });
                from = run.end();
            }
            at = whole.end();
        }
    }

    /// Bytes in the waiting ranges; all of them are dirty.
    pub(in crate::machine) fn bytes(&self) -> u64 {
        self.waiting.bytes()
    }

    /// The first waiting range that shares a byte with `range`.
    pub(in crate::machine) fn first_overlap(&self, range: ByteRange) -> Option<Waiting> {
        self.waiting.first_overlap(range).map(waiting)
    }

    /// Takes out the `free` part of a range whose time has come; the rest of it stays.
    pub(in crate::machine) fn take_due(
        &mut self,
        now: Duration,
        free: impl Fn(ByteRange) -> Option<ByteRange>,
    ) -> Option<Waiting> {
        let due = self.by_time.range(..=(now, u64::MAX));
        let (found, part) = due
            .filter_map(|(_, start)| self.waiting.get(*start).map(waiting))
            .find_map(|waiting| Some((waiting, free(waiting.range)?)))?;
        self.remove(found);
        for rest in
            [ByteRange::new(found.range.start(), part.start()), ByteRange::new(part.end(), found.range.end())]
        {
            if !rest.is_empty() {
                self.insert(Waiting { range: rest, ..found });
            }
        }
        Some(Waiting { range: part, ..found })
    }

    /// When the next range's time comes, if that is after `now`.
    pub(in crate::machine) fn next_time(&self, now: Duration) -> Option<Duration> {
        let later = (Bound::Excluded((now, u64::MAX)), Bound::Unbounded);
        self.by_time.range(later).next().map(|(time, _)| *time)
    }

    pub(in crate::machine) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }
}

fn waiting((range, of): (ByteRange, &Try)) -> Waiting {
    Waiting { range, tries: of.tries, not_before: of.not_before }
}

/// The last failure in a range.
#[derive(Clone, Debug)]
pub(in crate::machine) struct Reason {
    message: String,
    os_error: Option<i32>,
}

impl From<&block::Error> for Reason {
    fn from(error: &block::Error) -> Self {
        Self { message: error.to_string(), os_error: os_error(error) }
    }
}

/// The system's number of what has failed, if it has one.
fn os_error(error: &block::Error) -> Option<i32> {
    let mut cause = error.cause();
    while let Some(found) = cause {
        if let Some(system) = found.downcast_ref::<io::Error>() {
            return system.raw_os_error();
        }
        cause = match found.downcast_ref::<SourceFailed>() {
            Some(SourceFailed(error)) => error.cause(),
            None => found.source(),
        };
    }
    None
}

/// The failed ranges, neighbours merged, each with its last failure.
#[derive(Debug, Default)]
pub(in crate::machine) struct FailedRanges {
    failures: RangeMap<Reason>,
}

impl FailedRanges {
    pub(in crate::machine) fn bytes(&self) -> u64 {
        self.failures.bytes()
    }

    /// Whether another separate range would be one too many.
    pub(in crate::machine) fn is_full(&self) -> bool {
        self.failures.len() >= MAX_GIVEN_UP
    }

    pub(in crate::machine) fn insert(&mut self, range: ByteRange, reason: Reason) {
        self.remove(range);
        let mut all = range;
        while let Some((other, _)) = self.failures.take_touching(all) {
            all = ByteRange::new(all.start().min(other.start()), all.end().max(other.end()));
        }
        self.failures.insert(all, reason);
    }

    /// `range` has been copied after all.
    pub(in crate::machine) fn remove(&mut self, range: ByteRange) {
        self.failures.cut(range, |_, _| {});
    }

    pub(in crate::machine) fn ranges(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.failures.iter().map(|(range, _)| range)
    }

    pub(in crate::machine) fn to_vec(&self) -> Vec<GivenUp> {
        let entry = |(range, reason): (ByteRange, &Reason)| {
            let Reason { message, os_error } = reason.clone();
            GivenUp { range, message, os_error }
        };
        self.failures.iter().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(list: &FailedRanges) -> Vec<(u64, u64)> {
        list.to_vec().iter().map(|g| (g.range.start(), g.range.end())).collect()
    }

    #[test]
    fn waits_grow_to_half_a_second() {
        let waits: Vec<u128> = (1..=7).map(|tries| retry_delay(tries).as_millis()).collect();
        assert_eq!(waits, [20, 40, 80, 160, 320, 500, 500]);
        assert_eq!(retry_delay(u32::MAX), MAX_DELAY);
    }

    #[test]
    fn a_failed_range_comes_back_in_pieces_and_not_early() {
        let mut retries = Retries::default();
        retries.put(ByteRange::new(0, 1 << 20), 1, 4096, Duration::ZERO);
        assert!(retries.take_due(Duration::from_millis(19), Some).is_none());
        assert_eq!(retries.next_time(Duration::ZERO), Some(Duration::from_millis(20)));
        let first = retries.take_due(Duration::from_millis(20), Some).unwrap();
        assert_eq!((first.range, first.tries), (ByteRange::new(0, 65536), 1));
        assert_eq!(retries.waiting.len(), 15);
    }

    #[test]
    fn a_unit_that_failed_twice_waits_once() {
        let mut retries = Retries::default();
        retries.put(ByteRange::new(4096, 8192), 3, 4096, Duration::ZERO);
        retries.put(ByteRange::new(0, 12288), 1, 4096, Duration::ZERO);
        let all: Vec<_> = retries.waiting.iter().map(|(range, of)| (range.start(), of.tries)).collect();
        assert_eq!(all, [(0, 1), (4096, 3), (8192, 1)]);
    }

    /// A guest's write that reached the target cleaned a range that waited for another try. The range waited
    /// on, was counted as dirt, and hid as much other dirt from the job: a writer who waited for that waited
    /// for ever.
    #[test]
    fn what_is_clean_does_not_wait() {
        let mut dirty = DirtyBitmap::new(1 << 20, 4096).unwrap();
        dirty.set(0..1 << 20);
        let mut retries = Retries::default();
        retries.put(ByteRange::new(0, 65536), 4, 4096, Duration::ZERO);
        retries.put(ByteRange::new(65536, 1 << 20), 4, 4096, Duration::ZERO);
        let range = ByteRange::new(4096, 98304);
        dirty.clear(range.start()..range.end());
        retries.cleaned(range, &dirty);
        assert_eq!(retries.bytes(), dirty.dirty_bytes());
        assert!(retries.first_overlap(range).is_none());
        assert_eq!(retries.first_overlap(ByteRange::new(0, 1 << 20)).unwrap().range, ByteRange::new(0, 4096));
    }

    fn reason() -> Reason {
        Reason::from(&block::Error::io("read", io::Error::from_raw_os_error(5)))
    }

    #[test]
    fn a_reason_has_the_number_of_the_system() {
        let read = block::Error::io("read", io::Error::from_raw_os_error(28));
        let below = block::Error::new(block::ErrorKind::Io, "write").caused_by(SourceFailed(read));
        assert_eq!(Reason::from(&below).os_error, Some(28));
        assert_eq!(Reason::from(&block::Error::new(block::ErrorKind::Io, "write")).os_error, None);
    }

    #[test]
    fn failed_neighbours_merge_and_a_late_copy_removes_them() {
        let mut list = FailedRanges::default();
        list.insert(ByteRange::new(0, 4), reason());
        list.insert(ByteRange::new(8, 12), reason());
        list.insert(ByteRange::new(4, 8), reason());
        assert_eq!(ranges(&list), [(0, 12)]);
        list.insert(ByteRange::new(2, 6), reason());
        assert_eq!((ranges(&list), list.bytes()), (vec![(0, 12)], 12));
        list.remove(ByteRange::new(3, 5));
        assert_eq!((ranges(&list), list.bytes()), (vec![(0, 3), (5, 12)], 10));
        list.remove(ByteRange::new(0, 100));
        assert_eq!((ranges(&list), list.bytes()), (vec![], 0));
    }
}
