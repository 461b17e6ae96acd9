//! How a job writes a target that does not show, while it is filled, what it will show in the end.
//!
//! The target names a backing file that is not attached (a daemon's node with `"backing": null`), or none and
//! is given one later (a shallow copy whose chain comes with `blockdev-snapshot`), or a server has its
//! layers. Then the format cannot do copy-on-write: what a write does not cover of a new cluster would become
//! zeros, for good. [`CowTarget`] stands in front of such a target and completes each unit from the source's
//! whole chain when it is first written. Behind a server clusters are invisible: there the unit is the
//! granularity. All other targets are written as they are.
//!
//! Used by the engine for the job's own operations and for what the guest writes to the target. What must
//! hold: a unit is written whole the first time, and two writes to one unit take turns until then. That the
//! source may be written meanwhile does no harm: such a write goes to the target after it, or marks its range
//! dirty. After a failed flush no unit counts as complete: the target may have lost any of them.
//!
//! A unit holds bytes of the source that no operation of the job has asked for. So what was known of the
//! target, a promise that it reads as zeros among it, holds only for units that were never written:
//! [`extents`](BlockDevice::extents) reports the others as unknown, and zeros are left out by
//! [`leave_zeros`](CowTarget::leave_zeros) only. A unit counts as written before the first byte of the source
//! is read for it: what the source holds later marks its range dirty later.

use std::sync::Arc;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    self as block, Backing, BlockDevice, ByteRange, CloneUnits, Error, ErrorKind, Extent, ExtentKind,
    Geometry, HostRun, RangeLock, Result, Storage, Visit, WriteFlags, ZeroFlags, zero,
};

use crate::error;
use crate::machine::config::affordable_unit;
use crate::options::MirrorOptions;
use crate::scan::{SourceFailed, TargetContent, needs_backing};

/// Bytes of a unit that are read and written at once; a cluster is no larger.
const PIECE: u64 = 2 << 20;

/// A part of the source that could not be read, and why.
pub(crate) type Lost = (ByteRange, block::Error);

/// Completes the units of a target from the source when they are first written.
#[derive(Debug)]
pub(crate) struct CowTarget {
    target: Arc<dyn BlockDevice>,
    source: Arc<dyn BlockDevice>,
    unit: u64,
    /// Units end here: a longer target keeps what lies behind.
    end: u64,
    content: TargetContent,
    /// The caller has promised that all of the target reads as zeros.
    is_zero: bool,
    zero_flags: ZeroFlags,
    state: Mutex<State>,
    order: RangeLock,
}

#[derive(Debug)]
struct State {
    /// Units that hold all of their bytes.
    complete: ChunkBitmap,
    /// Units that may hold other bytes than at the start of the job.
    written: ChunkBitmap,
    /// Flushes that have failed.
    losses: u64,
}

impl CowTarget {
    /// What a job with these `options` needs in front of `target`, if anything.
    pub(crate) fn in_front_of(
        target: &Arc<dyn BlockDevice>,
        source: &Arc<dyn BlockDevice>,
        options: &MirrorOptions,
        granularity: u64,
    ) -> Option<Arc<Self>> {
        let geometry = target.geometry();
        let below = source.geometry().backing;
        let unit = match geometry.backing {
            Backing::Hidden if !options.target_is_below => zero_unit(geometry),
            Backing::Possible if needs_backing(below, options) => zero_unit(geometry),
            Backing::Remote { .. } => granularity.max(affordable_unit(target.len())),
            _ => return None,
        };
        let content = TargetContent::of(below, geometry.backing, options);
        let mut cow = Self::new(Arc::clone(target), Arc::clone(source), unit, content, options.unmap);
        cow.is_zero = options.target_is_zero;
        Some(Arc::new(cow))
    }

