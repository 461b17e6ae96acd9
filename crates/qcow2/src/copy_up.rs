//! Copy-up: the image takes what it shows of its backing chain into itself, for copy-on-read and streaming.
//!
//! A piece at a time, under an exclusive lock on its clusters, so that a guest write comes either before it,
//! and the piece is then allocated, or after it. Only unallocated subclusters change. What they show stays
//! the same; where that is zeros, they get the zero flag.

use blockmirror_block::{ByteRange, ExtentKind, Result, Visit, zero};

use crate::image::Qcow2;
use crate::meta::{MapRun, Mapping};

/// Bytes that are copied under one lock, unless a cluster is larger.
const PIECE: u64 = 1 << 20;

/// Runs of the mapping that are looked at in one go.
const BATCH: usize = 256;

/// What is to become of one subcluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Unit {
    /// A layer in reach decides something in it, or keeps deeper ones from being asked.
    wanted: bool,
    /// Some of it must be read to be known.
    data: bool,
}

impl Qcow2 {
    /// Copies what layers 1 to `max_depth` of the chain show in the subclusters of `range`, inside the disk;
    /// returns how many bytes that were.
    pub(crate) fn copy_up_range(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.check_writable("copy up")?;
        let ctx = &self.ctx;
        let whole =
            range.align_outward(ctx.format.subcluster_size()).intersect(ByteRange::new(0, ctx.size()));
        let mut copied = 0;
        for piece in whole.pieces(PIECE.max(ctx.cluster().bytes())) {
            self.maybe_write_back()?;
            let _lock = self.ranges.lock_exclusive(piece.align_outward(ctx.cluster().bytes()))?;
            let mut at = piece.start();
            while at < piece.end() {
                let runs = self.meta.lock().runs(ctx, ByteRange::new(at, piece.end()), BATCH)?;
                for MapRun { range, mapping } in runs {
                    if mapping == Mapping::Unallocated {
                        copied += self.copy_up_unallocated(range, max_depth)?;
                    }
                    at = range.end();
                }
            }
        }
        Ok(copied)
    }

    /// The same for `range` of unallocated subclusters, whose clusters are held.
    fn copy_up_unallocated(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        let size = self.ctx.format.subcluster_size();
        let units = self.look_below(range, max_depth)?;
        let mut copied = 0;
        let mut first = 0;
        for same in units.chunk_by(|a, b| a == b) {
            // usize to u64 is exact here.
            let run = ByteRange::at(range.start() + first as u64 * size, same.len() as u64 * size);
            let run = run.intersect(range);
            first += same.len();
            if !same[0].wanted {
                continue;
            }
            copied += run.len();
            if !same[0].data && self.ctx.format.has_zero {
                self.zero_held(run)?;
            } else {
                self.copy_up_data(run)?;
            }
        }
        Ok(copied)
    }

    /// What each subcluster of `range` shows of the layers below.
    fn look_below(&self, range: ByteRange, max_depth: u32) -> Result<Vec<Unit>> {
        let size = self.ctx.format.subcluster_size();
        // A piece, by the smallest subcluster: a few thousand.
        let mut units = vec![Unit::default(); range.len().div_ceil(size) as usize];
        let Some(backing) = self.ctx.backing() else { return Ok(units) };
        let index = |at: u64| ((at - range.start()) / size) as usize;
        // Where a layer in reach is too short, a deeper one must not show later.
        let ends_count = max_depth != u32::MAX;
        let there = range.intersect(ByteRange::new(0, backing.len()));
        if ends_count && max_depth > 0 && backing.len() < range.end() {
            units[index(backing.len().max(range.start()))..].fill(Unit { wanted: true, data: false });
        }
        if there.is_empty() {
            return Ok(units);
        }
        backing.extents(there, &mut |extent| {
            let in_reach = extent.depth < max_depth && (ends_count || !extent.kind.is_unallocated());
            let data = extent.kind == ExtentKind::Data;
            for unit in &mut units[index(extent.range.start())..=index(extent.range.end() - 1)] {
                unit.wanted |= in_reach;
                unit.data |= data;
            }
            Visit::Continue(())
        })?;
        Ok(units)
    }

    /// Writes what `range` shows into the image, zeros as zeros where the format can say so.
    fn copy_up_data(&self, range: ByteRange) -> Result<()> {
        // At most a piece.
        let mut buf = vec![0; range.len() as usize];
        self.read_mapped(&mut buf, range)?;
        let unit = if self.ctx.format.has_zero { self.ctx.format.subcluster_size() } else { u64::MAX };
        for run in zero::runs(&buf, range.start(), unit as usize) {
            let at = ByteRange::at(range.start() + run.range.start as u64, run.range.len() as u64);
            if run.zero && self.ctx.format.has_zero {
                self.zero_held(at)?;
            } else {
                self.write_held(&buf[run.range], at)?;
            }
        }
        Ok(())
    }
}
