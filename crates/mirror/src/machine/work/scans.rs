//! Scans: which range is scanned next, what becomes of its extents, and what a guest write to the target
//! takes out.

use std::collections::VecDeque;
use std::time::Duration;

use blockmirror_block::ByteRange;

use super::{QueuedExtent, ScanCursor, WorkTracker};
use crate::machine::counters::Counters;
use crate::machine::{Moved, Work};
use crate::scan::{CopyAction, CopyExtent};

/// Scans in flight together while the first pass streams over large runs, one of which keeps many workers
/// busy. For scattered dirt, which takes one for each small copy, there may be as many as half of the
/// operations.
const MAX_SCANS: usize = 2;
/// A scan begins while fewer extents than this are queued.
const QUEUE_LOW: usize = 512;
/// Separate ranges remembered while scans are in flight; beyond, all that is scanned is scanned again.
const MAX_WRITTEN_DURING_SCAN: usize = 4096;

impl WorkTracker {
    /// Whether another scan may begin, with a buffer of `buffer` bytes and at most `depth` operations in
    /// flight.
    pub(in crate::machine) fn wants_scan(&self, buffer: u64, depth: usize) -> bool {
        let scattered = self.scans.is_empty();
        let most = if scattered { MAX_SCANS.max(depth / 2) } else { MAX_SCANS };
        self.operations.scans() < most
            && self.queue.len() < QUEUE_LOW
            && self.queue.copy_bytes() < buffer.saturating_mul(2)
            && !self.operations.is_last_flush()
    }

    /// The next scan, and how often its range has failed: the rest of one that was begun, a retry whose delay
    /// is over, or the next dirty run. `in_the_way` finds the first guest write in a range that keeps an
    /// operation from it.
    pub(in crate::machine) fn take_scan(
        &mut self,
        now: Duration,
        in_the_way: impl Fn(ByteRange) -> Option<ByteRange>,
    ) -> Option<(Work, u32)> {
        let scan = self.next_scan(now, in_the_way)?;
        let ScanCursor { range, tries, first_pass } = scan;
        // Before the scan looks, hence before anything is read.
        self.dirty.clear(range.start()..range.end());
        let untouched = first_pass && !self.target_written;
        Some((Work::Scan { range, first_pass, untouched, by_block: false }, tries))
    }

    fn next_scan(
        &mut self,
        now: Duration,
        in_the_way: impl Fn(ByteRange) -> Option<ByteRange>,
    ) -> Option<ScanCursor> {
        if let Some(mut scan) = self.next_begun(&in_the_way) {
            let rest = ByteRange::new(self.end_of_scan(scan.range), scan.range.end());
            if !rest.is_empty() {
                self.scans.push_front(ScanCursor { range: rest, ..scan });
                scan.range = ByteRange::new(scan.range.start(), rest.start());
            }
            return Some(scan);
        }
        let (in_progress, granules) = (&self.in_progress, self.granules);
        let obstacle = |range| {
            let taken = in_progress.first_overlap(range).map(|taken| granules.round(taken));
            first([taken, in_the_way(range)])
        };
        let scan = match self.retries.take_due(now, |range| free_part(range, obstacle)) {
            Some(due) => ScanCursor { range: due.range, tries: due.tries, first_pass: false },
            None if self.retries.is_full() || self.dirty.dirty_bytes() <= self.retries.bytes() => {
                return None;
            }
            None => {
                let range = self
                    .free_dirty_run(self.cursor, self.granules.disk, obstacle)
                    .or_else(|| self.free_dirty_run(0, self.cursor, obstacle))?;
                let range = ByteRange::new(range.start(), self.end_of_scan(range));
                self.cursor = range.end();
                ScanCursor { range, tries: 0, first_pass: false }
            }
        };
        self.in_progress.insert(scan.range);
        Some(scan)
    }

    /// Where a scan of `range` ends. Where the guest writes to the target itself, it cuts pieces out of what
    /// was scanned; they are few if little was.
    fn end_of_scan(&self, range: ByteRange) -> u64 {
        if !self.target_written {
            return range.end();
        }
        range.end().min(range.start().saturating_add(self.piece))
    }

