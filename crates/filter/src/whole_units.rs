//! Extents in whole units: a disk whose answers to extent queries begin and end with units of another one.
//!
//! In front of source and target of a copy whose target takes data in whole clusters only, as one with
//! compressed clusters does: what is copied, zeroed and skipped then are whole clusters of the target. Used
//! by `ops`.

use std::sync::Arc;

use blockmirror_block::{
    BlockDevice, ByteRange, Extent, ExtentKind, ExtentMerger, Geometry, Result, Visit, WriteFlags, ZeroFlags,
};

/// Answers extent queries in units of a given size. All else is passed on.
///
/// A unit that has any data is data, at the depth of its topmost part; one without is zeros if any of it is.
/// Its extents do not say where bytes lie.
#[derive(Debug)]
pub struct WholeUnits {
    child: Arc<dyn BlockDevice>,
    unit: u64,
}

impl WholeUnits {
    /// Shows the extents of `child` in units of `unit` bytes, a power of two; another number is taken as the
    /// next one.
    pub fn new(child: Arc<dyn BlockDevice>, unit: u64) -> Self {
        Self { child, unit: unit.checked_next_power_of_two().unwrap_or(1) }
    }
}

/// What a unit, or a part of one, holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    kind: ExtentKind,
    depth: u32,
}

impl Answer {
    fn rank(self) -> u8 {
        match self.kind {
            ExtentKind::Unallocated => 0,
            ExtentKind::Unknown => 1,
            ExtentKind::Zero => 2,
            ExtentKind::Data => 3,
        }
    }

    /// That of a unit with both.
    fn with(self, other: Self) -> Self {
        let kind = if self.rank() >= other.rank() { self.kind } else { other.kind };
        let depth = match (self.kind.is_unallocated(), other.kind.is_unallocated()) {
            (false, false) => self.depth.min(other.depth),
            (true, true) => self.depth.max(other.depth),
            (false, true) => self.depth,
            (true, false) => other.depth,
        };
        Self { kind, depth }
    }
}

/// Rounds extents, which come in order and without gaps, to units.
struct Rounding<'a> {
    unit: u64,
    /// Where the disk ends, and with it a unit.
    len: u64,
    /// What was asked for.
    wanted: ByteRange,
    /// Where the unit begins that is not whole yet.
    start: u64,
    /// The answer of its part so far, if there is one.
    part: Option<Answer>,
    merger: ExtentMerger,
    visit: &'a mut dyn FnMut(Extent) -> Visit,
}

impl Rounding<'_> {
    fn push(&mut self, extent: &Extent) -> Visit {
        let answer = Answer { kind: extent.kind, depth: extent.depth };
        let end = extent.range.end();
        let unit_end = self.start.saturating_add(self.unit).min(self.len);
        if let Some(part) = self.part {
            self.part = Some(part.with(answer));
            if end >= unit_end {
                self.emit(unit_end)?;
            }
        }
        // Units that lie in the extent as a whole.
        let whole = if end == self.len { end } else { end & !(self.unit - 1) };
        if whole > self.start {
            self.part = Some(answer);
            self.emit(whole)?;
        }
        if end > self.start && self.part.is_none() {
            self.part = Some(answer);
        }
        if extent.partial { self.merger.cut(self.visit) } else { Visit::Continue(()) }
    }

    /// Hands out what is known up to `end`.
    fn emit(&mut self, end: u64) -> Visit {
        let range = ByteRange::new(self.start, end).intersect(self.wanted);
        self.start = end;
        match self.part.take() {
            Some(Answer { kind, depth }) => {
                self.merger.push(Extent::new(range, kind).at_depth(depth), self.visit)
            }
            None => Visit::Continue(()),
        }
    }
}

impl BlockDevice for WholeUnits {
    fn len(&self) -> u64 {
        self.child.len()
    }

    fn name(&self) -> &str {
        self.child.name()
    }

    fn geometry(&self) -> Geometry {
        self.child.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.child.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.child.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.child.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.child.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.child.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let len = self.len();
        if range.end() > len {
            // The child refuses it.
            return self.child.extents(range, visit);
        }
        let whole = range.align_outward(self.unit).intersect(ByteRange::new(0, len));
        let mut rounding = Rounding {
            unit: self.unit,
            len,
            wanted: range,
            start: whole.start(),
            part: None,
            merger: ExtentMerger::default(),
            visit,
        };
        let mut stopped = false;
        self.child.extents(whole, &mut |extent| {
            let visit = rounding.push(&extent);
            stopped = visit.is_break();
            visit
        })?;
        if !stopped {
            let Rounding { merger, visit, .. } = rounding;
            let _ = merger.finish(visit);
        }
        Ok(())
    }

    fn preallocate(&self, range: ByteRange) -> Result<()> {
        self.child.preallocate(range)
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.child.resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.child.copy_up(range, max_depth)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.child))
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.child.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.child.cancel_in_flight();
    }
}

#[cfg(test)]
mod tests;
