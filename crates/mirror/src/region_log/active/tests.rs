//! Which regions are marked when: the rules one by one, and a model under random calls.

#![allow(clippy::single_range_in_vec_init, reason = "a run of regions is a range")]

use blockmirror_block::testing::Rng;

use super::*;

const SIZE: u64 = 1000;
const LEN: u64 = 20 * SIZE - 1;

/// Regions of a disk of which none is marked, `most` active.
fn clean(most: usize) -> ActiveRegions {
    let mut regions = ActiveRegions::new(LEN, SIZE, &[], most);
    regions.begin_job();
    regions.set_limited(true);
    regions
}

fn region(number: u64) -> ByteRange {
    ByteRange::at(number * SIZE + 10, 20)
}

fn begin(regions: &mut ActiveRegions, range: ByteRange) -> bool {
    regions.begin_write(range, &mut None)
}

/// A write to `range` that begins, after an update if it takes one.
fn write(regions: &mut ActiveRegions, range: ByteRange) {
    if !begin(regions, range) {
        let update = regions.next_update(false).unwrap();
        regions.updated(update);
        assert!(begin(regions, range));
    }
}

/// A flush that succeeds, and the update after it.
fn flush(regions: &mut ActiveRegions, missing: &[ByteRange]) -> Update {
    let moment = regions.flush_begins();
    regions.flush_succeeded(moment, missing);
    let update = regions.next_update(false).unwrap_or_default();
    if regions.is_updating() {
        regions.updated(update.clone());
    }
    update
}

#[test]
fn a_write_begins_when_all_its_regions_are_marked() {
    let mut regions = clean(4);
    let range = ByteRange::new(2 * SIZE - 1, 4 * SIZE + 1);
    assert!(regions.would_wait(range) && !begin(&mut regions, range));
    let update = regions.next_update(false).unwrap();
    assert_eq!(update, Update { mark: vec![1..5], clear: vec![] });
    assert!(!begin(&mut regions, range), "it is not durable yet");
    regions.updated(update);
    assert!(!regions.would_wait(range) && begin(&mut regions, range));
    // Another one needs no update, in part or in whole.
    assert!(begin(&mut regions, region(3)));
    assert!(begin(&mut regions, ByteRange::at(7 * SIZE, 0)), "of nothing");
}

#[test]
fn one_update_is_in_flight_and_takes_all_that_waits_for_the_next() {
    let mut regions = clean(8);
    assert!(!begin(&mut regions, region(1)));
    let first = regions.next_update(false).unwrap();
    assert!(!begin(&mut regions, region(5)) && !begin(&mut regions, region(6)));
    assert_eq!(regions.next_update(false), None);
    regions.updated(first);
    assert_eq!(regions.next_update(false), Some(Update { mark: vec![5..7], clear: vec![] }));
}

#[test]
fn what_was_copied_and_flushed_is_cleared() {
    let mut regions = ActiveRegions::new(LEN, SIZE, &[ByteRange::new(0, LEN)], 4);
    regions.begin_job();
    let update = flush(&mut regions, &[ByteRange::new(5 * SIZE + 1, LEN)]);
    assert_eq!(update.clear, [0..5]);
    assert_eq!(flush(&mut regions, &[region(7)]).clear, [5..7, 8..20]);
    assert!(regions.is_marked(7) && !regions.is_marked(8));
}

/// What a write has been in stays marked, as it will be written again; the least recently written go first.
#[test]
fn regions_that_are_written_stay_until_there_are_too_many() {
    let mut regions = ActiveRegions::new(LEN, SIZE, &[ByteRange::new(0, LEN)], 4);
    regions.begin_job();
    regions.set_limited(true);
    for number in [3, 1, 2, 4, 3] {
        write(&mut regions, region(number));
        regions.end_write(region(number));
    }
    assert_eq!(flush(&mut regions, &[]).clear, [0..2, 5..20], "three of four may stay");
    assert_eq!(regions.active(), 3);
    write(&mut regions, region(9));
    assert_eq!(flush(&mut regions, &[]).clear, [2..3]);
    assert!([3, 4, 9].into_iter().all(|number| regions.is_marked(number)));
}

