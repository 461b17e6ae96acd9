//! The operations that sequences are made of, and where in the disk each goes.

use blockmirror_block::ByteRange;

use crate::start::{Contents, DataPlace, Start};

/// One operation. Where it goes depends on the step it is, so that operations overlap in various ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// 4 KiB of data, at a multiple of 1 KiB.
    Write4K,
    /// One whole cluster of data.
    WriteCluster,
    /// Data across cluster borders, cutting sectors and clusters at both ends.
    WriteAcross,
    /// Zeros over whole and cut clusters.
    Zero,
    /// A discard of whole clusters.
    Discard,
    /// A flush.
    Flush,
    /// The disk becomes longer.
    Grow,
    /// The disk becomes half as long.
    Shrink,
    /// The header names another backing file.
    Rename,
    /// The image is closed, repaired and opened again.
    Repair,
    /// The process ends without a flush, and the image is opened again.
    Kill,
    /// The image is closed, and becomes one of the other version of the format.
    AmendVersion,
    /// The image is closed, and gets refcounts of another width.
    AmendWidth,
    /// A snapshot is taken.
    Snapshot,
    /// The disk becomes what the first snapshot shows.
    Apply,
    /// The first snapshot is deleted.
    DeleteSnapshot,
}

/// All of them.
pub const OPS: [Op; 16] = [
    Op::Write4K,
    Op::WriteCluster,
    Op::WriteAcross,
    Op::Zero,
    Op::Discard,
    Op::Flush,
    Op::Grow,
    Op::Shrink,
    Op::Rename,
    Op::Repair,
    Op::Kill,
    Op::AmendVersion,
    Op::AmendWidth,
    Op::Snapshot,
    Op::Apply,
    Op::DeleteSnapshot,
];

impl Op {
    /// The operation of this name, as `--ops` takes it.
    pub fn from_name(name: &str) -> Option<Self> {
        OPS.into_iter().find(|op| op.name() == name.trim().to_lowercase())
    }

    /// Its name in `--ops`.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Whether it can be done to an image that began as `start`.
    pub(crate) fn applies_to(self, start: Start) -> bool {
        match self {
            Self::Rename => start.backed && start.data != DataPlace::Raw,
            Self::Snapshot | Self::Apply | Self::DeleteSnapshot => start.data == DataPlace::Inside,
            _ => true,
        }
    }

    /// Whether it takes, applies or deletes a snapshot.
    pub(crate) fn is_snapshot_operation(self) -> bool {
        matches!(self, Self::Snapshot | Self::Apply | Self::DeleteSnapshot)
    }

    /// Where it goes when it is step `step` on a disk that is now `len` long.
    pub(crate) fn range(self, start: Start, step: u64, len: u64) -> ByteRange {
        let cluster = start.cluster;
        // Just below the border between two L2 tables, where they are small.
        let across =
            if cluster == 512 && step == 1 { 32_068 } else { cluster + cluster / 2 * (step + 1) + 100 };
        let (at, bytes) = match self {
            Self::Write4K => (cluster.max(4096) + step * 1024, 4096),
            Self::WriteCluster => (cluster * (2 + step * 3), cluster),
            Self::WriteAcross => (across, 2 * cluster + 300),
            Self::Zero => (cluster / 2 + step * cluster, 3 * cluster),
            Self::Discard => (cluster * (1 + step), 3 * cluster),
            _ => (0, 0),
        };
        // Long sequences go over the disk again and again.
        let room = start.len() - start.base();
        let range = ByteRange::at(start.base() + at % room, bytes).intersect(ByteRange::new(0, len));
        if range.is_empty() { ByteRange::at(0, 0) } else { range }
    }

    /// The length that the disk of `len` bytes gets.
    pub(crate) fn new_len(self, start: Start, step: u64, len: u64) -> u64 {
        match self {
            // At times into the next L2 table, where they are small.
            Self::Grow => len + start.cluster * if step.is_multiple_of(2) { 3 } else { 70 } + 512,
            Self::Shrink => (start.base() + (len - start.base().min(len)) / 2) / 512 * 512,
            _ => len,
        }
    }
}

/// All sequences of `len` operations that can be done to `start`. An image that is to be repaired first is.
pub(crate) fn sequences(start: Start, len: usize) -> Vec<Vec<Op>> {
    let ops: Vec<Op> = OPS.into_iter().filter(|op| op.applies_to(start)).collect();
    let mut out = vec![opening(start)];
    for _ in 0..len {
        out = out.iter().flat_map(|head| ops.iter().map(|op| [head.as_slice(), &[*op]].concat())).collect();
    }
    out
}

/// What every sequence on `start` begins with.
pub(crate) fn opening(start: Start) -> Vec<Op> {
    match start.contents {
        Contents::Damaged => vec![Op::Repair],
        _ => Vec::new(),
    }
}
