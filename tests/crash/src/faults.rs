//! The n-th request to a storage fails, for each n, in the middle of each operation.
//!
//! What must hold: the error is one of the storage's kinds; the image is poisoned, or can be written and
//! flushed at once; what is left, then and after a crash at any moment, opens with sound metadata and holds
//! old or new data, and goes on.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, OpKind};
use blockmirror_block::{ErrorKind, Storage};

use crate::files::ImageFiles;
use crate::op::{OPS, Op, opening};
use crate::played::Played;
use crate::recorder::{Point, Recorder};
use crate::session::{Session, StepError};
use crate::start::{Contents, Start};

/// What fails, with which error, how much of it is done all the same, and whether all that follow fail as
/// well, until the operation ends.
const PLANS: [(OpKind, ErrorKind, Done, bool); 10] = [
    (OpKind::Any, ErrorKind::Io, Done::Nothing, false),
    (OpKind::Any, ErrorKind::Io, Done::Nothing, true),
    (OpKind::Any, ErrorKind::Io, Done::Everything, false),
    (OpKind::Write, ErrorKind::Io, Done::Everything, false),
    (OpKind::Write, ErrorKind::Io, Done::Half, true),
    (OpKind::Write, ErrorKind::NoSpace, Done::Nothing, false),
    (OpKind::Write, ErrorKind::NoSpace, Done::Nothing, true),
    (OpKind::Write, ErrorKind::NoSpace, Done::Half, false),
    (OpKind::Flush, ErrorKind::NoSpace, Done::Nothing, false),
    (OpKind::Flush, ErrorKind::Io, Done::Nothing, true),
];
/// An operation on an image, one of whose requests fails.
#[derive(Clone, Copy, Debug)]
pub struct FaultyOp {
    start: Start,
    /// What is done before, so that there is something to write back.
    before: Option<Op>,
    op: Op,
}

impl fmt::Display for FaultyOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?} after {:?}", self.start, self.op, self.before)
    }
}

/// What came of failures.
#[derive(Debug, Default)]
pub struct FaultTally {
    /// Operations with one failure each, or one and all that follow.
    pub runs: u64,
    /// Those that ended with an error.
    pub failed: u64,
    /// Those that poisoned the image.
    pub poisoned: u64,
    /// Crash points looked at.
    pub points: u64,
    /// What must not happen.
    pub violations: Vec<String>,
}

impl fmt::Display for FaultTally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { runs, failed, poisoned, points, violations } = self;
        write!(
            f,
            "{runs} operations with a failure, of which {failed} failed and {poisoned} poisoned the image; {points} \
             crash points; {} violations",
            violations.len()
        )
    }
}

impl FaultyOp {
    /// Every operation on every start, by itself and after a write that was not flushed; those of bitmaps
    /// where there are some.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for start in Start::all() {
            let does_something = |op: &Op| start.contents == Contents::Bitmaps || !op.needs_bitmap();
            for op in OPS.into_iter().filter(|op| op.applies_to(start)).filter(does_something) {
                all.push(Self { start, before: None, op });
                all.push(Self { start, before: Some(Op::WriteAcross), op });
            }
        }
        all
    }

    /// `op` on `start`, after `before` that was not flushed.
    pub fn new(start: Start, before: Option<Op>, op: Op) -> Self {
        Self { start, before, op }
    }

    /// Fails each request in turn, and looks at one of so many crash points.
    pub fn fail_each(&self, one_in: u64, tally: &mut FaultTally) {
        for (kind, error, done, forever) in PLANS {
            for n in 0.. {
                let fault = Fault::on(kind).after(n).with(error).having_done(done);
                let fault = if forever { fault.forever() } else { fault };
                match self.run(kind, fault, one_in, tally) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(why) => {
                        let how = if forever { "and all that follow fail" } else { "fails" };
                        tally
                            .violations
                            .push(format!("{self}: {kind:?} {n} {how}, {error:?} {done:?}: {why}"));
                        break;
                    }
                }
            }
        }
    }

    /// Whether the failure was reached. After one of a write, which leaves flushes possible, the image is
    /// opened anew in the same process if it is poisoned.
    fn run(&self, kind: OpKind, fault: Fault, one_in: u64, tally: &mut FaultTally) -> Result<bool, String> {
        let recorder = Recorder::new(&self.start.make().map_err(|e| format!("create: {e}"))?);
        let faults = Faults::new();
        let sound = recorder.storages();
        let clock = || recorder.now();
        let heal = || faults.heal();
        let mut session =
            Session::new(self.start, faulty(&sound, &faults), &clock).map_err(|e| format!("open: {e}"))?;
        for op in opening(self.start).into_iter().chain(self.before) {
            session.step(op).map_err(|error| format!("{op:?} without a failure: {error:?}"))?;
        }
        faults.inject(fault);
        session.answered = Some(&heal);
        let result = session.step(self.op);
        let reached = faults.failed() > 0;
        tally.runs += u64::from(reached);
        match result {
            Ok(()) => {}
            Err(StepError::Wrong(why)) => return Err(why),
            Err(StepError::Failed(error)) => {
                tally.failed += 1;
                if !matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::Poisoned) {
                    return Err(format!("an error of kind {:?}: {error}", error.kind()));
                }
            }
        }
        if session.is_poisoned() {
            tally.poisoned += 1;
        }
        if session.is_poisoned() && kind == OpKind::Write {
            session.reopen().map_err(|error| format!("opened anew: {error:?}"))?;
        }
        self.go_on(&mut session, &sound)?;
        look_at(&Played::new(self.start, Arc::clone(&recorder), session.history()), one_in, tally)?;
        Ok(reached)
    }

    /// What follows must succeed, in an image that was opened again if it is poisoned, and repaired again if
    /// the repair failed.
    fn go_on(&self, session: &mut Session<'_>, sound: &ImageFiles) -> Result<(), String> {
        let text = |op: Op, session: &mut Session<'_>| {
            session.step(op).map_err(|error| format!("{op:?} after the failure: {error:?}"))
        };
        // What fails at the end of a close has no answer, and its storage flushes no more.
        if session.is_poisoned() || !session.is_open() || self.op.closes() {
            session.restart(sound.clone()).map_err(|error| format!("opened again: {error:?}"))?;
            if self.op == Op::Repair {
                text(Op::Repair, session)?;
            }
        }
        text(Op::WriteCluster, session)?;
        text(Op::Flush, session)
    }
}

fn faulty(sound: &ImageFiles, faults: &Faults) -> ImageFiles {
    sound.map(|inner| Arc::new(FaultStorage::new(Arc::clone(inner), faults.clone())) as Arc<dyn Storage>)
}

fn look_at(played: &Played, one_in: u64, tally: &mut FaultTally) -> Result<(), String> {
    let mut seen = tally.runs;
    played.visit_points(&mut |point: Point<'_>| {
        seen += 1;
        if !seen.is_multiple_of(one_in) {
            return Ok(());
        }
        tally.points += 1;
        played.verify(point).map(drop).map_err(|why| format!("{why}; {}", point.describe()))
    })
}
