//! Work tracker: which bytes are dirty, which are in progress, and which operations are in flight.
//!
//! A range goes from the dirty bitmap to a scan, from the scan to the queue, from the queue to an operation;
//! an operation that fails makes it dirty again. What a guest write does to the target itself leaves the
//! tracker on the way ([`guest_writes_target`](WorkTracker::guest_writes_target)).
//!
//! Must hold:
//! - A bit is cleared before the scan or copy that reads its bytes is handed out; a mark that is set again
//!   meanwhile makes the job copy the range once more.
//! - `in_progress` has, to the byte, what was taken and is not done: the ranges of scan cursors, queued
//!   extents and operations. Nothing is taken that overlaps it, so no two operations on one byte are ever in
//!   flight.
//! - What is queued is bounded: a scan returns a capped number of extents, and none begins while enough is
//!   queued.

mod in_flight;
mod queue;
mod retry;
mod scans;

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::{self as block, ByteRange};

use super::config::Config;
use super::counters::Counters;
use super::{Action, Moved, Work};
use crate::granularity::GranularityError;
use crate::options::SyncMode;
use crate::progress::GivenUp;
use crate::range_set::RangeSet;
use crate::scan::CopyAction;
pub(super) use in_flight::{InFlight, Operations};
use queue::Queue;
use retry::{FailedRanges, Retries};
pub(super) use retry::{MAX_GIVEN_UP, MAX_TRIES, retry_delay};

/// Pieces that [`WorkTracker::work_left`] counts one by one.
const MAX_COUNTED: usize = 512;

/// A range taken from the dirty bitmap that was not scanned to its end.
#[derive(Clone, Copy, Debug)]
struct ScanCursor {
    range: ByteRange,
    tries: u32,
    /// Part of the first pass over the disk.
    first_pass: bool,
}

/// A scanned extent that waits for its operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueuedExtent {
    pub(super) range: ByteRange,
    pub(super) action: CopyAction,
    pub(super) tries: u32,
    first_pass: bool,
}

/// The granules of the dirty bitmap.
#[derive(Clone, Copy, Debug)]
pub(super) struct Granules {
    size: u64,
    disk: u64,
}

impl Granules {
    /// `range` in whole granules, clipped to the disk.
    pub(super) fn round(self, range: ByteRange) -> ByteRange {
        range.align_outward(self.size).intersect(ByteRange::new(0, self.disk))
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct WorkTracker {
    granules: Granules,
    /// Where the guest writes to the target itself, no more is scanned at once.
    piece: u64,
    dirty: DirtyBitmap,
    /// With [`SyncMode::Top`]: where the guest has written since the start, so that it is copied even where
    /// the top image does not decide it.
    guest_written: Option<DirtyBitmap>,
    /// Where the next dirty run is searched from.
    cursor: u64,
    in_progress: RangeSet,
    scans: VecDeque<ScanCursor>,
    queue: Queue,
    operations: Operations,
    next_id: u64,
    retries: Retries,
    failed_ranges: FailedRanges,
    /// What the source does not map, so that it was taken for data.
    unmapped: FailedRanges,
    /// The guest has written to the target: promises about it do not hold any more.
    target_written: bool,
    /// Where the guest has written to the target while scans were in flight.
    written_during_scan: RangeSet,
    /// The answers of scans before this one are outdated.
    scans_valid_from: u64,
}

impl WorkTracker {
    /// # Errors
    /// The detail in `config` is no granularity of a bitmap.
    pub(super) fn new(config: &Config) -> Result<Self, GranularityError> {
        let mut tracker = Self {
            granules: Granules { size: config.detail, disk: config.len },
            piece: config.piece(),
            dirty: empty_bitmap(config)?,
            guest_written: (config.sync == SyncMode::Top).then(|| empty_bitmap(config)).transpose()?,
            cursor: 0,
            in_progress: RangeSet::default(),
            scans: VecDeque::new(),
            queue: Queue::default(),
            operations: Operations::default(),
            next_id: 0,
            retries: Retries::default(),
            failed_ranges: FailedRanges::default(),
            unmapped: FailedRanges::default(),
            target_written: false,
            written_during_scan: RangeSet::default(),
            scans_valid_from: 0,
        };
        if let Some(only) = &config.only {
            tracker.dirty.merge(only);
        } else if matches!(config.sync, SyncMode::Full | SyncMode::Top) {
            // Everything is taken at once: bits need not be set to be cleared again. Dirt that appears ahead
            // of the scan is cleared when the scan gets there.
            let range = ByteRange::new(0, config.len);
            tracker.in_progress.insert(range);
            if !range.is_empty() {
                tracker.scans.push_back(ScanCursor { range, tries: 0, first_pass: true });
            }
        }
        Ok(tracker)
    }

    /// A bitmap of the disk's length with nothing set.
    pub(super) fn empty(&self) -> DirtyBitmap {
        let mut empty = self.dirty.clone();
        empty.clear_all();
        empty
    }

    pub(super) fn granules(&self) -> Granules {
        self.granules
    }

    /// An id for an operation or a guest write; they are in one order.
    pub(super) fn allocate_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// The id that is allocated next.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id
    }

    /// The operations in flight.
    pub(super) fn operations(&self) -> &Operations {
        &self.operations
    }

    pub(super) fn begin(&mut self, work: Work, tries: u32, now: Duration) -> Action {
        let action = Action { id: self.allocate_id(), work };
        self.operations.begin(action, tries, now);
        action
    }

    pub(super) fn finish(&mut self, id: u64) -> Option<InFlight> {
        self.operations.finish(id)
    }

    /// What is set in `bitmap` is dirty.
    pub(super) fn merge(&mut self, bitmap: &DirtyBitmap) {
        self.dirty.merge(bitmap);
    }

    /// The source has changed in `range`.
    pub(super) fn mark_dirty(&mut self, range: ByteRange, counters: &mut Counters) {
        let marked = self.dirty.set(range.start()..range.end());
        counters.dirtied(marked, !self.is_ahead(range));
        if let Some(written) = &mut self.guest_written {
            written.set(range.start()..range.end());
        }
    }

    /// Whether all of `range` is taken but not begun: what is marked there is copied without more work.
    fn is_ahead(&self, range: ByteRange) -> bool {
        let taken = self.in_progress.first_overlap(range).is_some_and(|run| run.contains_range(range));
        taken && !self.operations.moves(range)
    }

    /// Whether nothing is dirty; ranges in progress are not.
    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_clean()
    }

