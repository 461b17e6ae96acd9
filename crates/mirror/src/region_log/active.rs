//! Active regions: which regions of a log are marked, which guest writes are inside of them, and which are
//! marked or cleared next. Pure: no lock, no I/O.
//!
//! A marked region is *initial* from when a job begins until the job has copied it once; from then on, or if
//! a write has marked it, it is *active*. Active regions are ordered by their last write; the least recently
//! written are cleared when there are too many.
//!
//! Must hold:
//! - A write begins only when all its regions are marked durably, and none of them is being cleared.
//! - A region is cleared only after a flush of both disks that began when it was not missing at the target,
//!   and when the last write to it had ended; and no write to it has begun since.
//! - One update is in flight at a time. A write gets all its regions in one update, however many there are,
//!   so that two writes never wait for each other.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::ByteRange;

/// A region that a write has been in since it was marked.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// Writes that are inside.
    inside: usize,
    /// When a write began or ended last; the key in the order of active regions.
    last: u64,
}

/// A change of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Update {
    pub(crate) mark: Vec<Range<u64>>,
    pub(crate) clear: Vec<Range<u64>>,
}

/// A moment in the order of writes: that at which a flush begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(u64);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct ActiveRegions {
    /// Bytes of a region.
    size: u64,
    /// The most active regions while there is a limit; one write may add more.
    most: usize,
    /// Whether there is a limit: not where no job would make room.
    limited: bool,
    marked: ChunkBitmap,
    /// Marked when the job began, and not copied since.
    initial: ChunkBitmap,
    written: HashMap<u64, Written>,
    /// The active regions, by their last write.
    order: BTreeMap<u64, u64>,
    clock: u64,
    /// The regions that writes wait for, by when they asked.
    requests: BTreeMap<u64, Range<u64>>,
    /// What is to be cleared with the next update.
    retired: ChunkBitmap,
    /// What the update in flight clears, if there is one.
    clearing: Option<ChunkBitmap>,
}

impl ActiveRegions {
    /// Those of a disk of `len` bytes in regions of `size` bytes, of which those in `marked` are marked. At
    /// most `most` are active.
    pub(crate) fn new(len: u64, size: u64, marked: &[ByteRange], most: usize) -> Self {
        let count = len.div_ceil(size.max(1));
        let mut regions = Self {
            size: size.max(1),
            most: most.max(1),
            limited: false,
            marked: ChunkBitmap::new(count),
            initial: ChunkBitmap::new(count),
            written: HashMap::new(),
            order: BTreeMap::new(),
            clock: 0,
            requests: BTreeMap::new(),
            retired: ChunkBitmap::new(count),
            clearing: None,
        };
        for range in marked {
            let run = regions.regions_of(*range);
            regions.marked.set(run);
        }
        regions
    }

    fn regions_of(&self, range: ByteRange) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        let count = self.marked.len();
        (range.start() / self.size).min(count)..range.end().div_ceil(self.size).min(count)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A job begins that copies every marked region: the ranges.
    pub(crate) fn begin_job(&mut self) -> Vec<ByteRange> {
        self.initial = self.marked.clone();
        self.retired.clear_all();
        self.order.clear();
        let size = self.size;
        runs(&self.marked).map(|run| ByteRange::new(run.start * size, run.end.saturating_mul(size))).collect()
    }

    /// Sets whether there is a limit; whether that has changed.
    pub(crate) fn set_limited(&mut self, limited: bool) -> bool {
        std::mem::replace(&mut self.limited, limited) != limited
    }

    /// Whether a write to `range` would have to wait now.
    pub(crate) fn would_wait(&self, range: ByteRange) -> bool {
        self.regions_of(range).any(|region| !self.is_open(region))
    }

    /// Whether a write to the region may begin.
    fn is_open(&self, region: u64) -> bool {
        self.marked.get(region) && !self.clearing.as_ref().is_some_and(|clearing| clearing.get(region))
    }

    /// A write to `range` begins, or asks for its regions: whether it has begun. `request` is its own until
    /// then.
    pub(crate) fn begin_write(&mut self, range: ByteRange, request: &mut Option<u64>) -> bool {
        let regions = self.regions_of(range);
        if regions.clone().any(|region| !self.is_open(region)) {
            let id = match *request {
                // What it has asked for before was granted, and has been cleared since.
                Some(id) if self.requests.contains_key(&id) => id,
                _ => self.tick(),
            };
            self.requests.insert(id, regions);
            *request = Some(id);
            return false;
        }
        self.forget(request.take());
        for region in regions {
            self.keep(region);
            self.touch(region, |written| written.inside += 1);
        }
        true
    }

    /// A region that was to be cleared with the next update is not.
    fn keep(&mut self, region: u64) {
        if self.retired.clear(region..region + 1) > 0 {
            self.touch(region, |_| {});
        }
    }

