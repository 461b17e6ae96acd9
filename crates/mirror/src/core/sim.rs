//! The core alone, on a virtual clock: random schedules with simulated devices, failures and a guest that writes.
//!
//! One schedule is one seed. A single thread plays all the threads of a job, the guest, the operator and the
//! clock: at each step it asks the core for an action, performs half of one that is under way, lets the guest
//! write, delivers the guest's marks (late, as a real guest's come), or lets time pass. Devices are [`MemoryDisk`]s, so that
//! contents, allocation and backing files behave as in a format. In the end the target equals the source, or the
//! job has said why not.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{
    self as block, BlockDevice, ByteRange, ErrorKind, Geometry, WriteFlags, ZeroCost, ZeroFlags,
};

use super::config::Config;
use super::{Action, Core, Done, Next, Work};
use crate::error::Error;
use crate::mover::{Manner, Mover};
use crate::options::{MirrorOptions, OnError, SyncMode};
use crate::progress::{ErrorAction, Event, IoStatus, Operation};
use crate::state::JobState;
use crate::survey::Failure;

/// Steps after which a schedule is taken to hang.
const MAX_STEPS: u32 = 400_000;

/// A small generator (splitmix64): the same schedules on every machine, for ever.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub(super) fn range(&mut self, len: u64, longest: u64) -> ByteRange {
        let start = self.below(len);
        ByteRange::at(start, 1 + self.below(longest)).intersect(ByteRange::new(0, len))
    }

    pub(super) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let seed = self.next() as u8;
        (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed | 1).collect()
    }
}

/// An action under way. A copy that has read and not yet written is at its second half.
struct Running<'a> {
    action: Action,
    mover: Mover<'a>,
    has_read: bool,
}

pub(super) struct Setup {
    pub(super) source: Arc<MemoryDisk>,
    pub(super) target: Arc<MemoryDisk>,
    pub(super) options: MirrorOptions,
    pub(super) config: Config,
    /// One in this many half-operations fails; 0 for none.
    pub(super) failures: u64,
    /// Reads of these bytes always fail.
    bad: ByteRange,
    guest_writes: u64,
}

pub(super) fn write_randomly(rng: &mut Rng, disk: &MemoryDisk) -> ByteRange {
    if disk.is_empty() {
        return ByteRange::default();
    }
    let longest = rng.pick(&[1, 512, 4096, 20_000]);
    let range = rng.range(disk.len(), longest);
    match rng.below(6) {
        0 => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap(),
        1 => disk.discard(range).unwrap(),
        2 => disk.write_at(&vec![0; range.len() as usize], range.start(), WriteFlags::NONE).unwrap(),
        _ => disk.write_at(&rng.bytes(range.len()), range.start(), WriteFlags::NONE).unwrap(),
    }
    range
}

