//! A disk in memory that behaves like an image format.

use std::sync::Arc;

use super::allocation::AllocationMap;
use super::sparse::SparseBytes;
use crate::sync::Mutex;
use crate::{Backing, BlockDevice, DiscardEffect, Geometry, WriteFlags, ZeroCost, ZeroFlags};
use crate::{ByteRange, Error, ErrorKind, Result};
use crate::{Extent, ExtentKind, ExtentMerger, Visit};

/// What space a disk without clusters is tracked in.
const SECTOR: u64 = 512;

/// A [`BlockDevice`] in memory, with the allocation behaviour of an image format.
///
/// Space is tracked in units: the geometry's subcluster or cluster, or 512 bytes if it has none. A unit is
/// unallocated, zero, or data. Writing makes data of every unit it touches (and completes it from the backing
/// disk); zeroing and discarding change whole units and write zeros into cut ones that hold data; an
/// unallocated unit shows the backing disk, or zeros.
#[derive(Debug)]
pub struct MemoryDisk {
    name: Arc<str>,
    len: u64,
    geometry: Geometry,
    backing: Option<Arc<dyn BlockDevice>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: SparseBytes,
    map: AllocationMap,
    log: Option<Vec<DiskOp>>,
}

/// An operation that a [`MemoryDisk`] has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// A read.
    Read(ByteRange),
    /// A write.
    Write(ByteRange, WriteFlags),
    /// A write of zeros.
    WriteZeroes(ByteRange, ZeroFlags),
    /// A discard.
    Discard(ByteRange),
    /// A flush.
    Flush,
    /// A query of extents.
    Extents(ByteRange),
}

impl MemoryDisk {
    /// An unallocated disk of `len` bytes without clusters, whose zeros and discards are metadata operations.
    pub fn new(len: u64) -> Self {
        let geometry =
            Geometry { zero_cost: ZeroCost::Metadata, discard: DiscardEffect::Frees, ..Geometry::plain() };
        let state = State { bytes: SparseBytes::new(len), ..State::default() };
        Self { name: Arc::from("memory disk"), len, geometry, backing: None, state: Mutex::new(state) }
    }

    /// A disk that holds `bytes`, all of them allocated.
    pub fn with_contents(bytes: &[u8]) -> Self {
        let disk = Self::new(bytes.len() as u64);
        {
            let mut state = disk.state.lock();
            state.bytes.write(bytes, 0);
            state.map.set(ByteRange::new(0, disk.len), ExtentKind::Data);
        }
        disk
    }

    /// The same with clusters of `size` bytes, a power of two.
    #[must_use]
    pub fn with_cluster_size(mut self, size: u64) -> Self {
        debug_assert!(size.is_power_of_two());
        self.geometry.cluster_size = Some(size);
        self
    }

    /// The same with another geometry. With [`ZeroCost::Data`] zeros are written as data; with
    /// [`DiscardEffect::Ignored`] a discard does nothing.
    #[must_use]
    pub fn with_geometry(mut self, geometry: Geometry) -> Self {
        self.geometry = geometry;
        self
    }

    /// The same as an overlay: unallocated units show `backing`, and zeros past its end.
    #[must_use]
    pub fn with_backing(mut self, backing: Arc<dyn BlockDevice>) -> Self {
        self.backing = Some(backing);
        self
    }

