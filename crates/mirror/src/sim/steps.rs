//! The steps of a schedule as data: a trace shows them, and a hash over them says whether two versions of the
//! core decide alike.
//!
//! A step is hashed as numbers that are spelled out here: time, operation, range, result, event. Names of
//! types, debug text and messages are no part of it, so renames and new words keep the hash of a seed.

use std::fmt;
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};

use crate::group::GroupEvent;
use crate::machine::{Admission, Done, Ending, Next, Work};
use crate::options::CopyMode;
use crate::progress::{Convergence, ErrorAction, Event, IoStatus, ModeReason, Operation, Progress};
use crate::scan::{CopyAction, CopyExtent, Failure};
use crate::state::{JobState, Refused, Verb};

/// For a kind that the crate `job` may get and this crate does not emit.
const UNKNOWN: u64 = u64::MAX;

/// A hash over words, in order (the multiplier is that of splitmix64).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StepHash(u64);

impl StepHash {
    pub(super) fn value(self) -> u64 {
        self.0
    }

    fn add(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        self.0 = mixed ^ (mixed >> 29);
    }

    fn all(&mut self, words: &[u64]) {
        words.iter().for_each(|word| self.add(*word));
    }

    fn range(&mut self, range: ByteRange) {
        self.all(&[range.start(), range.end()]);
    }

    fn time(&mut self, time: Duration) {
        self.all(&[time.as_secs(), u64::from(time.subsec_nanos())]);
    }

    fn optional_time(&mut self, time: Option<Duration>) {
        self.add(u64::from(time.is_some()));
        self.time(time.unwrap_or_default());
    }

    /// A step of the party `member` at `now`.
    pub(super) fn step(&mut self, now: Duration, member: usize, step: &Step<'_>) {
        self.time(now);
        self.add(member as u64);
        match *step {
            Step::Asked(Next::Do(action)) => {
                self.all(&[1, action.id]);
                self.work(action.work);
            }
            Step::Asked(Next::Wait(until)) => {
                self.add(2);
                self.optional_time(*until);
            }
            Step::Asked(Next::Finished) => self.add(3),
            Step::HasRead { id, range } => {
                self.all(&[4, id]);
                self.range(range);
            }
            Step::Performed { id, work, result } => {
                self.all(&[5, id]);
                self.work(work);
                self.result(result);
            }
            Step::JobDisks { id, ending } => self.all(&[6, id, ending_code(ending)]),
            Step::WritesSource(range) => {
                self.add(7);
                self.range(range);
            }
            Step::Marks(range) => {
                self.add(8);
                self.range(range);
            }
            Step::OldWriteEnds(range) => {
                self.add(9);
                self.range(range);
            }
            Step::GuestBegins { ticket, range } => {
                self.all(&[10, ticket]);
                self.range(range);
            }
            Step::GuestAsks { ticket, answer } => self.all(&[11, ticket, admission_code(answer)]),
            Step::GuestAtSource { ticket, fails } => self.all(&[12, ticket, u64::from(fails)]),
            Step::GuestAtTarget { ticket, result } => {
                let code = match result {
                    None => 0,
                    Some(None) => 1,
                    Some(Some(Ok(()))) => 2,
                    Some(Some(Err(error))) => 3 + error_code(error),
                };
                self.all(&[13, ticket, code]);
            }
            Step::GuestEnds { ticket } => self.all(&[14, ticket]),
            Step::Overdue => self.add(15),
            Step::Asks { verb, answer } => self.all(&[16, verb_code(verb), answer_code(answer)]),
            Step::Emitted(event) => self.event(event),
            Step::GroupEmitted(event) => self.group_event(event),
            Step::Shows(progress) => self.progress(progress),
            Step::Closes => self.add(20),
        }
    }

    fn work(&mut self, work: Work) {
        match work {
            Work::Scan { range, first_pass, untouched, by_block } => {
                self.all(&[1, u64::from(first_pass), u64::from(untouched), u64::from(by_block)]);
                self.range(range);
            }
            Work::Copy { range, target_zero, by_block } => {
                self.all(&[2, u64::from(target_zero), u64::from(by_block)]);
                self.range(range);
            }
            Work::Zero { range, metadata_only } => {
                self.all(&[3, u64::from(metadata_only)]);
                self.range(range);
            }
            Work::Clone { range, target_zero } => {
                self.all(&[7, u64::from(target_zero)]);
                self.range(range);
            }
            Work::Flush => self.add(4),
            Work::PeriodicFlush => self.add(5),
            Work::End(ending) => self.all(&[6, ending_code(ending)]),
        }
    }