    /// The write of the `request` does not begin any more.
    pub(crate) fn forget(&mut self, request: Option<u64>) {
        if let Some(id) = request {
            self.requests.remove(&id);
        }
    }

    /// A write to `range` that had begun has ended.
    pub(crate) fn end_write(&mut self, range: ByteRange) {
        for region in self.regions_of(range) {
            self.touch(region, |written| written.inside = written.inside.saturating_sub(1));
        }
    }

    fn touch(&mut self, region: u64, change: impl FnOnce(&mut Written)) {
        let now = self.tick();
        let written = self.written.entry(region).or_default();
        change(written);
        let before = std::mem::replace(&mut written.last, now);
        if !self.initial.get(region) {
            self.order.remove(&before);
            self.order.insert(now, region);
        }
    }

    /// Whether the set of active regions is full, or will be soon.
    pub(crate) fn is_short_of_room(&self) -> bool {
        self.limited && self.order.len() >= self.most - self.most / 8
    }

    /// The next update, if there is none in flight and anything to be changed. The caller performs it and
    /// reports to [`updated`](Self::updated). `beyond_limit`: as if there were no limit.
    pub(crate) fn next_update(&mut self, beyond_limit: bool) -> Option<Update> {
        if self.clearing.is_some() {
            return None;
        }
        let mut marks = ChunkBitmap::new(self.marked.len());
        while let Some((&id, regions)) = self.requests.first_key_value() {
            if self.limited && !beyond_limit && self.order.len() as u64 + marks.count() >= self.most as u64 {
                break;
            }
            let regions = regions.clone();
            self.requests.remove(&id);
            for region in regions {
                if !self.marked.get(region) {
                    marks.set(region..region + 1);
                } else {
                    self.keep(region);
                }
            }
        }
        let update = Update { mark: runs(&marks).collect(), clear: runs(&self.retired).collect() };
        if update == Update::default() {
            return None;
        }
        self.clearing = Some(std::mem::replace(&mut self.retired, ChunkBitmap::new(self.marked.len())));
        Some(update)
    }

    /// The update in flight is durable.
    pub(crate) fn updated(&mut self, update: Update) {
        self.clearing = None;
        for region in update.clear.into_iter().flatten() {
            self.marked.clear(region..region + 1);
            self.initial.clear(region..region + 1);
            if let Some(written) = self.written.remove(&region) {
                self.order.remove(&written.last);
            }
        }
        for region in update.mark.into_iter().flatten() {
            self.marked.set(region..region + 1);
            self.touch(region, |_| {});
        }
    }

    /// The update was not performed. What it was to clear is part of the next one; writes ask anew.
    pub(crate) fn given_back(&mut self, update: Update) {
        self.clearing = None;
        for regions in update.clear {
            self.retired.set(regions);
        }
    }

    /// Whether a write waits for more than an update.
    pub(crate) fn lacks_room(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Whether an update is in flight.
    pub(crate) fn is_updating(&self) -> bool {
        self.clearing.is_some()
    }

    /// A flush of both disks begins.
    pub(crate) fn flush_begins(&mut self) -> Moment {
        Moment(self.tick())
    }

    /// A flush that began at `moment` has succeeded; the target did not have the ranges in `missing` then.
    /// What is to be cleared therefore is part of the next update.
    pub(crate) fn flush_succeeded(&mut self, moment: Moment, missing: &[ByteRange]) {
        let mut lacking = ChunkBitmap::new(self.marked.len());
        for range in missing {
            lacking.set(self.regions_of(*range));
        }
        for region in runs(&self.initial.clone()).flatten() {
            if lacking.get(region) {
                continue;
            }
            self.initial.clear(region..region + 1);
            if let Some(written) = self.written.get(&region) {
                self.order.insert(written.last, region);
            } else {
                self.retired.set(region..region + 1);
            }
        }
        let surplus = self.order.len().saturating_sub(self.most * 3 / 4);
        let is_idle = |region: &u64| {
            let inside = self.written.get(region).is_some_and(|written| written.inside > 0);
            !inside && !lacking.get(*region)
        };
        let idle = self.order.range(..=moment.0).filter(|(_, region)| is_idle(region)).take(surplus);
        let idle: Vec<_> = idle.map(|(last, region)| (*last, *region)).collect();
        for (last, region) in idle {
            self.order.remove(&last);
            self.retired.set(region..region + 1);
        }
    }

    /// Whether the region is marked durably.
    #[cfg(test)]
    pub(crate) fn is_marked(&self, region: u64) -> bool {
        self.marked.get(region)
    }

    /// Regions that are active.
    #[cfg(test)]
    pub(crate) fn active(&self) -> usize {
        self.order.len()
    }
}

/// The runs of set chunks, in order.
fn runs(regions: &ChunkBitmap) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let run = regions.next_run(at)?;
        at = run.end;
        Some(run)
    })
}

#[cfg(test)]
mod tests;
