//! A target whose backing file is not attached while it is filled.
//!
//! Whoever creates an overlay as target and lets the job copy only the top of the source (QEMU's `drive-mirror` with
//! `sync=top`) may leave the overlay's backing file closed until the end. The format then cannot do copy-on-write: what a
//! write does not cover of a new cluster would become zeros, for good. [`CowTarget`] stands in front of such a target and
//! completes each cluster from the source's whole chain when it is first written. Attach the backing file instead where
//! you can; then the format does it, and this is not needed.
//!
//! What must hold: a unit is written whole the first time, and two writes to one unit take turns until then. That the
//! source may be written meanwhile does no harm: whoever writes it marks the range dirty afterwards, and it is copied again.

use std::sync::Arc;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, ExtentKind, Geometry, RangeLock, Result, Visit,
    WriteFlags, ZeroFlags,
};

/// Completes the clusters of a target from the source when they are first written.
///
/// The unit is the target's subcluster, or its cluster. A target without clusters passes everything through.
#[derive(Debug)]
pub struct CowTarget {
    target: Arc<dyn BlockDevice>,
    source: Arc<dyn BlockDevice>,
    unit: u64,
    /// Units that hold all of their bytes.
    complete: Mutex<ChunkBitmap>,
    order: RangeLock,
}

impl CowTarget {
    /// `target`, completed from `source`, which is the whole chain that the copy is made of. Nothing of the target counts
    /// as complete yet.
    pub fn new(target: Arc<dyn BlockDevice>, source: Arc<dyn BlockDevice>) -> Self {
        let geometry = target.geometry();
        let unit = geometry.subcluster_size.or(geometry.cluster_size).unwrap_or(1);
        let complete = Mutex::new(ChunkBitmap::new(target.len().div_ceil(unit)));
        Self { target, source, unit, complete, order: RangeLock::new() }
    }

    /// The units that `range` touches, clipped at the end of the disk.
    fn outward(&self, range: ByteRange) -> ByteRange {
        range.align_outward(self.unit).intersect(ByteRange::new(0, self.len()))
    }

    /// The units that `range` covers. What lies past the end of the disk counts as covered.
    fn inward(&self, range: ByteRange) -> ByteRange {
        let whole = range.align_inward(self.unit);
        if range.end() != self.len() {
            return whole;
        }
        ByteRange::new(range.start().next_multiple_of(self.unit).min(range.end()), range.end())
    }

    /// The units of `range`, whose borders are theirs.
    fn units(&self, range: ByteRange) -> std::ops::Range<u64> {
        range.start() / self.unit..range.end().div_ceil(self.unit)
    }

    fn is_complete(&self, range: ByteRange) -> bool {
        self.complete
            .lock()
            .next_clear(range.start() / self.unit)
            .is_none_or(|unit| unit * self.unit >= range.end())
    }

    /// Writes `buf` at `range`, and with it the rest of the units at its ends where they are not complete yet. The caller
    /// holds the units.
    fn write_whole(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        let units = self.outward(range);
        let first = ByteRange::at(units.start(), self.unit);
        let last = ByteRange::new((range.end() - 1) / self.unit * self.unit, units.end());
        let start = if self.is_complete(first) { range.start() } else { units.start() };
        let end = if self.is_complete(last) { range.end() } else { units.end() };
        let whole = ByteRange::new(start, end);
        if whole == range {
            self.target.write_at(buf, range.start(), WriteFlags::NONE)?;
        } else {
            let index = |offset: u64| usize::try_from(offset - whole.start()).map_err(|_| too_long(range));
            let mut all = vec![0; index(whole.end())?];
            for edge in [ByteRange::new(start, range.start()), ByteRange::new(range.end(), end)] {
                if !edge.is_empty() {
                    self.source.read_at(&mut all[index(edge.start())?..index(edge.end())?], edge.start())?;
                }
            }
            all[index(range.start())?..index(range.end())?].copy_from_slice(buf);
            self.target.write_at(&all, whole.start(), WriteFlags::NONE)?;
        }
        self.complete.lock().set(self.units(units));
        Ok(())
    }
}

fn too_long(range: ByteRange) -> Error {
    Error::new(ErrorKind::LimitExceeded, "write").at(range.start())
}

impl BlockDevice for CowTarget {
    fn len(&self) -> u64 {
        self.target.len()
    }

    fn name(&self) -> &str {
        self.target.name()
    }