    /// The first part of a scan that was begun in which no guest write is in the way.
    fn next_begun(&mut self, in_the_way: impl Fn(ByteRange) -> Option<ByteRange>) -> Option<ScanCursor> {
        for _ in 0..self.scans.len() {
            let scan = self.scans.pop_front()?;
            let Some(part) = free_part(scan.range, &in_the_way) else {
                self.scans.push_back(scan);
                continue;
            };
            // What lies before the write comes later.
            let before = ByteRange::new(scan.range.start(), part.start());
            let after = ByteRange::new(part.end(), scan.range.end());
            if !before.is_empty() {
                self.scans.push_back(ScanCursor { range: before, ..scan });
            }
            if !after.is_empty() {
                self.scans.push_front(ScanCursor { range: after, ..scan });
            }
            return Some(ScanCursor { range: part, ..scan });
        }
        None
    }

    /// The first part of a dirty run that begins in `from..to`, in whole granules, that has no obstacle and
    /// does not wait for another try.
    fn free_dirty_run(
        &self,
        from: u64,
        to: u64,
        obstacle: impl Fn(ByteRange) -> Option<ByteRange>,
    ) -> Option<ByteRange> {
        let waiting = |range| self.retries.first_overlap(range).map(|waiting| waiting.range);
        let mut at = from;
        while at < to {
            let run = self.dirty.next_dirty(at, u64::MAX).filter(|run| run.start < to)?;
            let run = ByteRange::new(run.start, run.end);
            let free = free_part(run, |range| first([obstacle(range), waiting(range)]));
            if free.is_some() {
                return free;
            }
            at = run.end();
        }
        None
    }

    /// The scan `id` of `range` found `extents`, which cover a prefix of it.
    pub(in crate::machine) fn scanned(
        &mut self,
        id: u64,
        range: ByteRange,
        (tries, first_pass): (u32, bool),
        extents: Vec<CopyExtent>,
        counters: &mut Counters,
    ) {
        let scan = ScanCursor { range, tries, first_pass };
        let mut end = extents.last().map_or(range.start(), |last| last.range.end());
        if self.target_written {
            // The scan may have begun before the guest wrote to the target.
            end = end.min(range.start().saturating_add(self.piece));
        }
        let rest = ByteRange::new(end, range.end());
        if !rest.is_empty() {
            self.scans.push_front(ScanCursor { range: rest, ..scan });
        }
        let kept = ByteRange::new(range.start(), end);
        if id < self.scans_valid_from {
            return self.requeue(kept);
        }
        for extent in extents {
            let extent = CopyExtent { range: extent.range.intersect(kept), ..extent };
            self.leave_out_written(extent, scan, counters);
        }
    }

    /// The scan of `range` is over: the next one of these bytes looks after the guest's writes.
    pub(in crate::machine) fn scan_ended(&mut self, range: ByteRange) {
        self.written_during_scan.remove(range);
    }

    /// Where the guest has written to the target while the scan was in flight, its answer may be outdated,
    /// and nothing is left to do.
    fn leave_out_written(&mut self, mut extent: CopyExtent, scan: ScanCursor, counters: &mut Counters) {
        let whole = extent.range;
        let mut at = whole.start();
        while at < whole.end() {
            let rest = ByteRange::new(at, whole.end());
            let written = self.written_during_scan.first_overlap(rest).map(|run| run.intersect(rest));
            extent.range = ByteRange::new(at, written.map_or(whole.end(), ByteRange::start));
            if extent.range.is_empty() {
                // Nothing lies before it.
            } else if extent.below {
                self.enqueue_below(extent, scan, counters);
            } else {
                self.enqueue(extent.range, extent.action, scan, counters);
            }
            at = extent.range.end();
            if let Some(written) = written {
                self.in_progress.remove(written);
                counters.passed_over(written.len());
                at = written.end();
            }
        }
    }

    /// An extent that the top image does not decide is left to the target's backing file, except where the
    /// guest has written since the start (and discarded again): there the target may have something else by
    /// now.
    fn enqueue_below(&mut self, extent: CopyExtent, scan: ScanCursor, counters: &mut Counters) {
        let mut at = extent.range.start();
        let end = extent.range.end();
        while at < end {
            let written = self.guest_written.as_ref().and_then(|map| map.next_dirty(at, end - at));
            let written = written.map_or(ByteRange::new(end, end), |run| ByteRange::new(run.start, run.end));
            let written = written.intersect(extent.range);
            let untouched = ByteRange::new(at, if written.is_empty() { end } else { written.start() });
            self.in_progress.remove(untouched);
            self.failed_ranges.remove(untouched);
            counters.left_to_backing(untouched.len());
            self.enqueue(written, extent.action, scan, counters);
            at = untouched.end().max(written.end());
        }
    }

