//! Jobs on a tap, on a virtual clock: guests that write in both modes, an operator who asks for anything at any time.
//!
//! Each write of the guest goes through its steps (let in, source, target, finished) in an order of the seed's choice,
//! among operations of the job that do the same. What must hold: when the end is performed no write is under way, and
//! the target is equal to the source and durable, so that every acknowledged write is in whatever survives; READY is
//! told only when nothing but writes under way differs; verbs are refused exactly where the table says.

use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{self as block, BlockDevice, ByteRange, ErrorKind, WriteFlags, ZeroFlags};

use super::sim::{Rng, Setup, setup, write_randomly};
use super::{Action, Admission, Core, Done, Ending, Next, Work};
use crate::error::Error;
use crate::mover::{Manner, Mover};
use crate::options::{CopyMode, SyncMode};
use crate::progress::{Event, IoStatus, Operation, Progress};
use crate::state::{JobState, Refused, Verb};
use crate::survey::Failure;

const STEPS: u32 = 1500;
const MAX_STEPS: u32 = 400_000;

struct Running<'a> {
    action: Action,
    mover: Mover<'a>,
    has_read: bool,
}

#[derive(Clone)]
enum Payload {
    Data(Vec<u8>),
    Zeros,
    Discard,
}

struct Write {
    ticket: u64,
    range: ByteRange,
    payload: Payload,
    admission: Admission,
    source: Option<bool>,
    target: Option<block::Result<()>>,
}

impl Write {
    fn put(&self, disk: &MemoryDisk) {
        let range = self.range;
        match &self.payload {
            Payload::Data(bytes) => disk.write_at(bytes, range.start(), WriteFlags::NONE).unwrap(),
            Payload::Zeros => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap(),
            Payload::Discard => disk.discard(range).unwrap(),
        }
    }
}

struct Sim<'a> {
    rng: Rng,
    setup: &'a Setup,
    core: Core,
    now: Duration,
    running: Vec<Running<'a>>,
    writes: Vec<Write>,
    strangers: Vec<ByteRange>,
    unflushed: Vec<ByteRange>,
    failures: u64,
    /// The guest rests and the operator only wants the end.
    closing: bool,
    state: Option<JobState>,
    readies: u32,
    offset: u64,
    ended: Option<Ending>,
}

impl<'a> Sim<'a> {
    fn error(&mut self) -> block::Error {
        block::Error::new(self.rng.pick(&[ErrorKind::Io, ErrorKind::NoSpace]), "simulated")
    }

    fn fails(&mut self) -> bool {
        self.failures > 0 && self.rng.one_in(self.failures)
    }

    fn run(&mut self) -> Result<(), Error> {
        for step in 0..MAX_STEPS {
            if step == STEPS {
                self.closing = true;
                self.failures = 0;
            }
            match self.rng.below(16) {
                0..4 => {
                    if self.ask() && self.writes.is_empty() {
                        break;
                    }
                }
                4..9 => self.perform_half(),
                9..14 => self.guest(),
                14 => self.operator(),
                _ => self.now += Duration::from_micros(self.rng.below(30_000)),
            }
            self.look();
        }
        assert!(self.core.is_concluded(), "hangs: {:?}", self.core.progress(self.now));
        self.core.take_result().unwrap()
    }

    fn ask(&mut self) -> bool {
        match self.core.next(self.now) {
            Next::Finished => return true,
            Next::Do(action) => {
                let range = range_of(action.work);
                let other = self.running.iter().any(|op| range_of(op.action.work).overlaps(range));
                assert!(!other, "two operations on {range}");
                let guest = |write: &Write| write.admission == Admission::Both && write.range.overlaps(range);
                assert!(!self.writes.iter().any(guest), "{:?} under a write of the guest", action.work);
                let manner = Manner::new(&self.setup.options, self.setup.target.geometry());
                let mover = Mover::new(&*self.setup.source, &*self.setup.target, manner);
                self.running.push(Running { action, mover, has_read: false });
            }
            Next::Wait(Some(until)) if self.running.is_empty() => {
                assert!(until > self.now, "waiting for the past spins");
                self.now = until;
            }
            Next::Wait(_) => {}
        }
        false
    }

    fn perform_half(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let index = self.rng.below(self.running.len() as u64) as usize;
        let mut op = self.running.swap_remove(index);
        let work = op.action.work;
        if let Work::End(ending) = work {
            self.end(ending);
            return self.core.finished(self.now, op.action.id, Ok(Done::Ended));
        }
        let reads = matches!(work, Work::Copy { .. }) && !op.has_read;
        let fails = self.fails();
        let happens = !fails || (!reads && self.rng.one_in(2));
        let mut answer = None;
        if happens {
            answer = match work {
                Work::Copy { range, .. } if reads => {
                    op.mover.read(range).unwrap();
                    None
                }
                Work::Copy { range, target_zero } => {
                    self.unflushed.push(range);
                    Some(op.mover.write(range, target_zero).map(Done::Copied))
                }
                work => {
                    if let Work::Zero { range, .. } = work {
                        self.unflushed.push(range);
                    }
                    Some(op.mover.perform(work))
                }
            };
        }
        if work == Work::Flush {
            for range in std::mem::take(&mut self.unflushed) {
                if fails {
                    let junk = self.rng.bytes(range.len());
                    self.setup.target.write_at(&junk, range.start(), WriteFlags::NONE).unwrap();
                }
            }
        }
        if fails {
            let operation = if reads { Operation::Read } else { Operation::Write };
            answer = Some(Err(Failure { operation, error: self.error() }));
        }
        match answer {
            None => self.running.push(Running { has_read: true, ..op }),
            Some(result) => self.core.finished(self.now, op.action.id, result),
        }
    }

