//! The log of a simulated job: guest writes wait for their regions, the log's writes take their time, regions
//! are cleared after flushes.
//!
//! What the engine and the tap do around a [`RegionLog`](crate::RegionLog) happens here step by step, in
//! random order. What must hold at every step: where the two disks differ, or would if the target lost what
//! no flush has covered, the log has the region marked durably. Any part of an update in flight may be
//! durable.

use std::collections::BTreeMap;
use std::ops::Range;

use blockmirror_block::ByteRange;
use blockmirror_block::testing::Rng;

use super::Sim;
use crate::region_log::{ActiveRegions, Moment, Update};
use crate::sim::environment::contents;
use crate::sim::guest::Write;

/// Steps after which a write that waits for room goes beyond the limit.
const ROOM_STEPS: u32 = 200;

/// The log, and what is on its storage.
pub(super) struct SimLog {
    regions: ActiveRegions,
    /// Bytes of a region.
    size: u64,
    durable: Vec<bool>,
    update: Option<Update>,
    /// Flushes in flight, by the ids of their actions: when they began, and what was missing then.
    flushes: BTreeMap<u64, (Moment, Vec<ByteRange>)>,
    /// For how many steps a write has waited for room.
    short: u32,
}

impl SimLog {
    /// A new one of a disk of `len` bytes, all of which is marked.
    pub(super) fn new(len: u64, (size, most): (u64, usize)) -> Self {
        let mut regions = ActiveRegions::new(len, size, &[ByteRange::new(0, len)], most);
        regions.begin_job();
        let durable = vec![true; len.div_ceil(size) as usize];
        Self { regions, size, durable, update: None, flushes: BTreeMap::new(), short: 0 }
    }

    pub(super) fn flush_begins(&mut self, action: u64, missing: Vec<ByteRange>) {
        let moment = self.regions.flush_begins();
        self.flushes.insert(action, (moment, missing));
    }

    pub(super) fn flush_succeeded(&mut self, action: u64) {
        if let Some((moment, missing)) = self.flushes.remove(&action) {
            self.regions.flush_succeeded(moment, &missing);
        }
    }

    /// An update begins, or the one in flight is durable.
    fn write(&mut self, rng: &mut Rng) {
        match self.update.take() {
            None => self.update = self.regions.next_update(self.short > ROOM_STEPS),
            Some(update) if rng.one_in(3) => {
                let mut set = |runs: &[Range<u64>], marked| {
                    runs.iter().cloned().flatten().for_each(|region| self.durable[region as usize] = marked);
                };
                set(&update.mark, true);
                set(&update.clear, false);
                self.regions.updated(update);
            }
            update => self.update = update,
        }
        self.short = if self.update.is_none() && self.regions.lacks_room() { self.short + 1 } else { 0 };
    }

    /// The regions that are not marked after every crash.
    fn unmarked(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let clears =
            |region| self.update.iter().flat_map(|update| &update.clear).any(|run| run.contains(&region));
        let regions = (0..self.durable.len() as u64)
            .filter(move |region| !self.durable[*region as usize] || clears(*region));
        regions.map(|region| ByteRange::at(region * self.size, self.size))
    }
}

impl Sim<'_> {
    /// A write begins once its regions are marked.
    pub(super) fn enter_log(&mut self, write: &mut Write) {
        let entered = match &mut self.log {
            Some(log) => log.regions.begin_write(write.range, &mut write.request),
            // The job has ended.
            None => true,
        };
        if entered {
            write.logs = false;
            return self.begins(write);
        }
        if self.log.as_ref().is_some_and(|log| log.update.is_none() && log.regions.lacks_room()) {
            self.resume_if_overdue();
            self.core.flush_soon();
        }
    }

    /// The write to `range` has ended, as the job knows.
    pub(super) fn leave_log(&mut self, range: ByteRange) {
        if let Some(log) = &mut self.log {
            log.regions.end_write(range);
        }
    }

    /// The log's own step, and the rule.
    pub(super) fn log_step(&mut self) {
        let Some(log) = &mut self.log else { return };
        log.regions.set_limited(self.core.makes_room_in_log());
        if self.rng.one_in(2) {
            log.write(&mut self.rng);
        }
        let (source, target) = (contents(&self.environment.source), contents(&self.environment.target));
        // A crash may bring this back anywhere.
        let durable = self.workers.durable.as_deref().unwrap_or(&target);
        for region in log.unmarked() {
            let region = region.intersect(ByteRange::new(0, source.len() as u64));
            let bytes = region.start() as usize..region.end() as usize;
            let (source, durable) = (&source[bytes.clone()], &durable[bytes.clone()]);
            assert!(source == &target[bytes], "{region} differs and is not marked");
            assert!(source == durable, "{region} would differ after a crash and is not marked");
        }
    }
}