    fn enqueue(&mut self, range: ByteRange, action: CopyAction, scan: ScanCursor, counters: &mut Counters) {
        if range.is_empty() {
            return;
        }
        if action == CopyAction::Skip {
            let moved = Moved { skipped: range.len(), ..Moved::default() };
            return self.completed(range, moved, counters);
        }
        let ScanCursor { tries, first_pass, .. } = scan;
        self.queue.push(QueuedExtent { range, action, tries, first_pass });
    }

    /// A guest write to `range` was admitted to the target: the job has nothing to do there, unless the write
    /// fails and marks it.
    pub(in crate::machine) fn guest_writes_target(&mut self, range: ByteRange, counters: &mut Counters) {
        self.note_target_written();
        self.cede_to_guest(range, counters);
        for op in self.operations.iter() {
            // A scan may have looked before this write.
            let Work::Scan { range: looked_at, .. } = op.work else { continue };
            if op.id < self.scans_valid_from || !looked_at.overlaps(range) {
                continue;
            }
            if self.written_during_scan.count() >= MAX_WRITTEN_DURING_SCAN {
                self.scans_valid_from = self.next_id;
                break;
            }
            self.written_during_scan.insert(looked_at.intersect(range));
        }
        if let Some(written) = &mut self.guest_written {
            written.set(range.start()..range.end());
        }
        self.dirty.clear(range.start()..range.end());
        self.retries.cleaned(range, &self.dirty);
    }

    /// Takes out of the queue what the guest is about to write to the target itself. The scan's answer is
    /// outdated by then; and if it became dirty again, a busy guest would make work as fast as the job does
    /// it.
    fn cede_to_guest(&mut self, range: ByteRange, counters: &mut Counters) {
        let Self { queue, in_progress, .. } = self;
        if in_progress.first_overlap(range).is_none() {
            return;
        }
        queue.cut(range, |cut| {
            in_progress.remove(cut);
            counters.passed_over(cut.len());
        });
    }

    /// From the guest's first write to the target on, what was scanned at length is scanned again, in pieces.
    fn note_target_written(&mut self) {
        if std::mem::replace(&mut self.target_written, true) {
            return;
        }
        let mut scans: VecDeque<ScanCursor> = VecDeque::new();
        for QueuedExtent { range, tries, first_pass, .. } in self.queue.take_all() {
            match scans.back_mut() {
                Some(last)
                    if last.range.end() == range.start()
                        && (last.tries, last.first_pass) == (tries, first_pass) =>
                {
                    last.range = ByteRange::new(last.range.start(), range.end());
                }
                _ => scans.push_back(ScanCursor { range, tries, first_pass }),
            }
        }
        scans.append(&mut self.scans);
        self.scans = scans;
    }

    /// The target may have lost what it had when it was scanned: zeros that were found there may be none.
    pub(in crate::machine) fn forget_target(&mut self) {
        for queued in self.queue.answers_mut() {
            if let CopyAction::Copy { target_zero } | CopyAction::Clone { target_zero } = &mut queued.action {
                *target_zero = false;
            }
        }
        for op in self.operations.iter() {
            if let Work::Copy { range, target_zero: true, .. } | Work::Clone { range, target_zero: true } =
                op.work
            {
                let granules = self.granules.round(range);
                self.dirty.set(granules.start()..granules.end());
            }
        }
        self.scans_valid_from = self.next_id;
    }
}

/// Of two ranges the one that begins first.
fn first(ranges: [Option<ByteRange>; 2]) -> Option<ByteRange> {
    ranges.into_iter().flatten().min_by_key(|range| range.start())
}

/// The first part of `range` without an obstacle, where `obstacle` finds the first one in a range.
fn free_part(range: ByteRange, obstacle: impl Fn(ByteRange) -> Option<ByteRange>) -> Option<ByteRange> {
    let mut at = range.start();
    while at < range.end() {
        let rest = ByteRange::new(at, range.end());
        match obstacle(rest) {
            None => return Some(rest),
            Some(obstacle) if obstacle.start() > at => return Some(ByteRange::new(at, obstacle.start())),
            Some(obstacle) => at = obstacle.end(),
        }
    }
    None
}
