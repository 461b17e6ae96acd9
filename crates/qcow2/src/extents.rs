//! Allocation queries: what lies where, through the whole backing chain.

use std::sync::Arc;

use blockmirror_block::{ByteRange, Extent, ExtentKind, ExtentMerger, HostRun, Result, Visit};

use crate::holes::Holes;
use crate::image::Qcow2;
use crate::meta::{MapRun, Mapping};

/// Runs collected under the lock before the visitor sees them.
const BATCH: usize = 1024;

impl Qcow2 {
    /// Visits maximal runs of `range`, which lies inside the disk. A batch of look-ups is what it does
    /// between two calls of the visitor.
    pub(crate) fn visit_extents(
        &self,
        range: ByteRange,
        visit: &mut dyn FnMut(Extent) -> Visit,
    ) -> Result<()> {
        let mut merger = ExtentMerger::default();
        let mut at = range.start();
        while at < range.end() {
            let runs = self.meta.lock().runs_in_turn(&self.ctx, ByteRange::new(at, range.end()), BATCH)?;
            let holes = self.holes_below(&runs)?;
            for run in runs {
                if self.visit_run(run, &holes, &mut merger, visit)?.is_break() {
                    return Ok(());
                }
                at = run.range.end();
            }
            if at < range.end() && merger.cut(visit).is_break() {
                return Ok(());
            }
        }
        let _ = merger.finish(visit);
        Ok(())
    }

    /// The holes of the data storage below the mapped data of `runs`, from one pass over the host space.
    fn holes_below(&self, runs: &[MapRun]) -> Result<Holes> {
        if !self.ctx.looks_for_holes {
            return Ok(Holes::default());
        }
        let data = runs.iter().filter_map(|run| match run.mapping {
            Mapping::Data(host) => Some(ByteRange::at(host.0, run.range.len())),
            _ => None,
        });
        Holes::find(&**self.ctx.data(), data.collect(), &self.ctx.known_data)
    }

    fn visit_run(
        &self,
        run: MapRun,
        holes: &Holes,
        merger: &mut ExtentMerger,
        visit: &mut dyn FnMut(Extent) -> Visit,
    ) -> Result<Visit> {
        let in_host = |extent: Extent, offset: u64| {
            extent.in_host(HostRun { storage: Arc::clone(self.ctx.data()), offset })
        };
        let extent = match run.mapping {
            Mapping::Data(host) => {
                let there = ByteRange::at(host.0, run.range.len());
                for (part, hole) in holes.split(there) {
                    let guest = ByteRange::at(run.range.start() + (part.start() - host.0), part.len());
                    let extent = in_host(Extent::new(guest, ExtentKind::Data), part.start());
                    let extent = if hole { extent.in_hole() } else { extent };
                    if merger.push(extent, visit).is_break() {
                        return Ok(Visit::Break(()));
                    }
                }
                return Ok(Visit::Continue(()));
            }
            Mapping::Zero(Some(host)) => in_host(Extent::new(run.range, ExtentKind::Zero), host.0),
            Mapping::Zero(None) => Extent::new(run.range, ExtentKind::Zero),
            Mapping::Compressed(_) => Extent::new(run.range, ExtentKind::Data).compressed(),
            Mapping::Unallocated => return self.visit_backing(run.range, merger, visit),
        };
        Ok(merger.push(extent, visit))
    }

    /// What the backing device says, one layer deeper; nothing past its end.
    fn visit_backing(
        &self,
        range: ByteRange,
        merger: &mut ExtentMerger,
        visit: &mut dyn FnMut(Extent) -> Visit,
    ) -> Result<Visit> {
        let below = self.ctx.below.lock().clone();
        let Some(backing) = below.device else {
            let kind = if below.named { ExtentKind::Unknown } else { ExtentKind::Unallocated };
            return Ok(merger.push(Extent::new(range, kind), visit));
        };
        let there = range.intersect(ByteRange::new(0, backing.len()));
        let mut flow = Visit::Continue(());
        if !there.is_empty() {
            backing.extents(there, &mut |extent| {
                let depth = extent.depth + 1;
                flow = merger.push(extent.at_depth(depth), visit);
                flow
            })?;
        }
        if flow.is_break() {
            return Ok(flow);
        }
        // Past the end of a shorter backing file no layer below was asked.
        let past = ByteRange::new(there.end().max(range.start()), range.end());
        Ok(merger.push(Extent::new(past, ExtentKind::Unallocated), visit))
    }
}
