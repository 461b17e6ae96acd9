//! Committing: layers of a chain are written down into the layer below them, their base.
//!
//! **From the top**, the guest's own image included ([`commit_active`]): a mirror job whose target is the
//! base. It copies what the layers above the base decide, becomes ready, follows what the guest writes, and
//! pivots to the base.
//!
//! **From the middle** ([`CommitJob`]): the layers that are committed do not change, so one pass does it.
//! Then the overlay above them is put on the base: the header first, durably, then the device.
//!
//! **From the top, not in use** ([`Commit`], which opens the files): a mirror job too, after which the image
//! is emptied.
//!
//! Writing the base changes nothing that is read through the chain, because only places are written that a
//! layer above decides. A reader of the base itself, or of another overlay on it, sees a mixture from the
//! beginning: such readers are the caller's affair.

mod image;

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, ExtentKind, QueryBudget, Result as BlockResult, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_job::Operation;
use blockmirror_mirror::{MirrorJob, MirrorOptions, SyncMode, Tap};
use blockmirror_qcow2::Qcow2;

use crate::error::Error;
use crate::stream::Base;
use crate::{Job, JobControl, JobOptions, Outcome, Worker};

pub use image::{Commit, CommitOutcome, OpenCommit, RunningCommit};

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// Runs that are looked at in one go.
const BATCH: usize = 1024;

/// Commits the disk behind `tap` and the layers below it, `layers` images in all, into `base`, the layer
/// below those, while the guest writes.
///
/// The job becomes ready; [`complete`](blockmirror_mirror::MirrorControl::complete) pivots the tap to `base`,
/// which must be a writable device that the chain of the tap's disk stands on. A shorter base grows first.
/// `options` are those of a mirror job; what is copied follows from `layers`.
///
/// # Errors
/// [`Error::NoLayers`], [`Error::ReadOnly`], [`Error::BaseLonger`]; [`Error::Write`] if the base cannot grow;
/// [`Error::Mirror`] for what [`MirrorJob::attach`] refuses.
pub fn commit_active(
    tap: &Arc<Tap>,
    base: Arc<dyn BlockDevice>,
    layers: u32,
    options: MirrorOptions,
) -> Result<MirrorJob, Error> {
    prepare(&**tap, &*base, layers)?;
    Ok(MirrorJob::attach(tap, base, options.sync(SyncMode::Top).top_layers(layers).target_is_below(true))?)
}

/// Checks what can be checked, and lets the base grow.
fn prepare(top: &dyn BlockDevice, base: &dyn BlockDevice, layers: u32) -> Result<(), Error> {
    if layers == 0 {
        return Err(Error::NoLayers { layers });
    }
    if !base.geometry().writable {
        return Err(Error::ReadOnly { name: base.name().to_owned() });
    }
    if base.len() > top.len() {
        return Err(Error::BaseLonger {
            base: base.name().to_owned(),
            base_len: base.len(),
            name: top.name().to_owned(),
            len: top.len(),
        });
    }
    if base.len() < top.len() { base.resize(top.len(), false).map_err(Error::Write) } else { Ok(()) }
}

/// A running commit of layers that are not written to. Dropping it cancels it and waits for its thread.
#[derive(Debug)]
pub struct CommitJob {
    job: Job,
}

impl CommitJob {
    /// Starts to commit `top` and the layers below it, `layers` images in all, into `base`, the layer below
    /// those; then puts `overlay`, whose backing device is `top`, on `base`.
    ///
    /// A shorter base grows first. That the devices are each other's layers is not checked.
    ///
    /// # Errors
    /// [`Error::NoLayers`], [`Error::ReadOnly`] for base and overlay, [`Error::BaseLonger`]; [`Error::Write`]
    /// if the base cannot grow; [`Error::Thread`].
    pub fn start(
        overlay: Arc<Qcow2>,
        top: Arc<dyn BlockDevice>,
        base: Base,
        layers: u32,
        options: JobOptions,
    ) -> Result<Self, Error> {
        if !overlay.geometry().writable {
            return Err(Error::ReadOnly { name: overlay.name().to_owned() });
        }
        prepare(&*top, &*base.device, layers)?;
        let len = top.len();
        let work = move |worker: &mut Worker| {
            CommitPass { top: &*top, base: &*base.device, layers }.run(worker)?;
            worker.last_step()?;
            base.device.flush().map_err(Error::Write)?;
            worker.pass_commit_point()?;
            Base::relink(Some(&base), &overlay)
        };
        Ok(Self { job: Job::start("commit", len, options, work)? })
    }