    /// `target`, completed from `source` in units of `unit` bytes. None of them counts as complete yet.
    fn new(
        target: Arc<dyn BlockDevice>,
        source: Arc<dyn BlockDevice>,
        unit: u64,
        content: TargetContent,
        unmap: bool,
    ) -> Self {
        let end = target.len().min(source.len());
        let complete = ChunkBitmap::new(end.div_ceil(unit));
        let written = complete.clone();
        let unmap = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE };
        let zero_flags = ZeroFlags::EXPLICIT | unmap;
        let state = Mutex::new(State { complete, written, losses: 0 });
        Self {
            target,
            source,
            unit,
            end,
            content,
            is_zero: false,
            zero_flags,
            state,
            order: RangeLock::new(),
        }
    }

    /// The units that `range` touches, clipped at the end of the last one.
    fn outward(&self, range: ByteRange) -> ByteRange {
        range.align_outward(self.unit).intersect(ByteRange::new(0, self.end))
    }

    /// The units that `range` covers. What lies past the end of the last one counts as covered.
    fn inward(&self, range: ByteRange) -> ByteRange {
        let whole = range.align_inward(self.unit);
        if range.end() != self.end {
            return whole;
        }
        ByteRange::new(range.start().next_multiple_of(self.unit).min(range.end()), range.end())
    }

    /// The units of `range`, whose borders are theirs.
    fn units(&self, range: ByteRange) -> std::ops::Range<u64> {
        range.start() / self.unit..range.end().div_ceil(self.unit)
    }

    fn is_complete(&self, range: ByteRange) -> bool {
        let state = self.state.lock();
        state
            .complete
            .next_clear(range.start() / self.unit)
            .is_none_or(|unit| unit * self.unit >= range.end())
    }

    /// `range`, in whole units, is complete unless a flush has failed since there were `losses`.
    fn completed(&self, range: ByteRange, losses: u64) {
        let mut state = self.state.lock();
        if state.losses == losses {
            state.complete.set(self.units(range));
        }
    }

    /// The target may have lost what no flush has covered: no unit counts as complete.
    pub(crate) fn writes_lost(&self) {
        let mut state = self.state.lock();
        state.losses += 1;
        state.complete.clear_all();
    }

    fn losses(&self) -> u64 {
        self.state.lock().losses
    }

    /// The units of `range` are about to be written. Returns the number of flushes that have failed.
    fn begin(&self, range: ByteRange) -> u64 {
        let mut state = self.state.lock();
        state.written.set(self.units(range));
        state.losses
    }

    /// The part of `range` up to the first border of what was written and what was not, and whether it was.
    fn written_prefix(&self, range: ByteRange) -> (ByteRange, bool) {
        let state = self.state.lock();
        let unit = range.start() / self.unit;
        let is_written = state.written.get(unit);
        let border = if is_written { state.written.next_clear(unit) } else { state.written.next_set(unit) };
        let end = border.and_then(|unit| unit.checked_mul(self.unit)).unwrap_or(u64::MAX);
        (ByteRange::new(range.start(), range.end().min(end)), is_written)
    }

    /// Makes `range` read as zeros, of which it is known that it did at the start of the job, or when the
    /// target was last asked. Returns the bytes that had to be zeroed, because the unit was written since.
    pub(crate) fn leave_zeros(&self, range: ByteRange) -> Result<u64> {
        // Taken here as well as below: what a write under way does to the unit is over.
        let (mut at, mut zeroed) = (range.start(), 0);
        while at < range.end() {
            let unit = self.outward(ByteRange::at(at, 1));
            let part = range.intersect(ByteRange::new(at, unit.end().max(at + 1)));
            let is_written = {
                let _turn = self.order.lock_exclusive(unit)?;
                self.written_prefix(part).1
            };
            if is_written {
                self.write_zeroes(part, self.zero_flags)?;
                zeroed += part.len();
            }
            at = part.end();
        }
        Ok(zeroed)
    }

    /// Writes `buf` at `offset`, although the rest of its units may not be readable at the source. What is
    /// not is added to `lost`, unless a server has it that completes units by itself.
    pub(crate) fn write_salvaged(
        &self,
        buf: &[u8],
        offset: u64,
        block: u64,
        lost: &mut Vec<Lost>,
    ) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        let units = self.outward(range);
        let _turn = self.order.lock_exclusive(units)?;
        let losses = self.begin(units);
        if !matches!(self.target.geometry().backing, Backing::Remote { .. }) && !self.is_complete(units) {
            for part in
                [ByteRange::new(units.start(), range.start()), ByteRange::new(range.end(), units.end())]
            {
                self.salvage_edge(part, block, lost)?;
            }
            self.completed(units, losses);
        }
        self.target.write_at(buf, offset, WriteFlags::NONE)
    }

    /// Writes what can be read of `edge`, a block of the source at a time.
    fn salvage_edge(&self, edge: ByteRange, block: u64, lost: &mut Vec<Lost>) -> Result<()> {
        for part in edge.pieces(block) {
            let mut bytes = vec![0; index(part, part.end())];
            match self.source.read_at(&mut bytes, part.start()) {
                Ok(()) => self.target.write_at(&bytes, part.start(), WriteFlags::NONE)?,
                Err(error) => lost.push((part, error)),
            }
        }
        Ok(())
    }

    /// Writes `buf` at `range`, and with it the rest of the units at its ends where they are not complete
    /// yet. The caller holds the units.
    fn write_whole(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        let losses = self.begin(self.outward(range));
        let first = self.outward(ByteRange::at(range.start(), 1));
        let last = self.outward(ByteRange::at(range.end() - 1, 1));
        let mut rest = range;
        for unit in [first, last] {
            // A unit that both ends lie in is done by the first.
            let part = rest.intersect(unit);
            if part.is_empty() || part == unit || self.is_complete(unit) {
                continue;
            }
            self.complete_unit(unit, part, &buf[index(range, part.start())..index(range, part.end())])?;
            rest = if part.start() == rest.start() {
                ByteRange::new(part.end(), rest.end())
            } else {
                ByteRange::new(rest.start(), part.start())
            };
        }
        if !rest.is_empty() {
            let bytes = &buf[index(range, rest.start())..index(range, rest.end())];
            self.target.write_at(bytes, rest.start(), WriteFlags::NONE)?;
        }
        self.completed(self.outward(range), losses);
        Ok(())
    }

    /// Writes `unit`: `buf` at `part`, and the source's bytes around it.
    fn complete_unit(&self, unit: ByteRange, part: ByteRange, buf: &[u8]) -> Result<()> {
        for piece in unit.pieces(PIECE) {
            // At most PIECE bytes, for each caller.
            let mut all = vec![0; index(piece, piece.end())];
            let new = piece.intersect(part);
            let around = match new.is_empty() {
                true => [piece, ByteRange::default()],
                false => [ByteRange::new(piece.start(), new.start()), ByteRange::new(new.end(), piece.end())],
            };
            for edge in around.into_iter().filter(|edge| !edge.is_empty()) {
                let into = &mut all[index(piece, edge.start())..index(piece, edge.end())];
                self.source.read_at(into, edge.start()).map_err(|error| {
                    Error::new(error.kind(), "complete a cluster of the target")
                        .caused_by(SourceFailed(error))
                })?;
            }
            if !new.is_empty() {
                all[index(piece, new.start())..index(piece, new.end())]
                    .copy_from_slice(&buf[index(part, new.start())..index(part, new.end())]);
            } else if zero::is_zero(&all) {
                self.target.write_zeroes(piece, self.zero_flags)?;
                continue;
            }
            self.target.write_at(&all, piece.start(), WriteFlags::NONE)?;
        }
        Ok(())
    }
}