pub(super) fn setup(rng: &mut Rng) -> Setup {
    const LENGTHS: [u64; 11] = [0, 1, 511, 512, 1000, 4096, 20_000, 65_535, 65_536, 66_048, 200_000];
    let len = rng.pick(&LENGTHS);
    let top = rng.one_in(3);
    let mut disk = |name: &str, backing: &Option<Arc<MemoryDisk>>| {
        let mut geometry = Geometry::plain();
        geometry.cluster_size = rng.pick(&[None, Some(512), Some(4096), Some(65536)]);
        if geometry.cluster_size == Some(65536) && rng.one_in(3) {
            geometry.subcluster_size = Some(2048);
        }
        geometry.zero_cost = rng.pick(&[ZeroCost::Metadata, ZeroCost::Metadata, ZeroCost::Data]);
        let disk = MemoryDisk::new(len).with_geometry(geometry).named(name);
        match backing {
            Some(backing) => disk.with_backing(Arc::clone(backing) as Arc<dyn BlockDevice>),
            None => disk,
        }
    };
    let base = Arc::new(disk("base", &None));
    let backing = top.then(|| Arc::clone(&base));
    let source = Arc::new(disk("source", &backing));
    let target = Arc::new(disk("target", &backing));
    let writes = |rng: &mut Rng, disk: &MemoryDisk, n: u64| {
        for _ in 0..rng.below(n) {
            write_randomly(rng, disk);
        }
    };
    writes(rng, &base, 6);
    writes(rng, &source, 12);
    // With sync=top, a target with old contents of its own is the user's affair.
    let fresh = top || rng.one_in(2);
    if !fresh {
        writes(rng, &target, 12);
    }

    const POLICIES: [OnError; 5] =
        [OnError::Report, OnError::Ignore, OnError::Ignore, OnError::Stop, OnError::Auto];
    let granularity = 512 << if rng.one_in(2) { rng.below(3) } else { rng.below(18) };
    let options = MirrorOptions::new()
        .sync(if top { SyncMode::Top } else { SyncMode::Full })
        .granularity(granularity)
        .max_in_flight(1 + rng.below(6) as usize)
        .speed(rng.pick(&[0, 0, 50_000, 1_000_000]))
        .on_source_error(rng.pick(&POLICIES))
        .on_target_error(rng.pick(&POLICIES))
        .unmap(rng.one_in(2))
        .min_zero_run(rng.pick(&[0, 512, 4096, 5000]))
        .target_is_zero(fresh && !top && rng.one_in(3));
    options.check().unwrap();
    let mut config = Config::new(&options, granularity, len, target.geometry());
    // Small operations, so that a small disk takes many; and now and then a promise that does not hold.
    config.operation = config.detail << rng.below(4);
    config.buffer = config.operation * (1 + rng.below(6));
    config.zero_by_metadata |= rng.one_in(3);
    let failures = rng.pick(&[0, 0, 100, 20, 3]);
    let persistent = options.on_source_error == OnError::Ignore && len > 0 && rng.one_in(4);
    let bad = if persistent { rng.range(len, 1000) } else { ByteRange::default() };
    Setup { source, target, options, config, failures, bad, guest_writes: rng.pick(&[0, 3, 30]) }
}

struct Sim<'a> {
    rng: Rng,
    setup: &'a Setup,
    core: Core,
    now: Duration,
    running: Vec<Running<'a>>,
    /// What the guest has written and not marked yet.
    unmarked: Vec<ByteRange>,
    guest_writes: u64,
    injected: [u64; 2],
    /// Written since the last flush of the target.
    unflushed: Vec<ByteRange>,
    events: Vec<Event>,
    offset: u64,
}

impl<'a> Sim<'a> {
    fn new(rng: Rng, setup: &'a Setup) -> Self {
        Self {
            rng,
            setup,
            core: Core::new(setup.config.clone()).unwrap(),
            now: Duration::ZERO,
            running: Vec::new(),
            unmarked: Vec::new(),
            guest_writes: setup.guest_writes,
            injected: [0; 2],
            unflushed: Vec::new(),
            events: Vec::new(),
            offset: 0,
        }
    }

    fn run(&mut self) -> Result<(), Error> {
        for _ in 0..MAX_STEPS {
            match self.rng.below(12) {
                0..4 => {
                    if self.ask() {
                        break;
                    }
                }
                4..9 => self.perform_half(),
                9 => self.guest(),
                10 => self.operator(),
                _ => self.now += Duration::from_micros(self.rng.below(30_000)),
            }
            self.look();
        }
        assert!(self.running.is_empty());
        assert!(self.core.is_concluded(), "the job hangs: {:?}", self.core.progress(self.now));
        self.core.take_result().unwrap()
    }

