//! When which operation fails: the plan that `fault_disk` and `fault_storage` follow.

use std::collections::HashMap;
use std::sync::Arc;

use super::gate::{Gate, Latch};
use crate::sync::Mutex;
use crate::{ByteRange, Error, ErrorKind, Result};

/// Kinds of operation that a fault can pick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// Any of the others.
    Any,
    /// `read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `clone_range`.
    Clone,
    /// `write_zeroes`.
    WriteZeroes,
    /// `discard`.
    Discard,
    /// `flush`.
    Flush,
    /// `extents`.
    Extents,
    /// `set_len`.
    SetLen,
    /// `allocate`.
    Allocate,
    /// `len` of a storage.
    Len,
}

impl OpKind {
    fn name(self) -> &'static str {
        match self {
            Self::Any => "operation",
            Self::Read => "read",
            Self::Write => "write",
            Self::Clone => "clone",
            Self::WriteZeroes => "write zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Extents => "extents",
            Self::SetLen => "set length",
            Self::Allocate => "allocate",
            Self::Len => "length",
        }
    }
}

/// How much of a failing operation happens all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing.
    Nothing,
    /// The first half of a write, in whole sectors; nothing of other operations.
    Half,
    /// Everything; only the answer is a failure.
    Everything,
}

/// One planned failure. Fails the first matching operation, once, with [`ErrorKind::Io`] by default.
#[derive(Clone, Debug)]
pub struct Fault {
    kind: OpKind,
    skip: u64,
    forever: bool,
    within: Option<ByteRange>,
    error: ErrorKind,
    refused: bool,
    done: Done,
}

impl Fault {
    /// Fails operations of `kind`.
    pub fn on(kind: OpKind) -> Self {
        Self {
            kind,
            skip: 0,
            forever: false,
            within: None,
            error: ErrorKind::Io,
            refused: false,
            done: Done::Nothing,
        }
    }

    /// Lets `n` matching operations pass first.
    #[must_use]
    pub fn after(mut self, n: u64) -> Self {
        self.skip = n;
        self
    }

    /// Fails every matching operation from then on.
    #[must_use]
    pub fn forever(mut self) -> Self {
        self.forever = true;
        self
    }

    /// Only operations that touch `range`.
    #[must_use]
    pub fn within(mut self, range: ByteRange) -> Self {
        self.within = Some(range);
        self
    }

    /// Fails with `kind`.
    #[must_use]
    pub fn with(mut self, kind: ErrorKind) -> Self {
        self.error = kind;
        self
    }

    /// The error says that the device has [refused](Error::was_refused) the operation.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.refused = true;
        self
    }

    /// Does so much of the operation before it fails.
    #[must_use]
    pub fn having_done(mut self, done: Done) -> Self {
        self.done = done;
        self
    }
}

/// A shared plan of failures and holds. Clones are the same plan; give one to the double and keep one.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Plan>>);

#[derive(Debug, Default)]
struct Plan {
    faults: Vec<Fault>,
    holds: Vec<Hold>,
    seen: HashMap<OpKind, usize>,
    failed: u64,
}

#[derive(Debug)]
struct Hold {
    kind: OpKind,
    within: Option<ByteRange>,
    latch: Arc<Latch>,
}

/// The answer to an operation that asks how it is to fare.
pub(crate) enum Verdict {
    Go,
    Fail(Error, Done),
}

impl Faults {
    /// A plan in which nothing fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a failure to the plan.
    pub fn inject(&self, fault: Fault) {
        self.0.lock().faults.push(fault);
    }

    /// Forgets all failures that are still planned.
    pub fn heal(&self) {
        self.0.lock().faults.clear();
    }

    /// Holds operations of `kind` that touch `within` (all of them if `None`) until the gate is opened. An
    /// operation that is held has not been done yet, and asks whether it fails when it goes on.
    pub fn hold(&self, kind: OpKind, within: Option<ByteRange>) -> Gate {
        let latch = Arc::new(Latch::default());
        self.0.lock().holds.push(Hold { kind, within, latch: Arc::clone(&latch) });
        Gate(latch)
    }

    /// Operations of `kind` so far, failed ones included. A test that fails each in turn goes on until the
    /// count is below its number.
    pub fn seen(&self, kind: OpKind) -> usize {
        self.0.lock().seen.iter().filter(|(seen, _)| matches(kind, **seen)).map(|(_, n)| n).sum()
    }

    /// Operations that were made to fail so far.
    pub fn failed(&self) -> u64 {
        self.0.lock().failed
    }

    /// Sends held operations away with [`ErrorKind::Cancelled`].
    pub(crate) fn cancel(&self) {
        for hold in &self.0.lock().holds {
            hold.latch.cancel();
        }
    }

    /// Asks how an operation is to fare; waits where it is held.
    pub(crate) fn judge(&self, kind: OpKind, range: Option<ByteRange>) -> Verdict {
        // Waiting happens outside of the lock.
        let latches: Vec<Arc<Latch>> = {
            let mut plan = self.0.lock();
            *plan.seen.entry(kind).or_default() += 1;
            let hits =
                plan.holds.iter().filter(|hold| matches(hold.kind, kind) && touches(hold.within, range));
            hits.map(|hold| Arc::clone(&hold.latch)).collect()
        };
        if !latches.iter().all(|latch| latch.pass()) {
            return Verdict::Fail(error(ErrorKind::Cancelled, kind, range), Done::Nothing);
        }
        let mut plan = self.0.lock();
        let mut verdict = Verdict::Go;
        let mut spent = None;
        for (i, fault) in plan.faults.iter_mut().enumerate() {
            if !matches(fault.kind, kind) || !touches(fault.within, range) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if matches!(verdict, Verdict::Go) {
                let error = error(fault.error, kind, range);
                let refused = fault.refused || error.was_refused();
                verdict = Verdict::Fail(error.refused(refused), fault.done);
                spent = (!fault.forever).then_some(i);
            }
        }
        if let Some(i) = spent {
            plan.faults.remove(i);
        }
        if matches!(verdict, Verdict::Fail(..)) {
            plan.failed += 1;
        }
        verdict
    }

    /// Does an operation, or a part of it, as the plan says. `half` is asked for where the operation can be
    /// done in part.
    pub(crate) fn run(
        &self,
        kind: OpKind,
        range: Option<ByteRange>,
        whole: impl FnOnce() -> Result<()>,
        half: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self.judge(kind, range) {
            Verdict::Go => whole(),
            Verdict::Fail(error, done) => {
                match done {
                    Done::Nothing => {}
                    Done::Half => half()?,
                    Done::Everything => whole()?,
                }
                Err(error)
            }
        }
    }
}

fn matches(pattern: OpKind, kind: OpKind) -> bool {
    pattern == OpKind::Any || pattern == kind
}

/// Operations without a range (a flush) touch everything.
fn touches(within: Option<ByteRange>, range: Option<ByteRange>) -> bool {
    match (within, range) {
        (Some(within), Some(range)) => within.overlaps(range),
        _ => true,
    }
}

fn error(kind: ErrorKind, op: OpKind, range: Option<ByteRange>) -> Error {
    let error = Error::new(kind, op.name()).because("injected fault");
    match range {
        Some(range) => error.at(range.start()),
        None => error,
    }
}

/// How much of a request at `offset` is its first half, in whole sectors of 512 bytes.
pub(crate) fn first_half(offset: u64, len: usize) -> usize {
    let end = offset.saturating_add(len as u64 / 2) / 512 * 512;
    end.saturating_sub(offset) as usize
}