/// Refuses a target that is longer than the source if what it keeps there is not known, and lies in one unit
/// with the source's last bytes: to write these is to lose it.
pub(crate) fn check_tail(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    options: &MirrorOptions,
) -> Result<(), error::Error> {
    let geometry = target.geometry();
    if !matches!(geometry.backing, Backing::Hidden) || options.target_is_below {
        return Ok(());
    }
    let end = source.len().next_multiple_of(zero_unit(geometry)).min(target.len());
    let tail = ByteRange::new(source.len().min(end), end);
    let mut known = true;
    if !tail.is_empty() {
        let look = &mut |extent: Extent| {
            known &= extent.kind != ExtentKind::Unknown;
            Visit::Continue(())
        };
        target.extents(tail, look).map_err(error::Error::Target)?;
    }
    if known { Ok(()) } else { Err(error::Error::HiddenTail { name: target.name().to_owned(), tail }) }
}

/// The unit in which a format copies.
fn zero_unit(geometry: Geometry) -> u64 {
    geometry.subcluster_size.or(geometry.cluster_size).unwrap_or(1)
}

/// Where `offset` lies in a buffer that holds `range`. No buffer is longer than `usize`.
fn index(range: ByteRange, offset: u64) -> usize {
    (offset - range.start()) as usize
}

impl BlockDevice for CowTarget {
    fn len(&self) -> u64 {
        self.target.len()
    }

