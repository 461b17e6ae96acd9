//! The workers of a job: operations in flight, each performed in halves, in random order.

use std::time::Duration;

use blockmirror_block::testing::Rng;
use blockmirror_block::{self as block, BlockDevice, ByteRange, ErrorKind, WriteFlags, ZeroFlags};

use super::Trace;
use super::environment::{Environment, Faults, contents};
use super::steps::Step;
use crate::machine::{Action, Core, Done, Ending, Work};
use crate::mover::{CopyPolicy, Mover};
use crate::progress::Operation;
use crate::scan::Failure;
use crate::scan::TargetContent;

/// An action under way. A copy that has read and not yet written is at its second half.
struct Running<'w> {
    action: Action,
    mover: Mover<'w>,
    has_read: bool,
    /// Its next half is not done before this.
    not_before: Duration,
}

pub(super) struct Workers<'w> {
    environment: &'w Environment,
    running: Vec<Running<'w>>,
    pub(super) faults: Faults,
    /// What the job has written to the target since its last good flush.
    pub(super) unflushed: Vec<ByteRange>,
    /// What the guest has.
    pub(super) through: Vec<ByteRange>,
    /// What the target held at its last good flush. A job that copies a part of the disk may write to the
    /// rest what is there already; losing that must leave what was there.
    pub(super) durable: Option<Vec<u8>>,
    /// The flush that has just succeeded, by the id of its action.
    pub(super) flushed: Option<u64>,
}

/// The bytes of the disk that an operation is about.
pub(super) fn range_of(work: Work) -> ByteRange {
    match work {
        Work::Scan { range, .. }
        | Work::Copy { range, .. }
        | Work::Clone { range, .. }
        | Work::Zero { range, .. } => range,
        Work::Flush | Work::PeriodicFlush | Work::End(_) => ByteRange::default(),
    }
}

/// The bytes that an operation moves or makes zero.
pub(super) fn moved_by(work: Work) -> ByteRange {
    if matches!(work, Work::Scan { .. }) { ByteRange::default() } else { range_of(work) }
}

fn is_flush(work: Work) -> bool {
    matches!(work, Work::Flush | Work::PeriodicFlush)
}

impl<'w> Workers<'w> {
    /// No worker is busy yet. `part`: the job copies a part of the disk, or may after a crash.
    pub(super) fn new(environment: &'w Environment, part: bool) -> Self {
        let durable = part.then(|| contents(&environment.target));
        Self {
            environment,
            running: Vec::new(),
            faults: environment.faults.clone(),
            unflushed: Vec::new(),
            through: Vec::new(),
            durable,
            flushed: None,
        }
    }

    pub(super) fn are_empty(&self) -> bool {
        self.running.is_empty()
    }

