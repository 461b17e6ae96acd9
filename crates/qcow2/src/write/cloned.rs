//! Writing guest bytes by sharing the blocks that they lie in elsewhere: whole clusters only, so that no edge
//! is filled.
//!
//! Called by the device ([`crate::Qcow2`]). The steps and their order are those of a write; the data is moved
//! by a clone.

use blockmirror_block::{ByteRange, CloneUnits, Error, ErrorKind, HostRun, Result, Storage};

use super::WriteGuard;
use crate::image::Qcow2;

/// Clusters that one guard maps at most.
const MAX_CLUSTERS: u64 = 1024;

impl Qcow2 {
    /// The units in which clusters can share blocks with `file`; `None` where a block holds several clusters.
    pub(crate) fn units_of_clones(&self, file: &dyn Storage) -> Option<CloneUnits> {
        if !self.is_writable() {
            return None;
        }
        let (block, cluster) = (self.ctx.data().clone_block(file)?, self.ctx.cluster().bytes());
        (block <= cluster).then_some(CloneUnits { device: cluster, file: block })
    }

    /// Fills whole clusters, `len` bytes at `offset`, by clones of `run`. Returns the system calls.
    pub(crate) fn clone_clusters(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let whole = offset.checked_add(len).map(|end| ByteRange::new(offset, end));
        let range = self.bounds("clone", whole, offset, len)?;
        let cluster = self.ctx.cluster().bytes();
        if range.align_inward(cluster) != range {
            let error = Error::new(ErrorKind::Unsupported, "clone").in_file(self.ctx.name.clone());
            return Err(error.at(offset).because("only whole clusters are cloned"));
        }
        let mut calls = 0;
        for part in range.pieces(MAX_CLUSTERS * cluster) {
            let guard = self.resolve_write(part)?;
            let from = run.offset.saturating_add(part.start() - range.start());
            calls += guard.clone_from_run(&HostRun { storage: run.storage.clone(), offset: from })?;
            guard.commit()?;
        }
        self.check_writable("clone")?;
        Ok(calls)
    }
}

impl WriteGuard<'_> {
    /// Clones all of the range to its place.
    fn clone_from_run(&self, from: &HostRun) -> Result<u64> {
        let data = self.image.ctx.data();
        let mut calls = 0;
        for run in &self.runs {
            let at = from.offset.saturating_add(run.range.start() - self.range.start());
            let from = HostRun { storage: from.storage.clone(), offset: at };
            let cloned = data.clone_range(run.host.0, &from, run.range.len());
            calls += cloned.inspect_err(|error| self.not_written(error))?;
        }
        Ok(calls)
    }
}
