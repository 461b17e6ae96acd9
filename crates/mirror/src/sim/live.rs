//! Jobs on a tap: guests that write in both modes, an operator who asks for anything at any time.
//!
//! Each write of the guest goes through its steps in random order, among operations of the
//! job that do the same. What must hold: when the end is performed no write is under way, and the target is
//! equal to the source and durable, so that every acknowledged write is in whatever survives; READY is
//! emitted only when nothing but writes under way differs; nothing touches the target after the end; a bitmap
//! that says what to copy covers, at any end, all that the target does not have; verbs are refused exactly
//! where the table says ([`operator`]); where the disks would differ after a crash, a log has the region
//! marked ([`log`]).

mod log;
mod operator;
mod reads;

use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::ByteRange;
use blockmirror_block::testing::Rng;

use self::log::SimLog;
use super::environment::{Environment, MODES, contents, write_randomly};
use super::guest::{Sleep, Workload, Write, wake_callers};
use super::steps::Step;
use super::workers::{Workers, moved_by, write};
use super::{End, Trace};
use crate::error::Error;
use crate::machine::{Admission, Core, Ending, Next};
use crate::options::{BitmapMode, SyncMode};
use crate::progress::{ErrorAction, Event, IoStatus, Operation};
use crate::state::{JobState, Verb};

/// Steps after which the guest begin_one_in, nothing fails any more, and the operator only wants the end.
const STEPS: u32 = 1500;
/// Steps after which a schedule is taken to hang.
const MAX_STEPS: u32 = 400_000;

/// What a schedule is made of.
pub(super) struct ScenarioParams {
    pub(super) environment: Environment,
    pub(super) workload: Workload,
    /// What the operator may ask for before the end.
    pub(super) verbs: &'static [Verb],
    /// One in so many of those that would end the job is asked; 0 for none.
    pub(super) fatal: u64,
    /// Writes under way that began before the job.
    pub(super) pre_attach_writes: Vec<ByteRange>,
    /// The bitmap that says what to copy.
    pub(super) bitmap: Option<(DirtyBitmap, BitmapMode)>,
    /// Steps before the operator wants the end.
    pub(super) steps: u32,
    /// The log that the job has: bytes of a region, and the most active regions.
    pub(super) log: Option<(u64, usize)>,
}

impl ScenarioParams {
    pub(super) fn random(rng: &mut Rng) -> Self {
        let mut environment = Environment::random(rng);
        environment.config.live = true;
        environment.config.auto_finalize = rng.one_in(2);
        environment.config.auto_dismiss = rng.one_in(2);
        environment.config.copy_mode = rng.pick(&MODES);
        // More is going on than in a copy.
        environment.faults.one_in *= 4;
        if environment.len() > 0 && rng.one_in(10) {
            let side = rng.index(2);
            environment.faults.bad[side] = rng.byte_range(ByteRange::new(0, environment.len()), 1000);
        }
        environment.faults.fills = rng.pick(&[0, 0, 0, 500]);
        let pre_attach_writes = if environment.len() > 0 && rng.one_in(4) {
            (0..3).map(|_| rng.byte_range(ByteRange::new(0, environment.len()), 5000)).collect()
        } else {
            Vec::new()
        };
        let mut params = Self {
            environment,
            workload: Workload::random(),
            verbs: &Verb::ALL,
            fatal: 40,
            pre_attach_writes,
            bitmap: None,
            steps: STEPS,
            log: None,
        };
        if params.environment.options.sync == SyncMode::Full
            && !params.environment.options.target_is_zero
            && rng.one_in(3)
        {
            params.copy_part(rng);
        }
        params
    }

    /// The target has everything already but what a bitmap says, or nothing is asked for but what is written
    /// from now on.
    fn copy_part(&mut self, rng: &mut Rng) {
        let environment = &mut self.environment;
        write(
            &*environment.target,
            &contents(&environment.source),
            ByteRange::new(0, environment.config.len),
        );
        if rng.one_in(4) {
            environment.config.sync = SyncMode::None;
            return;
        }
        let mode = rng.pick(&[BitmapMode::Never, BitmapMode::OnSuccess, BitmapMode::Always]);
        environment.config.sync = SyncMode::Bitmap;
        environment.config.cut_bitmap = mode == BitmapMode::Always;
        let mut map = DirtyBitmap::new(environment.config.len, 512 << rng.below(8)).unwrap();
        for _ in 0..rng.below(5) {
            let range = write_randomly(rng, &environment.target);
            map.set(range.start()..range.end());
        }
        self.bitmap = Some((map, mode));
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed ^ 0x5eed);
    let params = ScenarioParams::random(&mut rng);
    run_params(rng, &params, trace)
}