    /// The same under another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Arc::from(name);
        self
    }

    /// The same, refusing writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.geometry.writable = false;
        self
    }

    /// The same, keeping a log of completed operations.
    #[must_use]
    pub fn logged(self) -> Self {
        self.state.lock().log = Some(Vec::new());
        self
    }

    /// Takes what was logged since the last call.
    pub fn take_log(&self) -> Vec<DiskOp> {
        self.state.lock().log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Every byte of the disk, the backing disk's included. Not logged.
    ///
    /// # Errors
    /// If the backing disk cannot be read.
    pub fn contents(&self) -> Result<Vec<u8>> {
        let mut out = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        self.fill(&mut out, 0)?;
        Ok(out)
    }

    /// Bytes in units that hold data.
    pub fn allocated_bytes(&self) -> u64 {
        let runs = self.state.lock().map.runs(ByteRange::new(0, self.len));
        runs.iter().filter(|(_, kind)| *kind == ExtentKind::Data).map(|(range, _)| range.len()).sum()
    }

    fn unit(&self) -> u64 {
        self.geometry.subcluster_size.or(self.geometry.cluster_size).unwrap_or(SECTOR)
    }

    /// The whole units that touch `range`, clipped to the disk.
    fn outward(&self, range: ByteRange) -> ByteRange {
        range.align_outward(self.unit()).intersect(ByteRange::new(0, self.len))
    }

    /// The whole units inside `range`. The last unit of the disk is whole as far as the disk goes.
    fn inward(&self, range: ByteRange) -> ByteRange {
        let unit = self.unit();
        let end = if range.end() == self.len { self.len } else { range.end() & !(unit - 1) };
        ByteRange::new(range.start().checked_next_multiple_of(unit).unwrap_or(end).min(end), end)
    }

    fn check(
        &self,
        operation: &'static str,
        offset: u64,
        range: Option<ByteRange>,
        len: u64,
    ) -> Result<ByteRange> {
        match range {
            Some(range) if range.end() <= self.len => Ok(range),
            _ => Err(self.error(Error::out_of_bounds(operation, offset, len, self.len))),
        }
    }

    fn check_change(
        &self,
        operation: &'static str,
        range: Option<ByteRange>,
        offset: u64,
        len: u64,
    ) -> Result<ByteRange> {
        if !self.geometry.writable {
            return Err(self.error(Error::new(ErrorKind::ReadOnly, operation).at(offset)));
        }
        self.check(operation, offset, range, len)
    }

    fn error(&self, error: Error) -> Error {
        error.in_file(Arc::clone(&self.name))
    }

    /// Reads through the backing chain.
    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        let runs = {
            let state = self.state.lock();
            state.bytes.read(buf, offset);
            state.map.runs(range)
        };
        for (run, kind) in runs {
            if kind == ExtentKind::Unallocated {
                let start = (run.start() - offset) as usize;
                self.fill_from_backing(&mut buf[start..start + run.len() as usize], run.start())?;
            }
        }
        Ok(())
    }

    fn fill_from_backing(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(backing) = &self.backing else { return Ok(()) };
        let there = backing.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        if there == 0 { Ok(()) } else { backing.read_at(&mut buf[..there], offset) }
    }

    /// Makes data of every unit that `range` touches, completing those that were not.
    fn allocate(&self, state: &mut State, range: ByteRange) -> Result<()> {
        let whole = self.outward(range);
        if self.backing.is_some() {
            for unit in [
                ByteRange::at(whole.start(), self.unit()),
                ByteRange::new((whole.end() - 1) & !(self.unit() - 1), whole.end()),
            ] {
                let unit = unit.intersect(whole);
                let unallocated =
                    state.map.runs(unit).first().is_some_and(|(_, kind)| *kind == ExtentKind::Unallocated);
                if unallocated && !range.contains_range(unit) {
                    let mut buf = vec![0; unit.len() as usize];
                    self.fill_from_backing(&mut buf, unit.start())?;
                    state.bytes.write(&buf, unit.start());
                    state.map.set(unit, ExtentKind::Data);
                }
            }
        }
        state.map.set(whole, ExtentKind::Data);
        Ok(())
    }

    fn write_data(&self, state: &mut State, buf: &[u8], range: ByteRange) -> Result<()> {
        self.allocate(state, range)?;
        state.bytes.write(buf, range.start());
        Ok(())
    }

    /// The default content: zeros of its own where a backing disk must not show through.
    fn blank(&self) -> ExtentKind {
        if self.backing.is_some() { ExtentKind::Zero } else { ExtentKind::Unallocated }
    }
}

impl State {
    fn note(&mut self, op: DiskOp) {
        if let Some(log) = &mut self.log {
            log.push(op);
        }
    }
}