    /// Bytes that the target does not have, or may not have.
    pub(super) fn left(&self) -> u64 {
        self.dirty.dirty_bytes() + self.in_progress.bytes()
    }

    /// Bytes left, those that are taken and marked again counted once. (Where very many pieces are taken,
    /// twice.)
    pub(super) fn work_left(&self) -> u64 {
        if self.in_progress.count() > MAX_COUNTED {
            return self.left();
        }
        let dirty = |range: ByteRange| self.dirty.dirty_bytes_in(range.start()..range.end());
        let taken: u64 = self.in_progress.iter().map(dirty).sum();
        let begun: u64 = self.operations.moved().map(dirty).sum();
        self.left().saturating_sub(taken.saturating_sub(begun))
    }

    /// Bytes of the first pass that were not scanned.
    pub(super) fn bulk_left(&self) -> u64 {
        let waiting = self.scans.iter().filter(|scan| scan.first_pass).map(|scan| scan.range.len());
        waiting.sum::<u64>() + self.operations.first_pass_bytes()
    }

    pub(super) fn in_first_pass(&self) -> bool {
        self.scans.iter().any(|scan| scan.first_pass)
            || self.queue.iter().any(|queued| queued.first_pass)
            || self.operations.any_of_first_pass()
    }

    /// Whether neither dirt nor a scan that was begun is left.
    pub(super) fn is_all_taken(&self) -> bool {
        self.dirty.is_clean() && self.scans.is_empty()
    }

    /// The first range that is left to be scanned.
    pub(super) fn first_left(&self) -> Option<ByteRange> {
        let dirty = self.dirty.next_dirty(0, u64::MAX).map(|run| ByteRange::new(run.start, run.end));
        self.scans.front().map(|scan| scan.range).or(dirty)
    }

    /// Whether nothing in `range` is dirty or in progress.
    pub(super) fn is_done(&self, range: ByteRange) -> bool {
        self.dirty.dirty_bytes_in(range.start()..range.end()) == 0
            && self.in_progress.first_overlap(range).is_none()
    }

    /// The ranges that the target does not have, those included that have failed and are left out.
    pub(super) fn not_copied(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.missing().chain(self.failed_ranges.ranges())
    }

    /// The ranges that the target does not have.
    pub(super) fn missing(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let dirty = self.dirty.runs().map(|run| ByteRange::new(run.start, run.end));
        dirty.chain(self.in_progress.iter())
    }