/// Runs `params`.
pub(super) fn run_params(mut rng: Rng, params: &ScenarioParams, trace: &mut Trace) -> End {
    let environment = &params.environment;
    trace.say(Duration::ZERO, || {
        format!("{:?}, {:?}, {:?}", environment.config, environment.latency, environment.faults)
    });
    let mut core = Core::new(environment.config.clone()).unwrap();
    if let Some((map, _)) = &params.bitmap {
        core.seed(map);
    }
    core.expect_pre_attach_writes(params.pre_attach_writes.len());
    let wish = rng.pick(&[Ending::Pivot, Ending::Keep]);
    let mut sim = Sim {
        rng,
        params,
        environment,
        core,
        workers: Workers::new(environment, params.bitmap.is_some() || params.log.is_some()),
        now: Duration::ZERO,
        writes: Vec::new(),
        leaked: Vec::new(),
        copy_ups: 0,
        pre_attach_writes: params.pre_attach_writes.clone(),
        bitmap: params.bitmap.clone(),
        closing: false,
        wish,
        state: None,
        readies: 0,
        offset: 0,
        standing: None,
        reported: false,
        ended: None,
        still_read: None,
        kept: None,
        log: params.log.map(|bounds| SimLog::new(environment.len(), bounds)),
        trace,
    };
    sim.run();
    sim.check_end()
}

struct Sim<'w> {
    rng: Rng,
    params: &'w ScenarioParams,
    environment: &'w Environment,
    core: Core,
    workers: Workers<'w>,
    now: Duration,
    writes: Vec<Write>,
    /// Writes that never end, with what they were admitted to.
    leaked: Vec<(ByteRange, Admission)>,
    /// Copies into the source under way.
    copy_ups: u32,
    pre_attach_writes: Vec<ByteRange>,
    /// The tap's, which goes on collecting.
    bitmap: Option<(DirtyBitmap, BitmapMode)>,
    /// The guest begin_one_in and the operator only wants the end.
    closing: bool,
    /// Which end.
    wish: Ending,
    state: Option<JobState>,
    readies: u32,
    offset: u64,
    /// The offset at which a paused job stands.
    standing: Option<u64>,
    /// An error was reported that ends the job.
    reported: bool,
    ended: Option<Ending>,
    /// The pivot, while reads are under way at the old disk.
    still_read: Option<u64>,
    /// What the target held when it was left behind.
    kept: Option<Vec<u8>>,
    /// Until the job ends.
    log: Option<SimLog>,
    trace: &'w mut Trace,
}

