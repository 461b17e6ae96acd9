//! The operations that sequences are made of, and where in the disk each goes.

use blockmirror_block::ByteRange;
use blockmirror_qcow2::Version;

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
    /// Two whole clusters, stored compressed where they become smaller.
    WriteCompressed,
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
    /// The image is closed without a flush, which stores its bitmaps, and opened again.
    Close,
    /// A writer with lazy refcounts is killed: the image is marked dirty, and its refcounts lag behind. It is
    /// opened for writing then.
    OpenDirty,
    /// What the image holds goes to its backing file, and the image is emptied.
    Commit,
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
    /// A persistent bitmap is made.
    AddBitmap,
    /// The first bitmap is removed.
    RemoveBitmap,
    /// The first bitmap is disabled if it records, and enabled if it does not.
    ToggleBitmap,
    /// The bits of the first bitmap are set in the last one.
    MergeBitmap,
    /// The bitmaps are stored, and the image stays open.
    StoreBitmaps,
}

/// All of them.
pub const OPS: [Op; 25] = [
    Op::Write4K,
    Op::WriteCluster,
    Op::WriteAcross,
    Op::WriteCompressed,
    Op::Zero,
    Op::Discard,
    Op::Flush,
    Op::Grow,
    Op::Shrink,
    Op::Rename,
    Op::Repair,
    Op::Kill,
    Op::Close,
    Op::OpenDirty,
    Op::Commit,
    Op::AmendVersion,
    Op::AmendWidth,
    Op::Snapshot,
    Op::Apply,
    Op::DeleteSnapshot,
    Op::AddBitmap,
    Op::RemoveBitmap,
    Op::ToggleBitmap,
    Op::MergeBitmap,
    Op::StoreBitmaps,
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
            Self::Snapshot | Self::Apply | Self::DeleteSnapshot | Self::WriteCompressed => {
                start.data == DataPlace::Inside
            }
            Self::Commit => start.backed,
            Self::OpenDirty => start.version == Version::V3,
            // Refused in version 2, but that may be amended.
            Self::AddBitmap => true,
            other => start.version == Version::V3 || !other.needs_bitmap(),
        }
    }

    /// Whether it does something only if there is a bitmap.
    pub(crate) fn needs_bitmap(self) -> bool {
        matches!(self, Self::RemoveBitmap | Self::ToggleBitmap | Self::MergeBitmap | Self::StoreBitmaps)
    }

    /// Whether it closes the image.
    pub(crate) fn closes(self) -> bool {
        matches!(self, Self::Close | Self::OpenDirty | Self::Repair | Self::AmendVersion | Self::AmendWidth)
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
            Self::WriteCompressed => (cluster * (3 + step * 2), 2 * cluster),
            Self::Zero => (cluster / 2 + step * cluster, 3 * cluster),
            Self::Discard => (cluster * (1 + step), 3 * cluster),
            _ => (0, 0),
        };
        // Long sequences go over the disk again and again.
        let room = start.len() - start.base();
        let mut range = ByteRange::at(start.base() + at % room, bytes).intersect(ByteRange::new(0, len));
        if self == Self::WriteCompressed {
            // The end of the disk ends a cluster.
            let end = if range.end() == len { len } else { range.end() / cluster * cluster };
            let begin = range.start() / cluster * cluster;
            range = ByteRange::new(begin, end.max(begin));
        }
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