    fn guest(&mut self) {
        let len = self.setup.config.len;
        if !self.strangers.is_empty() && self.rng.one_in(20) {
            let range = self.strangers.swap_remove(0);
            let bytes = self.rng.bytes(range.len());
            self.setup.source.write_at(&bytes, range.start(), WriteFlags::NONE).unwrap();
            return self.core.stranger_finished(range);
        }
        if self.writes.len() < 4 && len > 0 && !self.closing && self.rng.one_in(6) {
            let longest = self.rng.pick(&[1, 512, 4096, 20_000]);
            let range = self.rng.range(len, longest);
            let payload = match self.rng.below(6) {
                0 => Payload::Zeros,
                1 => Payload::Discard,
                _ => Payload::Data(self.rng.bytes(range.len())),
            };
            let can_mirror = !matches!(payload, Payload::Discard);
            let ticket = self.core.guest_begin(range, can_mirror);
            let admission = Admission::Wait;
            self.writes.push(Write { ticket, range, payload, admission, source: None, target: None });
            return;
        }
        if self.writes.is_empty() {
            return;
        }
        let index = self.rng.below(self.writes.len() as u64) as usize;
        let mut write = self.writes.swap_remove(index);
        match (write.admission, write.source) {
            (Admission::Wait, _) => {
                write.admission = self.core.guest_admit(write.ticket);
                if write.admission != Admission::Over {
                    self.writes.push(write);
                }
            }
            (_, None) => {
                let fails = self.failures > 0 && self.rng.one_in(10);
                if !fails || self.rng.one_in(2) {
                    write.put(&self.setup.source);
                }
                write.source = Some(!fails);
                self.writes.push(write);
            }
            (Admission::Both, Some(true)) if write.target.is_none() => {
                let fails = self.fails();
                if !fails || self.rng.one_in(2) {
                    write.put(&self.setup.target);
                    self.unflushed.push(write.range);
                }
                write.target = Some(if fails { Err(self.error()) } else { Ok(()) });
                self.writes.push(write);
            }
            (_, Some(ok)) => self.core.guest_finished(write.ticket, ok, write.target),
        }
    }

    fn operator(&mut self) {
        let Progress { state, io_status, .. } = self.core.progress(self.now);
        let stopped = io_status != IoStatus::Ok;
        if self.closing {
            let _ = self.core.resume();
            let _ = if self.rng.one_in(2) { self.core.complete() } else { self.core.cancel() };
            let _ = self.core.finalize();
            return;
        }
        let verb = self.rng.pick(&Verb::ALL);
        let fatal = verb == Verb::ForceCancel
            || (verb == Verb::Cancel && matches!(state, JobState::Running | JobState::Created));
        if fatal && !self.rng.one_in(40) || verb == Verb::Pause && !self.rng.one_in(3) {
            return;
        }
        let answer = match verb {
            Verb::Cancel => self.core.cancel(),
            Verb::ForceCancel => self.core.force_cancel(),
            Verb::Pause => self.core.pause(),
            Verb::Resume => self.core.resume(),
            Verb::SetSpeed => {
                let speed = self.rng.pick(&[0, 100_000, 1_000_000]);
                self.core.set_speed(self.now, speed)
            }
            Verb::Change => {
                let mode = self.rng.pick(&[CopyMode::Background, CopyMode::WriteBlocking]);
                self.core.change(mode)
            }
            Verb::Complete => self.core.complete(),
            Verb::Finalize => self.core.finalize(),
            Verb::Dismiss => self.core.dismiss(),
        };
        // What an error has stopped can be resumed wherever it was.
        let allowed = state.allows(verb) || (verb == Verb::Resume && state == JobState::Pending && stopped);
        let ending = matches!(answer, Err(Refused::State { state: JobState::Waiting, .. }));
        assert_eq!(
            matches!(answer, Err(Refused::State { .. })),
            !allowed || ending,
            "{state} {verb}: {answer:?}"
        );
    }

    /// Where source and target may differ because of writes under way.
    fn differences_outside(&self, excused: &[ByteRange]) -> Option<usize> {
        let (mut source, mut target) =
            (self.setup.source.contents().unwrap(), self.setup.target.contents().unwrap());
        for range in excused {
            let range = range.start() as usize..range.end() as usize;
            source[range.clone()].fill(0);
            target[range].fill(0);
        }
        source.iter().zip(&target).position(|(a, b)| a != b)
    }