    fn geometry(&self) -> Geometry {
        self.target.geometry()
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
            let _turn = self.order.exclusive(range.align_outward(self.unit));
            self.write_whole(buf, range)?;
        }
        if flags.contains(WriteFlags::FUA) { self.flush() } else { Ok(()) }
    }

    /// Whole units are zeroed; the rest of a unit is completed with the source's bytes, if it is not complete yet.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if range.end() > self.len() {
            return Err(Error::out_of_bounds("write zeroes", range.start(), range.len(), self.len()));
        }
        let _turn = self.order.exclusive(range.align_outward(self.unit));
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
            self.complete.lock().set(self.units(whole));
        }
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            if by_data(&edge) {
                // Less than a unit.
                let zeros = vec![0; usize::try_from(edge.len()).map_err(|_| too_long(edge))?];
                self.write_whole(&zeros, edge)?;
            } else {
                self.target.write_zeroes(edge, flags)?;
            }
        }
        if flags.contains(ZeroFlags::FUA) { self.flush() } else { Ok(()) }
    }

    /// Only whole units: a hint about anything else is not worth completing a unit.
    fn discard(&self, range: ByteRange) -> Result<()> {
        let whole = self.inward(range);
        let _turn = self.order.exclusive(whole);
        self.target.discard(whole)
    }

    fn flush(&self) -> Result<()> {
        self.target.flush()
    }

    /// What the target has not allocated will show a backing file that nobody can ask now, so it counts as data of unknown
    /// content, never as zeros.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.target.extents(range, &mut |mut extent| {
            if extent.kind == ExtentKind::Unallocated {
                extent.kind = ExtentKind::Data;
                extent.host = None;
            }
            visit(extent)
        })
    }

    fn cancel_in_flight(&self) {
        self.target.cancel_in_flight();
        self.source.cancel_in_flight();
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::MemoryDisk;

    use super::*;

    fn pair() -> (Arc<MemoryDisk>, CowTarget) {
        let source: Vec<u8> = (0..20_000u32).map(|i| (i / 100) as u8 | 1).collect();
        let target = Arc::new(MemoryDisk::new(20_000).with_cluster_size(4096));
        let cow = CowTarget::new(target.clone(), Arc::new(MemoryDisk::with_contents(&source)));
        (target, cow)
    }

    #[test]
    fn the_first_write_completes_its_clusters_the_second_does_not() {
        let (target, cow) = pair();
        cow.write_at(&[0xee; 512], 4096 + 100, WriteFlags::NONE).unwrap();
        let now = target.contents().unwrap();
        assert_eq!(now[4096 + 99], (4195 / 100) as u8 | 1);
        assert_eq!(now[4096 + 100..4096 + 612], [0xee; 512]);
        assert_eq!(now[8191], (8191 / 100) as u8 | 1);
        assert_eq!(now[8192], 0, "the next cluster was not touched");
        // What has been written to the cluster since must not be replaced by the source's bytes.
        cow.write_at(&[0xdd; 5000], 8000, WriteFlags::NONE).unwrap();
        cow.write_at(&[0xdd; 10], 4096, WriteFlags::NONE).unwrap();
        assert_eq!(target.contents().unwrap()[4096 + 100..4096 + 612], [0xee; 512]);
    }

    #[test]
    fn the_last_cluster_ends_with_the_disk() {
        let (target, cow) = pair();
        cow.write_at(&[0xee; 1], 19_999, WriteFlags::NONE).unwrap();
        let now = target.contents().unwrap();
        assert_eq!((now[19_998], now[19_999]), ((19_998 / 100) as u8 | 1, 0xee));
        let (target, cow) = pair();
        cow.write_zeroes(ByteRange::new(16_384, 20_000), ZeroFlags::NO_FALLBACK).unwrap();
        assert_eq!(target.contents().unwrap()[16_384..], [0; 20_000 - 16_384]);
    }

    #[test]
    fn zeros_over_part_of_a_cluster_keep_the_rest_of_the_source() {
        let (target, cow) = pair();
        let range = ByteRange::new(4000, 9000);
        let refused = cow.write_zeroes(range, ZeroFlags::NO_FALLBACK).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(target.contents().unwrap().iter().all(|b| *b == 0), "nothing was written");
        cow.write_zeroes(range, ZeroFlags::NONE).unwrap();
        let now = target.contents().unwrap();
        assert_eq!((now[3999], now[9000]), ((3999 / 100) as u8 | 1, (9000 / 100) as u8 | 1));
        assert!(now[4000..9000].iter().all(|b| *b == 0));
    }

    #[test]
    fn what_is_unallocated_is_not_known_to_be_zero() {
        let (_, cow) = pair();
        let mut zero = 0;
        let mut visit = |extent: Extent| {
            zero += u64::from(extent.reads_as_zero());
            Visit::Continue(())
        };
        cow.extents(ByteRange::new(0, 20_000), &mut visit).unwrap();
        assert_eq!(zero, 0);
    }
}