#[test]
fn a_full_set_takes_none_until_a_flush_makes_room_or_there_is_no_job() {
    let mut regions = clean(4);
    for number in 0..4 {
        write(&mut regions, region(number));
    }
    assert!(regions.is_short_of_room());
    assert!(!begin(&mut regions, region(9)) && regions.next_update(false).is_none());
    regions.end_write(region(1));
    assert_eq!(flush(&mut regions, &[]), Update { mark: vec![9..10], clear: vec![1..2] });
    assert!(begin(&mut regions, region(9)));
    assert!(!begin(&mut regions, region(10)) && regions.next_update(false).is_none());
    assert!(regions.set_limited(false));
    assert_eq!(regions.next_update(false).unwrap().mark, [10..11]);
}

#[test]
fn a_write_over_more_regions_than_may_be_active_gets_them_all() {
    let mut regions = clean(4);
    write(&mut regions, ByteRange::new(0, LEN));
    assert_eq!(regions.active(), 20);
    regions.end_write(ByteRange::new(0, LEN));
    assert_eq!(flush(&mut regions, &[]).clear, [0..17]);
}

/// A flush covers nothing of a write that ended after it had begun.
#[test]
fn a_region_is_cleared_only_by_a_flush_that_began_after_its_last_write() {
    let mut regions = clean(1);
    write(&mut regions, region(3));
    let moment = regions.flush_begins();
    regions.end_write(region(3));
    regions.flush_succeeded(moment, &[]);
    assert_eq!(regions.next_update(false), None, "it ended after the flush had begun");
    let moment = regions.flush_begins();
    write(&mut regions, region(3));
    regions.flush_succeeded(moment, &[]);
    assert_eq!(regions.next_update(false), None, "one is inside");
    regions.end_write(region(3));
    assert!(flush(&mut regions, &[region(3)]).clear.is_empty(), "it is not copied");
    assert_eq!(flush(&mut regions, &[]).clear, [3..4]);
}

#[test]
fn a_region_that_is_being_cleared_is_marked_again_first() {
    let mut regions = clean(1);
    write(&mut regions, region(3));
    regions.end_write(region(3));
    let moment = regions.flush_begins();
    regions.flush_succeeded(moment, &[]);
    // A write that comes before the update keeps it.
    write(&mut regions, region(3));
    assert_eq!(regions.next_update(false), None);
    regions.end_write(region(3));
    let moment = regions.flush_begins();
    regions.flush_succeeded(moment, &[]);
    let update = regions.next_update(false).unwrap();
    assert_eq!(update.clear, [3..4]);
    assert!(!begin(&mut regions, region(3)), "the update in flight clears it");
    regions.updated(update);
    assert_eq!(regions.next_update(false).unwrap().mark, [3..4]);
}

#[test]
fn another_job_copies_all_that_is_marked() {
    let mut regions = clean(8);
    write(&mut regions, region(3));
    write(&mut regions, region(4));
    regions.end_write(region(3));
    assert_eq!(regions.begin_job(), [ByteRange::new(3 * SIZE, 5 * SIZE)]);
    assert!(flush(&mut regions, &[ByteRange::new(3 * SIZE, 5 * SIZE)]).clear.is_empty());
    assert!(regions.is_marked(3) && regions.is_marked(4));
}

/// The two disks as versions of each region, in memory and durably, under a job and writers that do anything
/// in any order. After each step the power is cut in thought: what differs is marked.
struct Model {
    regions: ActiveRegions,
    /// Writes that are inside.
    inside: Vec<ByteRange>,
    waiting: Vec<(ByteRange, Option<u64>)>,
    update: Option<Update>,
    durably_marked: Vec<bool>,
    source: Vec<u64>,
    target: Vec<u64>,
    dirty: Vec<bool>,
    /// Written to either disk since a flush of both that began later.
    unflushed: Vec<bool>,
    flush: Option<(Moment, Vec<ByteRange>, Vec<bool>)>,
    version: u64,
}

impl Model {
    fn new(most: usize) -> Self {
        let mut regions = ActiveRegions::new(LEN, SIZE, &[ByteRange::new(0, LEN)], most);
        regions.begin_job();
        regions.set_limited(true);
        Self {
            regions,
            inside: vec![],
            waiting: vec![],
            update: None,
            durably_marked: vec![true; 20],
            source: vec![1; 20],
            target: vec![0; 20],
            dirty: vec![true; 20],
            unflushed: vec![true; 20],
            flush: None,
            version: 1,
        }
    }