    fn under_way(&self) -> Vec<ByteRange> {
        let begun = self.writes.iter().filter(|write| write.admission != Admission::Wait);
        begun.map(|write| write.range).chain(self.strangers.iter().copied()).collect()
    }

    fn end(&mut self, ending: Ending) {
        self.ended = Some(ending);
        let mut excused = self.under_way();
        if ending == Ending::Fail {
            excused.extend(self.core.missing());
            // Nobody flushes for a job that has failed.
            for range in std::mem::take(&mut self.unflushed) {
                let junk = self.rng.bytes(range.len());
                self.setup.target.write_at(&junk, range.start(), WriteFlags::NONE).unwrap();
            }
        } else {
            assert!(excused.is_empty(), "the end while the guest writes");
            assert!(self.unflushed.is_empty(), "the end without a flush");
        }
        assert_eq!(self.differences_outside(&excused), None, "first difference at the end: {ending:?}");
    }

    fn look(&mut self) {
        let progress = self.core.progress(self.now);
        assert!(progress.offset >= self.offset, "the offset goes back");
        self.offset = progress.offset;
        for event in self.core.take_events() {
            match event {
                Event::Status(next) => {
                    assert!(self.state.is_none_or(|state| state.may_become(next)), "{:?} {next}", self.state);
                    self.state = Some(next);
                }
                Event::Ready => {
                    self.readies += 1;
                    assert_eq!((self.readies, progress.offset), (1, progress.len));
                    assert!(self.unflushed.is_empty() || self.setup.config.copy_mode != CopyMode::Background);
                    assert_eq!(self.differences_outside(&self.under_way()), None, "at ready");
                }
                _ => {}
            }
        }
    }
}

fn range_of(work: Work) -> ByteRange {
    match work {
        Work::Copy { range, .. } | Work::Zero { range, .. } => range,
        Work::Survey { .. } | Work::Flush | Work::End(_) => ByteRange::default(),
    }
}

/// Plays one schedule; how the job ended.
fn play(seed: u64) -> (Result<(), Error>, Option<Ending>, u64) {
    let mut rng = Rng(seed ^ 0x5eed);
    let mut setup = setup(&mut rng);
    setup.config.live = true;
    setup.config.auto_finalize = rng.one_in(2);
    setup.config.auto_dismiss = rng.one_in(2);
    setup.config.copy_mode = rng.pick(&[CopyMode::Background, CopyMode::WriteBlocking]);
    let mut seed_map = None;
    if setup.options.sync == SyncMode::Full && !setup.options.target_is_zero && rng.one_in(3) {
        setup.config.sync = SyncMode::Bitmap;
        setup.config.cut_bitmap = rng.one_in(2);
        let contents = setup.source.contents().unwrap();
        setup.target.write_at(&contents, 0, WriteFlags::NONE).unwrap();
        let mut map = DirtyBitmap::new(setup.config.len, 512 << rng.below(8)).unwrap();
        for _ in 0..rng.below(5) {
            let range = write_randomly(&mut rng, &setup.target);
            map.set(range.start()..range.end());
        }
        seed_map = Some(map);
    }
    let mut core = Core::new(setup.config.clone()).unwrap();
    if let Some(map) = &seed_map {
        core.seed(map);
    }
    let strangers: Vec<_> = if setup.config.len > 0 && rng.one_in(4) {
        (0..3).map(|_| rng.range(setup.config.len, 5000)).collect()
    } else {
        Vec::new()
    };
    core.expect_strangers(strangers.len());
    let failures = setup.failures * 4;
    let mut sim = Sim {
        rng,
        setup: &setup,
        core,
        now: Duration::ZERO,
        running: Vec::new(),
        writes: Vec::new(),
        strangers,
        unflushed: Vec::new(),
        failures,
        closing: false,
        state: None,
        readies: 0,
        offset: 0,
        ended: None,
    };
    let result = sim.run();
    assert_eq!(result.is_ok(), matches!(sim.ended, Some(Ending::Pivot | Ending::Keep)));
    let mirrored = sim.core.progress(sim.now).mirrored;
    (result, sim.ended, mirrored)
}

#[test]
fn ten_thousand_live_schedules_lose_no_write() {
    let (mut pivots, mut copies, mut cancelled, mut failed, mut cut, mut mirrored) = (0, 0, 0, 0, 0, 0);
    for seed in 0..10_000 {
        let Ok((result, ended, bytes)) = std::panic::catch_unwind(|| play(seed)) else {
            panic!("seed {seed}")
        };
        mirrored += u64::from(bytes > 0);
        match (result, ended) {
            (Ok(()), Some(Ending::Pivot)) => pivots += 1,
            (Ok(()), _) => copies += 1,
            (Err(Error::Cancelled), _) => cancelled += 1,
            (Err(_), _) => failed += 1,
        }
        cut += u32::from(ended == Some(Ending::Fail));
    }
    // Every end must really have been reached, or the schedules prove nothing.
    let all = (pivots, copies, cancelled, failed, cut, mirrored);
    assert!(pivots > 1000 && copies > 1000 && cancelled > 300 && failed > 100, "{all:?}");
    assert!(cut > 50 && mirrored > 1000, "{all:?}");
}