    fn extents(&mut self, extents: &[CopyExtent]) {
        self.add(extents.len() as u64);
        for extent in extents {
            let action = match extent.action {
                CopyAction::Skip => 0,
                CopyAction::Zero => 1,
                CopyAction::Copy { target_zero } => 2 + u64::from(target_zero),
                CopyAction::Clone { target_zero } => 4 + u64::from(target_zero),
            };
            self.all(&[action, u64::from(extent.below)]);
            self.range(extent.range);
        }
    }

    fn result(&mut self, result: &Result<Done, Failure>) {
        match result {
            Ok(Done::Scanned(extents)) => {
                self.add(1);
                self.extents(extents);
            }
            Ok(Done::ScannedInPart(extents, unmapped)) => {
                self.add(10);
                self.extents(extents);
                unmapped.iter().for_each(|(range, _)| self.range(*range));
            }
            Ok(Done::Copied(moved)) => self.all(&[2, moved.copied, moved.zeroed, moved.skipped]),
            Ok(Done::Salvaged(moved, lost)) => {
                self.all(&[3, moved.copied, moved.zeroed, moved.skipped]);
                lost.iter().for_each(|(range, _)| self.range(*range));
            }
            Ok(Done::Cloned(cloned)) => {
                self.all(&[9, cloned.end]);
                cloned.rest.iter().for_each(|range| self.range(*range));
            }
            Ok(Done::Zeroed) => self.add(4),
            Ok(Done::ZeroUnsupported) => self.add(5),
            Ok(Done::Flushed) => self.add(6),
            Ok(Done::Ended) => self.add(7),
            Ok(Done::StillRead) => self.add(12),
            Ok(Done::LogNotEnded(error)) => self.all(&[11, error_code(error)]),
            Err(failure) => self.all(&[8, failure.operation as u64, error_code(&failure.error)]),
        }
    }

    fn event(&mut self, event: &Event) {
        self.add(17);
        match event {
            Event::Error { operation, action, range, .. } => {
                let action = match action {
                    ErrorAction::Report => 0,
                    ErrorAction::Ignore => 1,
                    ErrorAction::Stop => 2,
                    ErrorAction::GiveUp => 3,
                    _ => UNKNOWN,
                };
                self.all(&[1, *operation as u64, action]);
                self.range(*range);
            }
            Event::CopyMode { mode, reason } => {
                self.all(&[2, mode_code(*mode)]);
                match reason {
                    ModeReason::NotConverging { left, dirty_rate, copy_rate } => {
                        self.all(&[1, *left, *dirty_rate, *copy_rate]);
                    }
                    ModeReason::TargetStalls { delay, bound } => {
                        self.add(2);
                        self.time(*delay);
                        self.time(*bound);
                    }
                    _ => self.add(UNKNOWN),
                }
            }
            Event::Status(state) => self.all(&[3, state_code(*state)]),
            Event::Ready => self.add(4),
            Event::Pending => self.add(5),
            Event::Completed { error } => self.all(&[6, u64::from(error.is_some())]),
            Event::Cancelled => self.add(7),
            _ => self.add(UNKNOWN),
        }
    }

    fn group_event(&mut self, event: &GroupEvent) {
        self.add(18);
        match event {
            GroupEvent::Ready => self.add(1),
            GroupEvent::Pending => self.add(2),
            GroupEvent::Completed => self.add(3),
            GroupEvent::Failed { member, .. } => self.all(&[4, *member as u64]),
            GroupEvent::Cancelled => self.add(5),
        }
    }

    fn progress(&mut self, p: &Progress) {
        let io_status = match p.io_status {
            IoStatus::Ok => 0,
            IoStatus::Failed => 1,
            IoStatus::NoSpace => 2,
            _ => UNKNOWN,
        };
        let convergence = match p.convergence {
            Convergence::Unknown => 0,
            Convergence::Equal => 1,
            Convergence::Converging => 2,
            Convergence::NotConverging => 3,
        };
        self.all(&[19, state_code(p.state), io_status, p.offset, p.len, p.bulk_left, p.dirty_left]);
        self.all(&[p.dirtied, p.in_flight, p.copied, p.zeroed, p.skipped, p.given_up, p.mirrored]);
        self.all(&[u64::from(p.actively_synced), mode_code(p.copy_mode), u64::from(p.writes_through)]);
        self.all(&[p.copy_rate, p.dirty_rate, convergence]);
        self.optional_time(p.eta);
        self.optional_time(p.guest_delay);
    }
}