impl Sim<'_> {
    fn run(&mut self) {
        for step in 0..MAX_STEPS {
            if step == self.params.steps {
                self.trace.step(self.now, Step::Closes);
                self.closing = true;
                self.workers.faults.clear();
            }
            self.core.on_timer(self.now);
            match self.rng.below(16) {
                0..4 => {
                    if self.ask() && self.writes.is_empty() && self.pre_attach_writes.is_empty() {
                        break;
                    }
                }
                4..9 => self.perform_half(),
                9..14 => self.guest(),
                14 => self.operator(),
                _ => self.now += Duration::from_micros(self.rng.below(30_000)),
            }
            self.check_step();
        }
        assert!(self.core.is_concluded(), "hangs: {:?}", self.core.progress(self.now));
        assert!(self.writes.is_empty(), "never admitted: {:?}", self.writes);
    }

    fn ask(&mut self) -> bool {
        let next = self.core.next(self.now);
        self.trace.step(self.now, Step::Asked(&next));
        match next {
            Next::Finished => return true,
            Next::Do(action) => {
                let moved = moved_by(action.work);
                let guest = |write: &Write| {
                    write.admission == Admission::SourceAndTarget && write.range.overlaps(moved)
                };
                assert!(!self.writes.iter().any(guest), "{:?} under a write of the guest", action.work);
                if let Some(log) = self.log.as_mut().filter(|_| action.work.is_flush()) {
                    log.flush_begins(action.id, self.core.not_copied());
                }
                self.workers.take(&mut self.rng, self.now, action);
            }
            Next::Wait(Some(until)) if self.workers.are_empty() => {
                assert!(until > self.now, "waiting for the past spins");
                self.now = until;
            }
            Next::Wait(_) => {}
        }
        false
    }

    fn perform_half(&mut self) {
        let Some(index) = self.workers.pick(&mut self.rng, self.now) else {
            if let Some(next) = self.workers.next_time(self.now) {
                self.now = next;
            }
            return;
        };
        let end = self.workers.perform_half(&mut self.core, &mut self.rng, self.now, index, self.trace);
        if let Some((id, log)) = self.workers.flushed.take().zip(self.log.as_mut()) {
            log.flush_succeeded(id);
        }
        if let Some((id, ending)) = end {
            // It ends before the job does.
            self.log = None;
            self.trace.step(self.now, Step::JobDisks { id, ending });
            assert!(self.workers.are_empty(), "the end while something is in flight");
            self.perform_end(id, ending);
        }
    }

    fn guest(&mut self) {
        if self.reads_end() {
            return;
        }
        let len = self.environment.len();
        if !self.pre_attach_writes.is_empty() && self.rng.one_in(20) {
            let range = self.pre_attach_writes.swap_remove(0);
            let bytes = self.rng.nonzero_bytes(range.len());
            self.trace.step(self.now, Step::OldWriteEnds(range));
            write(&*self.environment.source, &bytes, range);
            self.wrote(range);
            return self.core.pre_attach_write_finished(range);
        }
        let workload = &self.params.workload;
        if workload.copy_up_one_in > 0 && self.rng.one_in(workload.copy_up_one_in) {
            return self.copy_up();
        }
        if self.writes.len() < workload.writers
            && len > 0
            && !self.closing
            && self.rng.one_in(workload.begin_one_in)
        {
            let mut write = Write::random(&mut self.rng, len, workload);
            write.logs = self.log.is_some();
            if !write.logs {
                self.begins(&mut write);
            }
            self.writes.push(write);
            return;
        }
        let now = self.now;
        wake_callers(&mut self.writes, &self.core, self.now);
        let is_due = |write: &Write| write.not_before <= now && write.asleep.is_none();
        let due: Vec<usize> = (0..self.writes.len()).filter(|i| is_due(&self.writes[*i])).collect();
        if due.is_empty() {
            return;
        }
        let index = self.rng.pick(&due);
        let mut write = self.writes.swap_remove(index);
        if self.step(&mut write) {
            self.writes.push(write);
        }
    }

    /// A write asks the job for admission from now on.
    fn begins(&mut self, write: &mut Write) {
        if !self.params.workload.tickets {
            write.ticket = self.core.on_guest_write(write.range);
        }
        self.trace.step(self.now, Step::GuestBegins { ticket: write.ticket, range: write.range });
    }

    /// One step of a write; whether more follow.
    fn step(&mut self, write: &mut Write) -> bool {
        if write.logs {
            self.enter_log(write);
            return true;
        }
        let workload = &self.params.workload;
        if write.admission != Admission::Wait
            && workload.leak_one_in > 0
            && self.rng.one_in(workload.leak_one_in)
        {
            self.leaked.push((write.range, write.admission));
            return false;
        }
        match (write.admission, write.source) {
            (Admission::Wait, _) => return self.ask_admission(write),
            (_, None) => {
                let fails = self.workers.faults.one_in > 0 && self.rng.one_in(10);
                write.put(&mut self.rng, &self.environment.source, fails);
                write.source = Some(!fails);
                self.trace.step(self.now, Step::GuestAtSource { ticket: write.ticket, fails });
                if write.admission == Admission::SourceAndTarget {
                    if self.core.guest_at_target(write.ticket, workload.writer()) {
                        let takes = self.environment.latency.takes(&mut self.rng, Operation::Write);
                        write.not_before = self.now + takes;
                    } else {
                        write.admission = Admission::SourceOnly;
                    }
                }
            }
            (Admission::SourceAndTarget, Some(true)) if write.target.is_none() => {
                let failure = self.workers.faults.inject(&mut self.rng, Operation::Write, write.range);
                write.put_at_target(
                    &mut self.rng,
                    &self.environment.source,
                    &self.environment.target,
                    failure,
                );
                self.workers.through.push(write.range);
                let (ticket, result) = (write.ticket, &write.target);
                self.trace.step(self.now, Step::GuestAtTarget { ticket, result });
            }
            (_, Some(ok)) => {
                self.trace.step(self.now, Step::GuestEnds { ticket: write.ticket });
                self.wrote(write.range);
                self.core.guest_finished(write.ticket, ok, write.target.take().flatten());
                self.leave_log(write.range);
                return false;
            }
        }
        true
    }

    /// A write asks for admission; whether more steps follow.
    fn ask_admission(&mut self, write: &mut Write) -> bool {
        if self.params.workload.tickets {
            self.resume_if_overdue();
            let within;
            (write.ticket, write.admission, within) = self.core.try_guest_write(write.range);
            if self.params.workload.sleeps && write.admission == Admission::Wait {
                write.asleep = Some(Sleep::new(&self.core, self.now, within));
            }
        } else {
            write.admission = self.core.guest_admit(write.ticket);
        }
        let answer = write.admission;
        self.trace.step(self.now, Step::GuestAsks { ticket: write.ticket, answer });
        if answer == Admission::SourceAndTarget {
            let other = |other: &Write| {
                other.admission == Admission::SourceAndTarget && other.range.overlaps(write.range)
            };
            assert!(!self.writes.iter().any(other), "two writes to {} at once", write.range);
            let works = self.workers.works().any(|work| moved_by(work).overlaps(write.range));
            assert!(!works, "a write to {} under an operation", write.range);
        }
        if answer == Admission::Wait {
            self.resume_if_overdue();
        }
        if answer == Admission::JobEnded {
            self.write_after_the_end(write);
            return false;
        }
        write.not_before = self.now + self.environment.latency.takes(&mut self.rng, Operation::Read);
        true
    }

    fn resume_if_overdue(&mut self) {
        if self.core.resume_if_overdue(self.now) {
            self.trace.step(self.now, Step::Overdue);
        }
    }

    /// The tap's bitmaps record a write that has finished.
    fn wrote(&mut self, range: ByteRange) {
        if let Some((map, _)) = &mut self.bitmap {
            map.set(range.start()..range.end());
        }
    }

    /// The job is over: the write goes to whatever survives.
    fn write_after_the_end(&mut self, write: &Write) {
        let survivor = if self.ended == Some(Ending::Pivot) {
            &self.environment.target
        } else {
            &self.environment.source
        };
        write.put(&mut self.rng, survivor, false);
        self.wrote(write.range);
    }

    fn under_way(&self) -> Vec<ByteRange> {
        let begun = self.writes.iter().filter(|write| write.admission != Admission::Wait);
        let begun = begun.map(|write| write.range).chain(self.pre_attach_writes.iter().copied());
        begun.chain(self.leaked.iter().map(|(range, _)| *range)).collect()
    }

    /// Leaked writes that no bitmap knows, because they were never reported: those at the source only, and
    /// the others too unless the job's end has cut the bitmap.
    fn unknown(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let is_cut = self.ended == Some(Ending::Fail);
        let unknown = move |leaked: &&(ByteRange, Admission)| leaked.1 == Admission::SourceOnly || !is_cut;
        self.leaked.iter().filter(unknown).map(|(range, _)| *range)
    }

    /// The last step, as the tap performs it.
    fn end(&mut self, ending: Ending) {
        self.ended = Some(ending);
        match ending {
            Ending::Fail => {
                let missing = self.core.missing();
                let open = self.writes.iter().filter(|write| write.admission != Admission::Wait);
                let open = open.map(|write| write.range).chain(self.pre_attach_writes.iter().copied());
                // A job that has failed is not flushed.
                self.workers.lose_unflushed(&mut self.rng);
                let excused = open.chain(self.unknown()).chain(missing.iter().copied());
                let excused: Vec<ByteRange> = excused.collect();
                assert_eq!(self.environment.difference(&excused), None, "first difference not in the bitmap");
                if let Some((map, _)) = &mut self.bitmap {
                    map.clear_all();
                    for range in missing {
                        map.set(range.start()..range.end());
                    }
                }
            }
            Ending::Pivot | Ending::Keep => {
                assert!(self.under_way().is_empty(), "the end while the guest writes");
                assert_eq!(self.copy_ups, 0, "the end while data is copied into the source");
                let workers = &self.workers;
                assert!(
                    workers.unflushed.is_empty() && workers.through.is_empty(),
                    "the end without a flush"
                );
                assert_eq!(self.environment.difference(&[]), None, "first difference at the end: {ending:?}");
                if let Some((map, mode)) = &mut self.bitmap
                    && *mode != BitmapMode::Never
                {
                    map.clear_all();
                }
                if ending == Ending::Keep {
                    self.kept = Some(contents(&self.environment.target));
                }
            }
        }
    }

    fn check_step(&mut self) {
        wake_callers(&mut self.writes, &self.core, self.now);
        let progress = self.core.progress(self.now);
        self.trace.step(self.now, Step::Shows(&progress));
        self.log_step();
        assert!(progress.offset >= self.offset, "the offset goes back");
        assert!(progress.len >= progress.offset);
        self.offset = progress.offset;
        let paused = matches!(progress.state, JobState::Paused | JobState::Standby);
        let stands = paused && self.workers.are_empty();
        if let Some(offset) = self.standing.filter(|_| stands) {
            assert_eq!(offset, progress.offset, "it moves while it is paused");
        }
        self.standing = stands.then_some(progress.offset);
        if progress.actively_synced && self.rng.one_in(8) && self.ended.is_none() {
            assert_eq!(self.environment.difference(&self.under_way()), None, "actively synced");
        }
        for event in self.core.take_events() {
            self.trace.step(self.now, Step::Emitted(&event));
            assert_ne!(self.state, Some(JobState::Null), "{event:?} after the last state");
            match event {
                Event::Status(next) => {
                    assert!(
                        self.state.is_none_or(|state| state.can_transition_to(next)),
                        "{:?} {next}",
                        self.state
                    );
                    self.state = Some(next);
                }
                Event::Ready => {
                    self.readies += 1;
                    assert_eq!((self.readies, progress.offset), (1, progress.len));
                    assert!(self.workers.unflushed.is_empty(), "ready without a flush");
                    assert_eq!(self.environment.difference(&self.under_way()), None, "at ready");
                }
                Event::Error { action, .. } => {
                    assert!(action != ErrorAction::GiveUp, "a job on a tap left something out");
                    assert!(action != ErrorAction::Stop || progress.io_status != IoStatus::Ok || !paused);
                    self.reported |= action == ErrorAction::Report;
                }
                _ => {}
            }
        }
    }

    fn check_end(&mut self) -> End {
        let result = self.core.take_result().unwrap();
        let by_the_book = matches!(self.ended, Some(Ending::Pivot | Ending::Keep));
        assert_eq!(result.is_ok(), by_the_book, "{result:?}, {:?}", self.ended);
        if let Some(kept) = &self.kept {
            assert!(*kept == contents(&self.environment.target), "the copy was touched after the end");
        }
        if self.ended != Some(Ending::Pivot)
            && let Some((map, _)) = &self.bitmap
        {
            self.workers.lose_unflushed(&mut self.rng);
            let covered = map.runs().map(|run| ByteRange::new(run.start, run.end));
            let covered: Vec<ByteRange> = covered.chain(self.unknown()).collect();
            assert_eq!(self.environment.difference(&covered), None, "first difference not in the bitmap");
        }
        match (result, self.ended) {
            (Ok(()), Some(Ending::Pivot)) => End::Pivoted,
            (Ok(()), _) => End::Kept,
            (Err(Error::Cancelled), _) => End::Cancelled,
            (Err(error), _) => {
                assert!(self.reported && self.workers.faults.injected != [0, 0], "{error}");
                End::Failed
            }
        }
    }
}
