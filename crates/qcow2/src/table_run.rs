//! A table that must not be cut, written to clusters one behind the other that nothing points at yet: an L1
//! table, the snapshot table.
//!
//! The caller holds all guest clusters, so that nothing else allocates meanwhile. It makes the table durable
//! (`write_back`), and then something that points at it.

use std::ops::Range;

use blockmirror_block::{Error, Result};

use crate::failure::may_come_late;
use crate::image::Qcow2;
use crate::offset::HostCluster;
use crate::refcounts::RunSearch;
use crate::stop::StopCheck;

impl Qcow2 {
    /// Writes `table`, whole clusters, to a new place.
    pub(crate) fn write_table(&self, table: &[u8], stop: &StopCheck<'_>) -> Result<Range<HostCluster>> {
        let ctx = &self.ctx;
        let clusters = ctx.cluster().count(table.len() as u64);
        let mut search = RunSearch::default();
        let new = loop {
            let answer = {
                let mut meta = self.meta.lock();
                meta.check_poison(ctx, "allocate cluster")?;
                meta.allocate_run(ctx, clusters, &mut search)?
            };
            match answer {
                Ok(run) => break run,
                Err(missing) => self.provide(missing, stop)?,
            }
        };
        let written = ctx.storage.write_at(table, ctx.cluster().start(new.start).0);
        written.inspect_err(|error| self.give_back_table(new.clone(), error))?;
        Ok(new)
    }

    /// Gives the clusters of a table back that nothing points at, after `error`.
    pub(crate) fn give_back_table(&self, clusters: Range<HostCluster>, error: &Error) {
        let mut meta = self.meta.lock();
        if let Ok(refcounts) = meta.refcounts(&self.ctx) {
            // If the refcounts cannot be read the clusters leak, which is harmless.
            let _ = match may_come_late(error) {
                true => refcounts.release_unusable(&self.ctx, clusters),
                false => refcounts.release(&self.ctx, clusters),
            };
        }
    }
}