/// What one party of a schedule does, and what comes of it.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// A thread of the job asked for work.
    Asked(&'a Next),
    /// A copy has done its first half.
    HasRead { id: u64, range: ByteRange },
    /// An operation is reported to the core.
    Performed { id: u64, work: Work, result: &'a Result<Done, Failure> },
    /// The last step of a job is performed.
    JobDisks { id: u64, ending: Ending },
    /// A guest without a tap writes to the source.
    WritesSource(ByteRange),
    /// The same guest marks what it has written.
    Marks(ByteRange),
    /// A write ends that began before the job.
    OldWriteEnds(ByteRange),
    /// A guest write asks for admission.
    GuestBegins { ticket: u64, range: ByteRange },
    /// The core's answer.
    GuestAsks { ticket: u64, answer: Admission },
    /// A guest write has reached the source, or failed there.
    GuestAtSource { ticket: u64, fails: bool },
    /// A guest write has reached the target, or failed there, or is left to the job.
    GuestAtTarget { ticket: u64, result: &'a Option<Option<block::Result<()>>> },
    /// A guest write has finished.
    GuestEnds { ticket: u64 },
    /// A guest write has waited too long: the guest is resumed.
    Overdue,
    /// The operator asks for something.
    Asks { verb: Verb, answer: Result<(), Refused> },
    /// The job emits an event.
    Emitted(&'a Event),
    /// The group emits an event.
    GroupEmitted(&'a GroupEvent),
    /// The figures after a step.
    Shows(&'a Progress),
    /// The guest stops, nothing fails any more, and the operator only wants the end.
    Closes,
}

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked(Next::Do(action)) => write!(f, "#{} begins: {:?}", action.id, action.work),
            Self::Asked(next) => write!(f, "a worker asks: {next:?}"),
            Self::HasRead { id, range } => write!(f, "#{id} has read {range}"),
            Self::Performed { id, work, result } => match result {
                Ok(Done::Scanned(extents)) => write!(f, "#{id} {work:?}: {} extents", extents.len()),
                Ok(done) => write!(f, "#{id} {work:?}: {done:?}"),
                Err(failure) => write!(f, "#{id} {work:?}: {}: {}", failure.operation, failure.error),
            },
            Self::JobDisks { id, ending } => write!(f, "#{id} the end: {ending:?}"),
            Self::WritesSource(range) => write!(f, "the guest writes {range}"),
            Self::Marks(range) => write!(f, "the guest marks {range}"),
            Self::OldWriteEnds(range) => write!(f, "an old write ends: {range}"),
            Self::GuestBegins { ticket, range } => write!(f, "guest write {ticket} asks for {range}"),
            Self::GuestAsks { ticket, answer } => write!(f, "guest write {ticket}: {answer:?}"),
            Self::GuestAtSource { ticket, fails } => {
                write!(f, "guest write {ticket} at the source, fails: {fails}")
            }
            Self::GuestAtTarget { ticket, result } => {
                write!(f, "guest write {ticket} at the target: {result:?}")
            }
            Self::GuestEnds { ticket } => write!(f, "guest write {ticket} has finished"),
            Self::Overdue => f.write_str("quiesced for too long: the guest is resumed"),
            Self::Asks { verb, answer } => write!(f, "{verb}: {answer:?}"),
            Self::Emitted(event) => write!(f, "event {event:?}"),
            Self::GroupEmitted(event) => write!(f, "group event {event:?}"),
            Self::Shows(progress) => write!(f, "{progress:?}"),
            Self::Closes => f.write_str("the guest stops, the devices clear"),
        }
    }
}

fn ending_code(ending: Ending) -> u64 {
    match ending {
        Ending::Pivot => 1,
        Ending::Keep => 2,
        Ending::Fail => 3,
    }
}

fn admission_code(admission: Admission) -> u64 {
    match admission {
        Admission::Wait => 0,
        Admission::SourceOnly => 1,
        Admission::SourceAndTarget => 2,
        Admission::JobEnded => 3,
    }
}

fn mode_code(mode: CopyMode) -> u64 {
    match mode {
        CopyMode::Background => 0,
        CopyMode::WriteBlocking => 1,
        CopyMode::Auto => 2,
        _ => UNKNOWN,
    }
}

/// The kinds of error that simulated devices report.
fn error_code(error: &block::Error) -> u64 {
    match error.kind() {
        block::ErrorKind::Io => 1,
        block::ErrorKind::NoSpace => 2,
        block::ErrorKind::WritesLost => 3,
        _ => 4,
    }
}

fn state_code(state: JobState) -> u64 {
    place(&JobState::ALL, state)
}

fn verb_code(verb: Verb) -> u64 {
    place(&Verb::ALL, verb)
}

fn place<T: PartialEq>(all: &[T], one: T) -> u64 {
    all.iter().position(|other| *other == one).unwrap_or(all.len()) as u64
}

fn answer_code(answer: Result<(), Refused>) -> u64 {
    match answer {
        Ok(()) => 0,
        Err(Refused::State { verb, state }) => 1000 + 100 * verb_code(verb) + state_code(state),
        Err(Refused::Paused { verb }) => 2000 + verb_code(verb),
        Err(Refused::NotPaused) => 3000,
        Err(_) => UNKNOWN,
    }
}

/// The side of an operation is hashed as its number.
const _: () = assert!(Operation::Read as u64 == 0 && Operation::Write as u64 == 1);