impl BlockDevice for MemoryDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = self.check("read", offset, ByteRange::checked(offset, buf.len()), buf.len() as u64)?;
        self.fill(buf, offset)?;
        self.state.lock().note(DiskOp::Read(range));
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let range =
            self.check_change("write", ByteRange::checked(offset, buf.len()), offset, buf.len() as u64)?;
        let mut state = self.state.lock();
        if !range.is_empty() {
            self.write_data(&mut state, buf, range)?;
        }
        state.note(DiskOp::Write(range, flags));
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.check_change("write zeroes", Some(range), range.start(), range.len())?;
        let mut state = self.state.lock();
        let cheap = match self.geometry.zero_cost {
            ZeroCost::Metadata => self.inward(range),
            ZeroCost::Data => ByteRange::new(range.end(), range.end()),
        };
        let cut = if cheap.is_empty() {
            [range, ByteRange::default()]
        } else {
            [ByteRange::new(range.start(), cheap.start()), ByteRange::new(cheap.end(), range.end())]
        };
        // In a unit that reads as zeros already, nothing is to be done.
        let dear: Vec<ByteRange> = cut
            .into_iter()
            .flat_map(|part| state.map.runs(part))
            .filter(|(_, kind)| match kind {
                ExtentKind::Data => true,
                ExtentKind::Zero => self.geometry.zero_cost == ZeroCost::Data,
                ExtentKind::Unallocated | ExtentKind::Unknown => {
                    self.backing.is_some() || self.geometry.zero_cost == ZeroCost::Data
                }
            })
            .map(|(part, _)| part)
            .collect();
        if flags.contains(ZeroFlags::NO_FALLBACK) && !dear.is_empty() {
            let error = Error::new(ErrorKind::Unsupported, "write zeroes").at(range.start());
            return Err(self.error(error.because("it would take writing zero bytes")));
        }
        for part in dear {
            for piece in part.pieces(1 << 20) {
                self.write_data(&mut state, &vec![0; piece.len() as usize], piece)?;
            }
        }
        state.bytes.zero(cheap);
        state.map.set(cheap, ExtentKind::Zero);
        state.note(DiskOp::WriteZeroes(range, flags));
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.check_change("discard", Some(range), range.start(), range.len())?;
        let mut state = self.state.lock();
        if self.geometry.discard == DiscardEffect::Frees {
            let whole = self.inward(range);
            // Units that were never written keep showing the backing disk: that is how they read before.
            for (run, kind) in state.map.runs(whole) {
                if kind != ExtentKind::Unallocated {
                    state.bytes.zero(run);
                    state.map.set(run, self.blank());
                }
            }
        }
        state.note(DiskOp::Discard(range));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.state.lock().note(DiskOp::Flush);
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.check("extents", range.start(), Some(range), range.len())?;
        let runs = self.state.lock().map.runs(range);
        let hidden = self.backing.is_none() && self.geometry.backing == Backing::Hidden;
        let mut merger = ExtentMerger::default();
        for (run, kind) in runs {
            let answer = match &self.backing {
                Some(backing) if kind == ExtentKind::Unallocated && run.start() < backing.len() => {
                    let inside = run.intersect(ByteRange::new(0, backing.len()));
                    let mut answer = Visit::Continue(());
                    backing.extents(inside, &mut |mut extent| {
                        extent.depth += 1;
                        answer = merger.push(extent, visit);
                        answer
                    })?;
                    if answer.is_break() {
                        return Ok(());
                    }
                    // Past the end of the backing disk nothing says anything.
                    let past = ByteRange::new(run.start().max(backing.len()), run.end());
                    merger.push(Extent::new(past, ExtentKind::Unallocated), visit)
                }
                _ if kind == ExtentKind::Unallocated && hidden => {
                    merger.push(Extent::new(run, ExtentKind::Unknown), visit)
                }
                _ => merger.push(Extent::new(run, kind), visit),
            };
            if answer.is_break() {
                return Ok(());
            }
        }
        // The answer to the last extent changes nothing any more.
        let _ = merger.finish(visit);
        self.state.lock().note(DiskOp::Extents(range));
        Ok(())
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.check_change("copy up", Some(range), range.start(), range.len())?;
        let Some(backing) = &self.backing else { return Ok(0) };
        let mut state = self.state.lock();
        let mut copied = 0;
        for unit in self.outward(range).pieces(self.unit()) {
            let there = unit.intersect(ByteRange::new(0, backing.len()));
            let ours = state.map.runs(unit).first().is_some_and(|(_, kind)| *kind != ExtentKind::Unallocated);
            if ours {
                continue;
            }
            // Where a layer in reach is too short, a deeper one must not show later.
            let ends_count = max_depth != u32::MAX;
            let mut shown = ends_count && max_depth > 0 && there.end() < unit.end();
            backing.extents(there, &mut |extent| {
                shown |= extent.depth < max_depth && (ends_count || !extent.kind.is_unallocated());
                Visit::Continue(())
            })?;
            if shown {
                let mut buf = vec![0; unit.len() as usize];
                self.fill_from_backing(&mut buf, unit.start())?;
                state.bytes.write(&buf, unit.start());
                state.map.set(unit, ExtentKind::Data);
                copied += unit.len();
            }
        }
        Ok(copied)
    }
}