    fn touched(&mut self, index: usize) {
        self.unflushed[index] = true;
        if let Some((_, _, covered)) = &mut self.flush {
            covered[index] = false;
        }
    }

    fn step(&mut self, rng: &mut Rng) {
        match rng.below(9) {
            0 => {
                let first = rng.below(20);
                let last = (first + if rng.one_in(8) { 9 } else { rng.below(2) }).min(19);
                self.waiting.push((ByteRange::new(first * SIZE, (last * SIZE + 7).min(LEN)), None));
            }
            1 | 2 if !self.waiting.is_empty() => self.write_asks(rng),
            3 if !self.inside.is_empty() => {
                let index = rng.index(self.inside.len());
                self.version += 1;
                for at in indexes(self.inside[index]) {
                    self.source[at] = self.version;
                    self.touched(at);
                }
            }
            4 if !self.inside.is_empty() => {
                let range = self.inside.swap_remove(rng.index(self.inside.len()));
                indexes(range).for_each(|at| self.dirty[at] = true);
                self.regions.end_write(range);
            }
            5 | 6 => {
                let at = rng.index(20);
                if std::mem::take(&mut self.dirty[at]) {
                    self.target[at] = self.source[at];
                    self.touched(at);
                }
            }
            7 => self.flush_steps(),
            _ => self.update_steps(),
        }
    }

    fn write_asks(&mut self, rng: &mut Rng) {
        let index = rng.index(self.waiting.len());
        let (range, request) = &mut self.waiting[index];
        if self.regions.begin_write(*range, request) {
            let (range, _) = self.waiting.swap_remove(index);
            for at in indexes(range) {
                assert!(self.durably_marked[at], "a write begins in {at}, which is not marked");
            }
            self.inside.push(range);
        } else if rng.one_in(10) {
            let (_, request) = self.waiting.swap_remove(index);
            self.regions.forget(request);
        }
    }

    fn flush_steps(&mut self) {
        let Some((moment, missing, covered)) = self.flush.take() else {
            let moment = self.regions.flush_begins();
            let missing = (0..20).filter(|at| self.dirty[*at as usize]).map(region).collect();
            self.flush = Some((moment, missing, vec![true; 20]));
            return;
        };
        for at in (0..20).filter(|at| covered[*at]) {
            self.unflushed[at] = false;
        }
        self.regions.flush_succeeded(moment, &missing);
    }

    fn update_steps(&mut self) {
        let Some(update) = self.update.take() else {
            self.update = self.regions.next_update(false);
            return;
        };
        let regions = |runs: &[Range<u64>]| runs.iter().cloned().flatten().collect::<Vec<_>>();
        for at in regions(&update.mark) {
            self.durably_marked[at as usize] = true;
        }
        for at in regions(&update.clear) {
            self.durably_marked[at as usize] = false;
        }
        self.regions.updated(update);
    }

    fn check(&self, step: u32) {
        let clears: Vec<u64> =
            self.update.iter().flat_map(|update| update.clear.iter().cloned().flatten()).collect();
        for at in 0..20 {
            // Any part of the update in flight may be durable.
            if self.durably_marked[at] && !clears.contains(&(at as u64)) {
                continue;
            }
            assert_eq!(
                self.source[at], self.target[at],
                "step {step}: region {at} differs and is not marked"
            );
            assert!(!self.unflushed[at], "step {step}: region {at} may be lost and is not marked");
        }
    }
}

fn indexes(range: ByteRange) -> Range<usize> {
    (range.start() / SIZE) as usize..range.end().div_ceil(SIZE) as usize
}

#[test]
fn whatever_happens_what_differs_after_a_power_cut_is_marked() {
    let mut cleared = 0;
    for seed in 0..300 {
        let mut rng = Rng::new(seed, 7);
        let mut model = Model::new(rng.pick(&[1, 2, 4, 30]));
        for step in 0..600 {
            model.step(&mut rng);
            model.check(step);
            cleared = cleared.max(model.durably_marked.iter().filter(|marked| !**marked).count());
        }
    }
    assert!(cleared > 10, "{cleared}: nothing was ever cleared");
}