    fn name(&self) -> &str {
        self.target.name()
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.target))
    }

    /// The unit is what can be zeroed without data being written.
    fn geometry(&self) -> Geometry {
        let mut geometry = self.target.geometry();
        geometry.subcluster_size = (self.unit > 1).then_some(self.unit);
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.target.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let len = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        let range = ByteRange::checked(offset, buf.len())
            .filter(|range| range.end() <= self.len())
            .ok_or_else(|| Error::out_of_bounds("write", offset, len, self.len()))?;
        if !range.is_empty() {
            let _turn = self.order.lock_exclusive(range.align_outward(self.unit))?;
            self.write_whole(buf, range)?;
        }
        if flags.contains(WriteFlags::FUA) { self.flush() } else { Ok(()) }
    }

    /// Whole units are zeroed; the rest of a unit is completed with the source's bytes, if it is not complete
    /// yet.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if range.end() > self.len() {
            return Err(Error::out_of_bounds("write zeroes", range.start(), range.len(), self.len()));
        }
        let fua = flags.contains(ZeroFlags::FUA);
        let flags = flags.difference(ZeroFlags::FUA) | ZeroFlags::EXPLICIT;
        let _turn = self.order.lock_exclusive(range.align_outward(self.unit))?;
        let losses = self.losses();
        let whole = self.inward(range);
        let edges = if whole.is_empty() {
            [range, ByteRange::default()]
        } else {
            [ByteRange::new(range.start(), whole.start()), ByteRange::new(whole.end(), range.end())]
        };
        let by_data = |edge: &ByteRange| !edge.is_empty() && !self.is_complete(self.outward(*edge));
        if flags.contains(ZeroFlags::NO_FALLBACK) && edges.iter().any(by_data) {
            return Err(Error::new(ErrorKind::Unsupported, "write zeroes").at(range.start()));
        }
        // First what may turn out to be unsupported, so that nothing was written then.
        if !whole.is_empty() {
            self.target.write_zeroes(whole, flags)?;
            self.completed(whole, losses);
        }
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            let mut rest = edge;
            if by_data(&edge)
                && let Some(first) = edge.pieces(PIECE).next()
            {
                // This completes the unit, so that the rest of it can be zeroed.
                self.write_whole(&vec![0; index(first, first.end())], first)?;
                rest = ByteRange::new(first.end(), edge.end());
            }
            if !rest.is_empty() {
                self.target.write_zeroes(rest, flags)?;
            }
        }
        if fua { self.flush() } else { Ok(()) }
    }

    /// Nothing: a hint, and what a discarded range then shows of a backing file is not known.
    fn discard(&self, range: ByteRange) -> Result<()> {
        if range.end() > self.len() {
            return Err(Error::out_of_bounds("discard", range.start(), range.len(), self.len()));
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.target.flush().inspect_err(|_| self.writes_lost())
    }

    /// What may show something else later is of unknown content, and so are units that were written, or are
    /// being written: the source's bytes for the rest of them may be under way. A target of which nothing
    /// else is known is not asked.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        if range.end() > self.len() {
            return Err(Error::out_of_bounds("get extents", range.start(), range.len(), self.len()));
        }
        let mut rest = range;
        let mut stopped = false;
        while !rest.is_empty() && !stopped {
            let (part, is_written) = self.written_prefix(rest);
            let kind = if is_written || !(self.is_zero || self.content != TargetContent::Unknown) {
                Some(ExtentKind::Unknown)
            } else if self.is_zero {
                Some(ExtentKind::Zero)
            } else {
                None
            };
            match kind {
                Some(kind) => stopped = visit(Extent::new(part, kind)).is_break(),
                None => {
                    let mut covered = part.start();
                    self.target.extents(part, &mut |extent| {
                        covered = extent.range.end();
                        let answer = visit(extent);
                        stopped = answer.is_break();
                        answer
                    })?;
                    // What the target leaves out is for the caller to ask again.
                    stopped |= covered < part.end();
                }
            }
            rest = ByteRange::new(part.end(), rest.end());
        }
        Ok(())
    }

    /// In whole units, so that nothing is left to complete.
    fn clone_units(&self, file: &dyn Storage) -> Option<CloneUnits> {
        let units = self.target.clone_units(file)?;
        let device = units.device.max(self.unit);
        device.is_power_of_two().then_some(CloneUnits { device, ..units })
    }

    /// A unit that a clone fails in is not complete: it may hold a part of the clone.
    fn clone_range(&self, offset: u64, run: &HostRun, len: u64) -> Result<u64> {
        let range = offset
            .checked_add(len)
            .map(|end| ByteRange::new(offset, end))
            .filter(|range| range.end() <= self.len())
            .ok_or_else(|| Error::out_of_bounds("clone", offset, len, self.len()))?;
        if range.is_empty() || range.align_inward(self.unit) != range {
            let error = Error::new(ErrorKind::Unsupported, "clone").at(offset);
            return Err(error.because("only whole units are cloned"));
        }
        let _turn = self.order.lock_exclusive(range)?;
        let losses = self.begin(range);
        let calls = self.target.clone_range(offset, run, len)?;
        self.completed(range, losses);
        Ok(calls)
    }

    /// The target's calls only: the source is the guest's own disk, whose calls the engine ends late.
    fn cancel_in_flight(&self) {
        self.target.cancel_in_flight();
    }
}

#[cfg(test)]
mod tests;
