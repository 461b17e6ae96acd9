//! The guard of a resolved write: fills the edges, writes the data, commits, or gives the clusters back.

use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::{
    ByteRange, Error, ErrorKind, RangeGuard, Result, StorageEvent, cancel, read_lost_as_zeros,
};

use super::{Fill, WriteGuard, WriteRun};
use crate::failure::may_come_late;
use crate::image::Qcow2;

impl<'a> WriteGuard<'a> {
    pub(super) fn new(image: &'a Qcow2, range: ByteRange, lock: Option<RangeGuard<'a>>) -> Self {
        Self {
            image,
            range,
            runs: Vec::new(),
            fills: Vec::new(),
            updates: Vec::new(),
            grants: Vec::new(),
            may_come_late: AtomicBool::new(false),
            lost_as_zeros: false,
            _lock: lock,
        }
    }

    /// Where the data goes, in order and without gaps.
    pub fn runs(&self) -> &[WriteRun] {
        &self.runs
    }

    /// Writes what newly used clusters must hold around the data: old contents, backing contents or zeros.
    ///
    /// # Errors
    /// Reading the old contents or writing the new ones failed; drop the guard then.
    pub fn fill_edges(&self) -> Result<()> {
        for fill in &self.fills {
            self.fill(fill)?;
        }
        Ok(())
    }

    /// Writes `data`, all of the range, to its place.
    ///
    /// # Errors
    /// The storage failed, or `data` has another length than the range; drop the guard then.
    pub fn write(&self, data: &[u8]) -> Result<()> {
        if data.len() as u64 != self.range.len() {
            return Err(Error::new(ErrorKind::InvalidInput, "write").because(format!(
                "{} bytes of data for a range of {}",
                data.len(),
                self.range.len()
            )));
        }
        let mut rest = data;
        for run in &self.runs {
            // The runs cover the range, and the data is as long.
            let (now, later) = rest.split_at(run.range.len() as usize);
            self.image.ctx.storage.announce(StorageEvent::WriteAio);
            let written = self.image.ctx.data().write_at(now, run.host.0);
            written.inspect_err(|error| self.not_written(error))?;
            rest = later;
        }
        Ok(())
    }

    /// A write to [`runs`](Self::runs) that the caller has performed itself has failed with `error`. Unless
    /// it is certain that the write is over, its place is not used again while the image is open.
    pub fn not_written(&self, error: &Error) {
        if may_come_late(error) {
            self.may_come_late.store(true, Ordering::Relaxed);
        }
    }

    /// Makes the write visible. The data and the edges must have been written.
    ///
    /// # Errors
    /// The metadata could not be read back; then each cluster of the range is either old or new.
    pub fn commit(mut self) -> Result<()> {
        if self.updates.is_empty() {
            return Ok(());
        }
        let ctx = &self.image.ctx;
        // The data is there: a caller that is cancelled now does not leave half of it published.
        let _shield = cancel::shield();
        // From here on the clusters belong to the image. Should publishing one of them fail they leak.
        self.grants.clear();
        let mut meta = self.image.meta.lock();
        for update in self.updates.drain(..) {
            meta.set_entry(ctx, update.cluster, update.entry)?;
            if !update.drops.is_empty() {
                meta.refcounts(ctx)?.defer_unref(ctx, update.drops);
            }
        }
        Ok(())
    }

    /// Copies what the guest sees in `fill.range` to its new place. Nothing is published yet, so the old
    /// mapping answers; past the end of the disk it is zeros.
    fn fill(&self, fill: &Fill) -> Result<()> {
        let image = self.image;
        let ctx = &image.ctx;
        let there = fill.range.intersect(ByteRange::new(0, ctx.size()));
        if fill.fresh && image.shows_zero(there)? {
            return Ok(());
        }
        // A data file need not reach past the end of the disk, and on a device may not.
        let len = if ctx.format.external_data { there.len() } else { fill.range.len() };
        // At most a cluster, 2 MiB.
        let mut buf = vec![0; len as usize];
        let read = |buf: &mut [u8], at| image.read_mapped(buf, ByteRange::at(at, buf.len() as u64));
        let old = &mut buf[..there.len() as usize];
        if self.lost_as_zeros {
            // The caller that asks for it knows of the loss.
            read_lost_as_zeros(&read, old, there.start())?;
        } else {
            read(old, there.start())?;
        }
        ctx.data().write_at(&buf, fill.host.0).inspect_err(|error| self.not_written(error))
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        if self.grants.is_empty() {
            return;
        }
        let ctx = &self.image.ctx;
        let _shield = cancel::shield();
        let mut meta = self.image.meta.lock();
        if let Ok(refcounts) = meta.refcounts(ctx) {
            for grant in &self.grants {
                // If the refcounts cannot be read the clusters leak, which is harmless.
                let _ = match *self.may_come_late.get_mut() {
                    true => refcounts.release_unusable(ctx, grant.clusters()),
                    false => refcounts.release(ctx, grant.clusters()),
                };
            }
        }
    }
}
