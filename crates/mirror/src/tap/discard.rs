//! A discard of the guest, done at the target: what the source then reads is written there.
//!
//! What a discarded range reads as is the disk's choice, so the discard itself says nothing. Called by the
//! tap in write-blocking mode, while no other write is under way in the range at either disk. Were it left to
//! the job, a guest that discards small pieces all over the disk would make whole units dirty as fast as the
//! job cleans them, and it would never be ready.

use std::ops::ControlFlow;

use blockmirror_block::{
    self as block, BlockDevice, ByteRange, Extent, ExtentKind, QueryBudget, WriteFlags, ZeroFlags,
};

/// The guest waits for the writing of no more bytes than this; the job does the rest.
const MOST_DATA: u64 = 64 << 10;
/// Nor for the zeroing of more than this, which writes none.
const MOST_ZEROS: u64 = 256 << 20;
/// Nor for what lies in more pieces than this.
const MOST_PIECES: usize = 16;

/// A part of the range, and whether it reads as zeros.
type Piece = (ByteRange, bool);

/// Makes `target` read in `range` as `source` does. Nothing if that would take long, or the disks do not say
/// what they read; then a part of it may have been done.
///
/// What reads as zeros at both is left as it is: a hole stays one.
pub(crate) fn repeat(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    range: ByteRange,
) -> Option<block::Result<()>> {
    let wanted = pieces(source, range, Extent::reads_as_zero)?;
    // What is not allocated there may come to show a backing file that is attached later.
    let present = pieces(target, range, |extent| extent.kind == ExtentKind::Zero)?;
    let data = wanted.iter().filter(|(_, is_zero)| !is_zero).map(|(piece, _)| *piece);
    let zeros = wanted.iter().filter(|(_, is_zero)| *is_zero).flat_map(|(zeros, _)| {
        let filled = present.iter().filter(|(_, is_zero)| !is_zero);
        filled.map(|(filled, _)| filled.intersect(*zeros)).filter(|piece| !piece.is_empty())
    });
    let (data, zeros): (Vec<_>, Vec<_>) = (data.collect(), zeros.collect());
    let bytes = |pieces: &[ByteRange]| pieces.iter().map(|piece| piece.len()).sum::<u64>();
    if bytes(&data) > MOST_DATA || bytes(&zeros) > MOST_ZEROS {
        return None;
    }
    let flags = match bytes(&data) + bytes(&zeros) {
        ..=MOST_DATA => ZeroFlags::MAY_UNMAP,
        _ => ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
    };
    let mut buf = Vec::new();
    for piece in data {
        // Not longer than MOST_DATA.
        buf.resize(piece.len() as usize, 0);
        source.read_at(&mut buf, piece.start()).ok()?;
        if let Err(error) = target.write_at(&buf, piece.start(), WriteFlags::NONE) {
            return Some(Err(error));
        }
    }
    for piece in zeros {
        match target.write_zeroes(piece, flags) {
            Err(error) if error.kind() == block::ErrorKind::Unsupported => return None,
            Err(error) => return Some(Err(error)),
            Ok(()) => {}
        }
    }
    Some(Ok(()))
}