    pub(super) fn works(&self) -> impl Iterator<Item = Work> + '_ {
        self.running.iter().map(|op| op.action.work)
    }

    /// A thread was given `action`. It does not conflict with what is under way.
    pub(super) fn take(&mut self, rng: &mut Rng, now: Duration, action: Action) {
        let config = &self.environment.config;
        let range = range_of(action.work);
        if range.is_empty() && action.work != Work::PeriodicFlush {
            assert!(self.are_empty(), "{:?} while something is in flight", action.work);
        }
        assert!(range.end() <= config.len, "{:?} past the end of the disk", action.work);
        for other in self.works() {
            assert!(!range_of(other).overlaps(range), "{:?} and {other:?} in flight together", action.work);
        }
        let policy = CopyPolicy::new(
            &self.environment.options,
            self.environment.target.geometry(),
            TargetContent::Asked,
        );
        let mover = Mover::new(&*self.environment.source, &*self.environment.target, None, policy);
        let side = if matches!(action.work, Work::Copy { .. }) { Operation::Read } else { Operation::Write };
        let not_before = now + self.environment.latency.takes(rng, side);
        self.running.push(Running { action, mover, has_read: false, not_before });
        assert!(self.running.len() <= config.max_in_flight, "more in flight than asked for");
        let buffers: u64 =
            self.works().filter(|w| matches!(w, Work::Copy { .. })).map(|w| range_of(w).len()).sum();
        assert!(buffers <= config.buffer, "{buffers} bytes of buffer, {} are the limit", config.buffer);
    }

    /// One of those whose time has come.
    pub(super) fn pick(&self, rng: &mut Rng, now: Duration) -> Option<usize> {
        let due = |op: &&Running<'_>| op.not_before <= now;
        let count = self.running.iter().filter(due).count();
        let nth = rng.index(count);
        self.running.iter().enumerate().filter(|(_, op)| due(op)).nth(nth).map(|(index, _)| index)
    }

    /// When the time of the next one comes, if none's has.
    pub(super) fn next_time(&self, now: Duration) -> Option<Duration> {
        let next = self.running.iter().map(|op| op.not_before).min()?;
        (next > now).then_some(next)
    }

    pub(super) fn work(&self, index: usize) -> Work {
        self.running[index].action.work
    }

    /// Does half of an operation, and reports to `core` if that was the last. The end is not for a thread
    /// alone: it is handed back, to be reported by the caller.
    pub(super) fn perform_half(
        &mut self,
        core: &mut Core,
        rng: &mut Rng,
        now: Duration,
        index: usize,
        trace: &mut Trace,
    ) -> Option<(u64, Ending)> {
        let mut op = self.running.swap_remove(index);
        let work = op.action.work;
        let side = match work {
            Work::Copy { .. } if !op.has_read => Operation::Read,
            Work::Scan { .. } if rng.one_in(2) => Operation::Read,
            Work::End(ending) => return Some((op.action.id, ending)),
            _ => Operation::Write,
        };
        let fault = self.faults.inject(rng, side, moved_by(work));
        // A volatile target may be back already when it reports.
        let fault = match fault {
            Some(_)
                if self.environment.config.flush_interval.is_some() && rng.one_in(2) && is_flush(work) =>
            {
                Some(block::Error::new(ErrorKind::WritesLost, "simulated"))
            }
            other => other,
        };
        let answer = match &fault {
            None => self.whole(&mut op),
            Some(_) => {
                self.part(&mut op, side, rng);
                None
            }
        };
        if is_flush(work) {
            if fault.is_some() {
                self.lose_unflushed(rng);
            } else if self.durable.is_some() {
                self.durable = Some(contents(&self.environment.target));
            }
            self.flushed = fault.is_none().then_some(op.action.id);
            self.unflushed.clear();
            self.through.clear();
        }
        let answer = match fault {
            Some(error) => Some(Err(Failure { operation: side, error })),
            None => answer,
        };
        match answer {
            None => {
                op.has_read = true;
                op.not_before = now + self.environment.latency.takes(rng, Operation::Write);
                trace.step(now, Step::HasRead { id: op.action.id, range: range_of(work) });
                self.running.push(op);
            }
            Some(result) => {
                trace.step(now, Step::Performed { id: op.action.id, work, result: &result });
                core.on_completion(now, op.action.id, result);
            }
        }
        None
    }

    /// The half is done as it should be; the answer if it was the last.
    fn whole(&mut self, op: &mut Running<'w>) -> Option<Result<Done, Failure>> {
        match op.action.work {
            Work::Copy { range, .. } if !op.has_read => op.mover.read(range).err().map(Err),
            Work::Copy { range, target_zero, .. } => {
                self.unflushed.push(range);
                Some(op.mover.write(range, target_zero).map(Done::Copied))
            }
            work => {
                if let Work::Zero { range, .. } = work {
                    self.unflushed.push(range);
                }
                Some(op.mover.perform(work))
            }
        }
    }

    /// What is reported as failed may have happened all the same, in part or whole.
    fn part(&mut self, op: &mut Running<'w>, side: Operation, rng: &mut Rng) {
        let range = moved_by(op.action.work);
        if side == Operation::Read || range.is_empty() {
            return;
        }
        let happened = match rng.below(3) {
            0 => return,
            1 => range,
            _ => ByteRange::new(range.start(), range.start() + range.len() / 2),
        };
        self.unflushed.push(happened);
        let done = match op.action.work {
            Work::Copy { target_zero, .. } => op.mover.write(happened, target_zero).map(|_| ()),
            work => op.mover.perform(with_range(work, happened)).map(|_| ()),
        };
        assert!(done.is_ok(), "a memory disk failed: {done:?}");
    }

    /// Bytes of the target that were written and not flushed are lost: what was there before is back, or
    /// anything.
    pub(super) fn lose_unflushed(&mut self, rng: &mut Rng) {
        let job = std::mem::take(&mut self.unflushed);
        for range in job.into_iter().chain(std::mem::take(&mut self.through)) {
            let bytes = match &self.durable {
                Some(durable) => durable[range.start() as usize..range.end() as usize].to_vec(),
                None => rng.nonzero_bytes(range.len()),
            };
            write(&*self.environment.target, &bytes, range);
        }
    }
}

fn with_range(work: Work, range: ByteRange) -> Work {
    match work {
        Work::Zero { metadata_only, .. } => Work::Zero { range, metadata_only },
        other => other,
    }
}

/// Writes to a disk that does not fail.
pub(super) fn write(disk: &dyn BlockDevice, bytes: &[u8], range: ByteRange) {
    unfailing(disk.write_at(bytes, range.start(), WriteFlags::NONE));
}

/// Makes part of a disk zero that does not fail.
pub(super) fn zero(disk: &dyn BlockDevice, range: ByteRange) {
    unfailing(disk.write_zeroes(range, ZeroFlags::MAY_UNMAP));
}

pub(super) fn unfailing(result: block::Result<()>) {
    assert!(result.is_ok(), "a memory disk failed: {result:?}");
}