    /// The queue's next extent; what lies in `reserved` comes first.
    pub(super) fn next_queued(&mut self, reserved: Option<ByteRange>) -> Option<QueuedExtent> {
        if let Some(reserved) = reserved {
            self.queue.turn_to(reserved);
        }
        self.queue.front()
    }

    /// Takes the first part of the next queued extent, for the operation `work`.
    pub(super) fn take_queued(&mut self, work: Work) {
        if let Work::Copy { range, .. } | Work::Clone { range, .. } = work {
            // What was marked while it was queued is read now: a guest ahead of the copy makes no work.
            self.dirty.clear(range.start()..range.end());
        }
        self.queue.begin(work.range());
    }

    /// `range` has been dealt with.
    pub(super) fn completed(&mut self, range: ByteRange, moved: Moved, counters: &mut Counters) {
        self.in_progress.remove(range);
        self.failed_ranges.remove(range);
        counters.completed(range.len(), moved);
    }

    /// `range` was taken and is not done: it is dirty again.
    pub(super) fn requeue(&mut self, range: ByteRange) {
        self.in_progress.remove(range);
        self.dirty.set(range.start()..range.end());
    }

    /// `range`, which was taken and has failed `tries` times, needs another action.
    pub(super) fn queue_as(&mut self, action: CopyAction, range: ByteRange, tries: u32) {
        if !range.is_empty() {
            self.queue.push(QueuedExtent { range, action, tries, first_pass: false });
        }
    }

    /// An operation on `range` has failed: it is dirty again, in whole granules. Whether the guest has
    /// written there meanwhile.
    pub(super) fn failed(&mut self, range: ByteRange) -> bool {
        let granules = self.granules.round(range);
        // Bits that were set already are the guest's.
        let news = self.dirty.dirty_bytes_in(granules.start()..granules.end()) > 0;
        self.in_progress.remove(range);
        self.dirty.set(granules.start()..granules.end());
        news
    }

    /// The granules of `range`, which is dirty and has failed `tries` times, are not taken before a delay.
    pub(super) fn retry_later(&mut self, range: ByteRange, tries: u32, now: Duration) {
        self.retries.put(self.granules.round(range), tries, self.granules.size, now);
    }

    /// When the delay of a failed range ends that is the next to.
    pub(super) fn next_retry(&self, now: Duration) -> Option<Duration> {
        self.retries.next_time(now)
    }

    /// Whether a failed range waits for another try.
    pub(super) fn any_retries(&self) -> bool {
        self.retries.bytes() > 0
    }

    /// The job goes on without `range`, which has failed too often, and lists it. It was dirty.
    pub(super) fn leave_failed(&mut self, range: ByteRange, error: &block::Error, counters: &mut Counters) {
        let granules = self.granules.round(range);
        self.dirty.clear(granules.start()..granules.end());
        counters.passed_over(range.len());
        self.list_failed(range, error);
    }

    /// Lists `range`, which has failed and is not dirty.
    pub(super) fn list_failed(&mut self, range: ByteRange, error: &block::Error) {
        self.failed_ranges.insert(range, error.into());
    }

    /// Lists `range`, which the source does not map.
    pub(super) fn list_unmapped(&mut self, range: ByteRange, error: &block::Error) {
        self.unmapped.insert(range, error.into());
    }

    /// Whether another range that is not mapped would be one too many.
    pub(super) fn is_unmapped_list_full(&self) -> bool {
        self.unmapped.is_full()
    }

    pub(super) fn unmapped(&self) -> Vec<GivenUp> {
        self.unmapped.to_vec()
    }

    /// Whether another failed range would be one too many.
    pub(super) fn is_failed_list_full(&self) -> bool {
        self.failed_ranges.is_full()
    }

    pub(super) fn failed_bytes(&self) -> u64 {
        self.failed_ranges.bytes()
    }

    pub(super) fn failed_ranges(&self) -> Vec<GivenUp> {
        self.failed_ranges.to_vec()
    }

    /// Queued extents, and separate ranges in progress.
    #[cfg(test)]
    pub(super) fn pieces(&self) -> (usize, usize) {
        (self.queue.len(), self.in_progress.count())
    }

    /// A guest write to `range` has reached source and target.
    pub(super) fn mirrored(&mut self, range: ByteRange) {
        self.failed_ranges.remove(range);
    }
}

/// An empty bitmap of the disk.
///
/// # Errors
/// The detail in `config` is no granularity of a bitmap.
pub(super) fn empty_bitmap(config: &Config) -> Result<DirtyBitmap, GranularityError> {
    DirtyBitmap::new(config.len, config.detail).map_err(|_| GranularityError::OutOfRange(config.detail))
}