    /// A handle to steer and watch with.
    pub fn control(&self) -> &JobControl {
        self.job.control()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why the job failed, or [`Error::Cancelled`]; the chain is as it was, unless the reason is
    /// [`Error::Relink`].
    pub fn wait(self) -> Result<Outcome, Error> {
        self.job.wait()
    }
}

struct CommitPass<'a> {
    top: &'a dyn BlockDevice,
    base: &'a dyn BlockDevice,
    layers: u32,
}

/// What the base needs in a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Need {
    Nothing,
    Zero,
    Copy,
}

impl CommitPass<'_> {
    fn run(&self, worker: &mut Worker) -> Result<(), Error> {
        let unit = self.base.geometry().cluster_size.unwrap_or(1);
        let mut at = 0;
        while at < self.top.len() {
            worker.next_step(unit, PIECE)?;
            let rest = ByteRange::new(at, self.top.len());
            let runs = match self.needs(rest) {
                Ok(runs) => runs,
                Err(error) => {
                    let skipped = ByteRange::at(at, PIECE).intersect(rest);
                    if !worker.failed(Operation::Read, skipped, error)? {
                        worker.done(skipped.len(), 0);
                        at = skipped.end();
                    }
                    continue;
                }
            };
            for (run, need) in runs {
                self.do_run(worker, run, need, unit)?;
                at = run.end();
            }
        }
        Ok(())
    }

    fn do_run(&self, worker: &mut Worker, run: ByteRange, need: Need, unit: u64) -> Result<(), Error> {
        if need == Need::Nothing {
            worker.done(run.len(), 0);
            return Ok(());
        }
        let mut buffer = Vec::new();
        let mut at = run.start();
        while at < run.end() {
            let most = worker.next_step(unit, PIECE)?;
            let end = if need == Need::Zero {
                run.end()
            } else {
                (at / unit * unit).saturating_add(most).min(run.end())
            };
            let piece = ByteRange::new(at, end);
            let done = match need {
                Need::Copy => self.copy(piece, &mut buffer),
                _ => self
                    .base
                    .write_zeroes(piece, ZeroFlags::MAY_UNMAP)
                    .map_err(|error| (Operation::Write, error)),
            };
            match done {
                Ok(()) => worker.done(piece.len(), if need == Need::Copy { piece.len() } else { 0 }),
                Err((operation, error)) => {
                    if worker.failed(operation, piece, error)? {
                        continue;
                    }
                    worker.done(piece.len(), 0);
                }
            }
            at = end;
        }
        Ok(())
    }

    fn copy(
        &self,
        piece: ByteRange,
        buffer: &mut Vec<u8>,
    ) -> Result<(), (Operation, blockmirror_block::Error)> {
        // At most a piece, or a cluster.
        buffer.resize(piece.len() as usize, 0);
        self.top.read_at(buffer, piece.start()).map_err(|error| (Operation::Read, error))?;
        let written = self.base.write_at(buffer, piece.start(), WriteFlags::NONE);
        written.map_err(|error| (Operation::Write, error))
    }

    /// The first runs of `range`, each with what it needs.
    fn needs(&self, range: ByteRange) -> BlockResult<Vec<(ByteRange, Need)>> {
        let mut runs: Vec<(ByteRange, Need)> = Vec::new();
        let mut full = false;
        let mut budget = QueryBudget::new();
        self.top.extents(range, &mut |extent| {
            let spent = budget.spend(&extent);
            let need = match extent.kind {
                // Also where no layer says anything, if the base was not even asked: a layer above it is too
                // short.
                _ if extent.depth >= self.layers => Need::Nothing,
                ExtentKind::Data => Need::Copy,
                _ => Need::Zero,
            };
            match runs.last_mut() {
                Some((last, same)) if *same == need => {
                    *last = ByteRange::new(last.start(), extent.range.end());
                }
                _ if full => return Visit::Break(()),
                _ => runs.push((extent.range, need)),
            }
            full = runs.len() == BATCH;
            spent
        })?;
        Ok(runs)
    }
}
