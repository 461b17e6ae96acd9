//! Streaming: what an image shows of the layers below is brought up into it, and the layers are taken out of
//! its chain.
//!
//! The image may be the one that the guest writes, or lie deeper. Bringing up is the image's own work
//! ([`BlockDevice::copy_up`]), which takes turns with writes, so the guest is never held and its newer data
//! never lost. The link changes last: first in the header, durably, then in memory; what is read is the
//! same with and without.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, ExtentKind, QueryBudget, Result as BlockResult, Visit, cancel,
};
use blockmirror_job::Operation;
use blockmirror_qcow2::Qcow2;

use crate::error::Error;
use crate::{Job, JobControl, JobOptions, Outcome, Worker};

/// Bytes that are brought up at once: more would only hold the guest's writes to them longer.
const PIECE: u64 = 1 << 20;

/// Runs that are looked at in one go.
const BATCH: usize = 1024;

/// The layer that an image stands on when a job is done.
#[derive(Clone, Debug)]
pub struct Base {
    /// The layer.
    pub device: Arc<dyn BlockDevice>,
    /// Its name for the image's header.
    pub name: Vec<u8>,
    /// Its format for the image's header; detected when it is opened if absent.
    pub format: Option<String>,
}

impl Base {
    /// Puts `image` on this layer, or on none: the header first, then the device.
    pub(crate) fn relink(base: Option<&Self>, image: &Qcow2) -> Result<(), Error> {
        // Both or none.
        let _shield = cancel::shield();
        let name = base.map(|base| &*base.name);
        let format = base.and_then(|base| base.format.as_deref());
        image.set_backing_file(name, format).map_err(Error::Relink)?;
        image.replace_backing(base.map(|base| Arc::clone(&base.device)));
        Ok(())
    }
}

/// A running stream job. Dropping it cancels it and waits for its thread.
#[derive(Debug)]
pub struct StreamJob {
    job: Job,
}

impl StreamJob {
    /// Starts to bring up into `image` what it shows of the layers below, down to `base`, which is `depth`
    /// layers below it (1 is its backing file) and is what it stands on afterwards. Without a base everything
    /// is brought up, and the image stands alone.
    ///
    /// The caller knows the chain: that `base` is the layer at that depth is not checked. The image keeps its
    /// length while the job runs: what it grows by is not brought up, and a longer base would show there.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::NoLayers`] for a depth of 0, [`Error::Thread`].
    pub fn start(image: Arc<Qcow2>, base: Option<(Base, u32)>, options: JobOptions) -> Result<Self, Error> {
        if !image.geometry().writable {
            return Err(Error::ReadOnly { name: image.name().to_owned() });
        }
        if let Some((_, 0)) = base {
            return Err(Error::NoLayers { layers: 0 });
        }
        let len = image.len();
        let work = move |worker: &mut Worker| {
            Stream { image: &*image, base: base.as_ref() }.run(worker)?;
            worker.last_step()?;
            worker.pass_commit_point()?;
            Base::relink(base.as_ref().map(|(base, _)| base), &image)
        };
        Ok(Self { job: Job::start("stream", len, options, work)? })
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

struct Stream<'a> {
    image: &'a dyn BlockDevice,
    base: Option<&'a (Base, u32)>,
}

impl Stream<'_> {
    fn run(&self, worker: &mut Worker) -> Result<(), Error> {
        let len = self.image.len();
        // Past the end of the base there is nothing that could show.
        let split = self.base.map_or(0, |(base, _)| base.device.len().min(len));
        let above_base = self.base.map_or(0, |(_, depth)| depth - 1);
        self.stream(worker, ByteRange::new(0, split), above_base)?;
        self.stream(worker, ByteRange::new(split, len), u32::MAX)
    }

    /// Brings up what layers 1 to `max_depth` decide in `range`.
    fn stream(&self, worker: &mut Worker, range: ByteRange, max_depth: u32) -> Result<(), Error> {
        let geometry = self.image.geometry();
        let unit = geometry.cluster_size.unwrap_or(1);
        let mut at = range.start();
        while at < range.end() {
            worker.next_step(unit, PIECE)?;
            let rest = ByteRange::new(at, range.end());
            let runs = match self.wanted(rest, max_depth) {
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
            for (run, wanted) in runs {
                if wanted {
                    self.bring_up(worker, run, max_depth, unit)?;
                } else {
                    worker.done(run.len(), 0);
                }
                at = run.end();
            }
        }
        Ok(())
    }

    fn bring_up(&self, worker: &mut Worker, run: ByteRange, max_depth: u32, unit: u64) -> Result<(), Error> {
        let mut at = run.start();
        while at < run.end() {
            let most = worker.next_step(unit, PIECE)?;
            // Pieces end on borders of units, whole ones being brought up anyway.
            let end = (at / unit * unit).saturating_add(most).min(run.end());
            let piece = ByteRange::new(at, end);
            match self.image.copy_up(piece, max_depth) {
                Ok(moved) => worker.done(piece.len(), moved),
                Err(error) => {
                    // The layers below are what is read; that the image cannot be written is reported in the
                    // same way, as QEMU does.
                    if worker.failed(Operation::Read, piece, error)? {
                        continue;
                    }
                    worker.done(piece.len(), 0);
                }
            }
            at = end;
        }
        Ok(())
    }

    /// The first runs of `range`, each with whether it is to be brought up.
    fn wanted(&self, range: ByteRange, max_depth: u32) -> BlockResult<Vec<(ByteRange, bool)>> {
        let mut runs: Vec<(ByteRange, bool)> = Vec::new();
        let mut full = false;
        let mut budget = QueryBudget::new();
        self.image.extents(range, &mut |extent| {
            let spent = budget.spend(&extent);
            let ends_count = max_depth != u32::MAX && max_depth > 0;
            let wanted = match extent.kind {
                // The last layer asked was in reach: a deeper one might show later.
                ExtentKind::Unallocated | ExtentKind::Unknown => ends_count && extent.depth <= max_depth,
                _ => (1..=max_depth).contains(&extent.depth),
            };
            match runs.last_mut() {
                Some((last, same)) if *same == wanted => {
                    *last = ByteRange::new(last.start(), extent.range.end());
                }
                _ if full => return Visit::Break(()),
                _ => runs.push((extent.range, wanted)),
            }
            full = runs.len() == BATCH;
            spent
        })?;
        Ok(runs)
    }
}