fn pieces(disk: &dyn BlockDevice, range: ByteRange, is_zero: impl Fn(&Extent) -> bool) -> Option<Vec<Piece>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut budget = QueryBudget::new();
    // A guest waits: the job looks later at what takes long to look up.
    let mut spent = false;
    let asked = disk.extents(range, &mut |extent| {
        let is_zero = is_zero(&extent);
        spent = budget.spend(&extent).is_break();
        match pieces.last_mut() {
            Some((last, same)) if *same == is_zero => {
                *last = ByteRange::new(last.start(), extent.range.end());
            }
            _ => pieces.push((extent.range, is_zero)),
        }
        if spent || pieces.len() > MOST_PIECES { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    asked.ok()?;
    (!spent && pieces.len() <= MOST_PIECES).then_some(pieces)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "in a test a failure is the point")]
mod tests {
    use std::sync::Arc;

    use blockmirror_block::testing::{DiskOp, Fault, FaultDisk, Faults, MemoryDisk, OpKind};
    use blockmirror_block::{Geometry, ZeroCost};

    use super::*;

    const LEN: u64 = 1 << 20;

    fn filled(byte: u8) -> MemoryDisk {
        let disk = MemoryDisk::new(LEN);
        disk.write_at(&vec![byte; LEN as usize], 0, WriteFlags::NONE).unwrap();
        disk
    }

    fn bytes(disk: &MemoryDisk) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn the_target_reads_what_the_source_reads() {
        let (source, target) = (filled(1), filled(2));
        let range = ByteRange::new(1000, 600_000);
        // All but the ends.
        source.write_zeroes(ByteRange::new(2048, 580_000), ZeroFlags::MAY_UNMAP).unwrap();
        let done = repeat(&source, &target, range).unwrap();
        assert_eq!(done.map_err(|error| error.kind()), Ok(()));
        let (source, target) = (bytes(&source), bytes(&target));
        assert_eq!(source[1000..600_000], target[1000..600_000]);
        assert!(target[..1000].iter().chain(&target[600_000..]).all(|&byte| byte == 2));
    }

    #[test]
    fn what_would_take_long_is_left() {
        let (source, target) = (filled(1), filled(2));
        assert!(repeat(&source, &target, ByteRange::at(0, MOST_DATA + 1)).is_none());
        assert!(bytes(&target).iter().all(|&byte| byte == 2), "nothing was done");
        assert!(repeat(&source, &target, ByteRange::at(0, MOST_DATA)).is_some());
        for hole in 0..MOST_PIECES as u64 {
            source.write_zeroes(ByteRange::at(hole * 2048, 1024), ZeroFlags::MAY_UNMAP).unwrap();
        }
        assert!(repeat(&source, &target, ByteRange::at(0, 2048 * MOST_PIECES as u64)).is_none());
    }

    /// A guest that trimmed a sparse disk had all of its target allocated.
    #[test]
    fn holes_stay_holes() {
        let (source, target) = (MemoryDisk::new(LEN), MemoryDisk::new(LEN).logged());
        target.write_at(&[2; 4096], 8192, WriteFlags::NONE).unwrap();
        let rest = ZeroFlags::MAY_UNMAP;
        target.write_zeroes(ByteRange::new(0, 8192), rest).unwrap();
        target.write_zeroes(ByteRange::new(12_288, LEN), rest).unwrap();
        target.take_log();
        assert!(repeat(&source, &target, ByteRange::new(0, LEN)).unwrap().is_ok());
        let zeroed = DiskOp::WriteZeroes(ByteRange::at(8192, 4096), ZeroFlags::MAY_UNMAP);
        assert_eq!(target.take_log(), [DiskOp::Extents(ByteRange::new(0, LEN)), zeroed]);
    }

    /// Zeros that would have to be written are the job's affair if they are many.
    #[test]
    fn zeros_are_not_written_at_length() {
        let mut geometry = Geometry::plain();
        geometry.zero_cost = ZeroCost::Data;
        let target = MemoryDisk::new(LEN).with_geometry(geometry);
        target.write_at(&vec![2; LEN as usize], 0, WriteFlags::NONE).unwrap();
        let source = MemoryDisk::new(LEN);
        assert!(repeat(&source, &target, ByteRange::new(0, LEN)).is_none());
        assert!(repeat(&source, &target, ByteRange::at(0, MOST_DATA)).unwrap().is_ok());
        assert!(bytes(&target)[..MOST_DATA as usize].iter().all(|&byte| byte == 0));
    }

    /// Nor is the guest kept waiting for a long zeroing that writes nothing.
    #[test]
    fn zeroing_at_length_is_left() {
        let len = MOST_ZEROS + 4096;
        let (source, target) = (MemoryDisk::new(len), MemoryDisk::new(len));
        assert!(repeat(&source, &target, ByteRange::new(0, len)).is_none());
        assert!(repeat(&source, &target, ByteRange::new(0, MOST_ZEROS)).unwrap().is_ok());
    }

    /// Of a source that does not say, or cannot be read, nothing is known; that the target fails is for the
    /// job to judge.
    #[test]
    fn failures_are_told_apart() {
        let range = ByteRange::at(0, 4096);
        let failing = |disk, kind| {
            let faults = Faults::new();
            faults.inject(Fault::on(kind));
            FaultDisk::new(Arc::new(disk), faults)
        };
        for kind in [OpKind::Extents, OpKind::Read] {
            assert!(repeat(&failing(filled(1), kind), &filled(2), range).is_none(), "{kind:?}");
        }
        assert!(repeat(&filled(1), &failing(filled(2), OpKind::Write), range).unwrap().is_err());
    }
}