    /// Asks for an action, as a thread does; whether the job is over.
    fn ask(&mut self) -> bool {
        let setup = self.setup;
        match self.core.next(self.now) {
            Next::Finished => return true,
            Next::Do(action) => {
                if let Some(range) = self.range_of(action.work) {
                    assert!(!range.is_empty() && range.end() <= setup.config.len);
                    for other in &self.running {
                        let other = self.range_of(other.action.work).unwrap_or_default();
                        assert!(
                            other.is_empty() || !range.overlaps(other),
                            "{range} and {other} in flight together"
                        );
                    }
                } else {
                    assert!(self.running.is_empty(), "a flush while something is in flight");
                }
                let manner = Manner::new(&setup.options, setup.target.geometry());
                let mover = Mover::new(&*setup.source, &*setup.target, manner);
                self.running.push(Running { action, mover, has_read: false });
                assert!(self.running.len() <= setup.config.max_in_flight);
            }
            Next::Wait(until) => {
                // Nobody else can do anything: let the clock jump.
                if let Some(until) = until
                    && self.running.is_empty()
                    && self.rng.one_in(2)
                {
                    assert!(until > self.now, "waiting for the past spins");
                    self.now = until;
                }
            }
        }
        false
    }

    fn range_of(&self, work: Work) -> Option<ByteRange> {
        match work {
            Work::Survey { range, .. } | Work::Copy { range, .. } | Work::Zero { range, .. } => Some(range),
            Work::Flush | Work::End(_) => None,
        }
    }

    fn perform_half(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let index = self.rng.below(self.running.len() as u64) as usize;
        let mut op = self.running.swap_remove(index);
        let work = op.action.work;
        let side = match work {
            Work::Copy { .. } if !op.has_read => Operation::Read,
            Work::Survey { .. } if self.rng.one_in(2) => Operation::Read,
            _ => Operation::Write,
        };
        if work == Work::Flush {
            // Whoever writes waits for its mark before it calls a write done; the last flush comes after that.
            while let Some(range) = self.unmarked.pop() {
                self.core.mark_dirty(range);
            }
        }
        let reads_bad = match work {
            Work::Copy { range, .. } => !op.has_read && range.overlaps(self.setup.bad),
            _ => false,
        } && !self.setup.bad.is_empty();
        let fails = reads_bad || (self.setup.failures > 0 && self.rng.one_in(self.setup.failures));
        // A failed write may have happened all the same, in part or whole.
        let happens = !fails || (side == Operation::Write && self.rng.one_in(2));
        let mut answer = None;
        if happens {
            answer = match work {
                Work::Copy { range, .. } if !op.has_read => {
                    op.mover.read(range).unwrap();
                    None
                }
                Work::Copy { range, target_zero } => {
                    self.unflushed.push(range);
                    Some(op.mover.write(range, target_zero).map(Done::Copied))
                }
                work => {
                    match work {
                        Work::Zero { range, .. } => self.unflushed.push(range),
                        Work::Flush => self.unflushed.clear(),
                        _ => {}
                    }
                    Some(op.mover.perform(work))
                }
            };
        }
        if fails && work == Work::Flush {
            // A failed flush may have lost any write that came after the last good one.
            for range in std::mem::take(&mut self.unflushed) {
                let junk = self.rng.bytes(range.len());
                self.setup.target.write_at(&junk, range.start(), WriteFlags::NONE).unwrap();
            }
        }
        if fails {
            self.injected[side as usize] += 1;
            let kind = if self.rng.one_in(3) { ErrorKind::NoSpace } else { ErrorKind::Io };
            let error = block::Error::new(kind, "simulated");
            answer = Some(Err(Failure { operation: side, error }));
        }
        match answer {
            None => self.running.push(Running { has_read: true, ..op }),
            Some(result) => self.core.finished(self.now, op.action.id, result),
        }
    }

    /// Writes to the source, or delivers a mark.
    fn guest(&mut self) {
        if !self.unmarked.is_empty() && self.rng.one_in(2) {
            let index = self.rng.below(self.unmarked.len() as u64) as usize;
            let range = self.unmarked.swap_remove(index);
            self.core.mark_dirty(range);
        } else if self.guest_writes > 0 && !self.core.is_concluded() {
            self.guest_writes -= 1;
            let range = write_randomly(&mut self.rng, &self.setup.source);
            self.unmarked.push(range);
        }
    }

