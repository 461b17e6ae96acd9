//! A discard of the guest, done at the target: what the source then reads is written there.
//!
//! What a discarded range reads as is the disk's choice, so the discard itself says nothing. Called by the tap in
//! write-blocking mode, while nobody else writes to the range at either disk. Were it left to the job, a guest that discards
//! small pieces all over the disk would make whole units dirty as fast as the job cleans them, and it would never be ready.

use std::ops::ControlFlow;

use blockmirror_block::{self as block, BlockDevice, ByteRange, WriteFlags, ZeroFlags};

/// The guest waits for the copying of no more than this; the job does the rest.
const MOST_DATA: u64 = 64 << 10;
/// Nor for the writing of more pieces than this.
const MOST_PIECES: usize = 16;

/// A part of the range, and whether it reads as zeros.
type Piece = (ByteRange, bool);

/// Makes `target` read in `range` as `source` does. Nothing if that would take long, or the source does not say what it reads.
pub(crate) fn repeat(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    range: ByteRange,
) -> Option<block::Result<()>> {
    let pieces = pieces(source, range)?;
    let data = pieces.iter().filter(|(_, is_zero)| !is_zero).map(|(piece, _)| piece.len());
    if data.sum::<u64>() > MOST_DATA {
        return None;
    }
    let mut buf = Vec::new();
    for (piece, is_zero) in pieces {
        let written = if is_zero {
            target.write_zeroes(piece, ZeroFlags::MAY_UNMAP)
        } else {
            // Not longer than MOST_DATA.
            buf.resize(piece.len() as usize, 0);
            source.read_at(&mut buf, piece.start()).ok()?;
            target.write_at(&buf, piece.start(), WriteFlags::NONE)
        };
        if written.is_err() {
            return Some(written);
        }
    }
    Some(Ok(()))
}

fn pieces(source: &dyn BlockDevice, range: ByteRange) -> Option<Vec<Piece>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let asked = source.extents(range, &mut |extent| {
        match pieces.last_mut() {
            Some((last, is_zero)) if *is_zero == extent.reads_as_zero() => {
                *last = ByteRange::new(last.start(), extent.range.end());
            }
            _ => pieces.push((extent.range, extent.reads_as_zero())),
        }
        if pieces.len() > MOST_PIECES { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    asked.ok()?;
    (pieces.len() <= MOST_PIECES).then_some(pieces)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "in a test a failure is the point")]
mod tests {
    use std::sync::Arc;

    use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};

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

    /// Of a source that does not say, or cannot be read, nothing is known; that the target fails is for the job to judge.
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