    /// Resumes what an error stopped, and sometimes interferes.
    fn operator(&mut self) {
        let progress = self.core.progress(self.now);
        if progress.state == JobState::Paused {
            let stopped = self
                .events
                .iter()
                .any(|event| matches!(event, Event::Error { action, .. } if *action == ErrorAction::Stop));
            assert!(stopped || progress.io_status == IoStatus::Ok);
            self.core.resume().unwrap();
            assert_eq!(self.core.progress(self.now).io_status, IoStatus::Ok);
        } else if self.rng.one_in(20) {
            let _ = self.core.pause();
            assert!(matches!(self.core.next(self.now), Next::Wait(None) | Next::Finished));
        } else if self.rng.one_in(20) {
            let speed = self.rng.pick(&[0, 100_000, 1_000_000]);
            let _ = self.core.set_speed(self.now, speed);
        }
    }

    /// What must hold at every moment.
    fn look(&mut self) {
        self.events.extend(self.core.take_events());
        let progress = self.core.progress(self.now);
        assert!(progress.offset >= self.offset, "the offset goes back");
        assert!(progress.len >= progress.offset && progress.in_flight <= progress.len - progress.offset);
        self.offset = progress.offset;
        let buffers = self.running.iter().map(|op| match op.action.work {
            Work::Copy { range, .. } => range.len(),
            _ => 0,
        });
        assert!(buffers.sum::<u64>() <= self.setup.config.buffer, "the buffer limit");
    }

    fn judge(&self, result: &Result<(), Error>) {
        let failed = |side: Operation| {
            self.events.iter().any(|event| {
                matches!(event, Event::Error { operation, action: ErrorAction::Report, .. } if *operation == side)
            })
        };
        match result {
            Err(Error::Source(_)) => assert!(self.injected[0] > 0 && failed(Operation::Read)),
            Err(Error::Target(_)) => assert!(self.injected[1] > 0 && failed(Operation::Write)),
            Err(other) => panic!("{other}"),
            Ok(()) => {
                assert!(self.unflushed.is_empty(), "the end without a flush");
                let progress = self.core.progress(self.now);
                assert_eq!((progress.offset, progress.dirty_left), (progress.len, 0));
                let given_up = self.core.given_up();
                assert_eq!(progress.given_up, given_up.iter().map(|g| g.range.len()).sum::<u64>());
                let (source, mut target) =
                    (self.setup.source.contents().unwrap(), self.setup.target.contents().unwrap());
                for gap in &given_up {
                    assert!(self.injected[0] + self.injected[1] > 0);
                    let touched = self.core.whole_units(self.setup.bad);
                    assert!(
                        self.setup.failures > 0 || touched.contains_range(gap.range),
                        "gave up {} for {touched}",
                        gap.range
                    );
                    let gap = gap.range.start() as usize..gap.range.end() as usize;
                    target[gap.clone()].copy_from_slice(&source[gap]);
                }
                let differs = source.iter().zip(&target).position(|(a, b)| a != b);
                assert_eq!(differs, None, "first difference");
            }
        }
    }
}

/// Plays one schedule.
fn play(seed: u64) -> Result<(), Error> {
    let mut rng = Rng(seed);
    let setup = setup(&mut rng);
    let mut sim = Sim::new(rng, &setup);
    let result = sim.run();
    sim.judge(&result);
    result
}

#[test]
fn ten_thousand_schedules_end_with_an_equal_target_or_a_reported_failure() {
    let (mut equal, mut failed) = (0, 0);
    for seed in 0..10_000 {
        let outcome = std::panic::catch_unwind(|| play(seed));
        match outcome {
            Ok(Ok(())) => equal += 1,
            Ok(Err(_)) => failed += 1,
            Err(_) => panic!("seed {seed}"),
        }
    }
    // Both ends must really have been reached, or the schedules prove nothing.
    assert!(equal > 5000 && failed > 500, "{equal} equal, {failed} failed");
}
