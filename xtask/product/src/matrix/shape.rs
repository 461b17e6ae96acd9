//! The shapes of images: a level on each of some axes, which levels cannot meet, and which shapes are tried.
//!
//! Each feature is tried alone with both versions and all cluster sizes, and each pair of levels that can
//! meet is in a shape of a covering array. Called by the task, which lets a program make an image of each.
//!
//! Must hold: level 0 of each axis can meet every level of the others, so that a pair can be completed.

use std::fmt;

use super::step::{Extent, Place};

/// Cluster sizes: the levels of their axis.
const CLUSTERS: [u64; 5] = [64 << 10, 512, 4 << 10, 16 << 10, 2 << 20];

/// Refcount widths: the levels of their axis.
const REFCOUNT_BITS: [u32; 7] = [16, 1, 2, 4, 8, 32, 64];

/// What an image may have, and the number of its levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    Version,
    Cluster,
    RefcountBits,
    Snapshots,
    Bitmaps,
    Compression,
    Subclusters,
    DataFile,
    LazyRefcounts,
    Backing,
    Maker,
}

const AXES: [(Axis, usize); 11] = [
    (Axis::Version, 2),
    (Axis::Cluster, CLUSTERS.len()),
    (Axis::RefcountBits, REFCOUNT_BITS.len()),
    (Axis::Snapshots, 3),
    (Axis::Bitmaps, 2),
    (Axis::Compression, 3),
    (Axis::Subclusters, 2),
    (Axis::DataFile, 3),
    (Axis::LazyRefcounts, 2),
    (Axis::Backing, 2),
    (Axis::Maker, 2),
];

/// The snapshots of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Snapshots {
    None,
    /// Two, of disks of unequal length where version 3 allows it.
    Two,
    /// The same; the first has VM state, which the active L1 table maps too, as after `snapshot -a`.
    VmState,
}

/// How the data of an image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Deflate,
    Zstd,
}

/// Where the data of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataFile {
    None,
    External,
    /// The data file is a raw image by itself.
    Raw,
}

/// An image: its level on each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape([usize; AXES.len()]);

impl Shape {
    /// Nothing special.
    const PLAIN: Self = Self([0; AXES.len()]);

    /// Of version 3, of any cluster size, and made by QEMU.
    pub(super) fn is_plain(&self) -> bool {
        self.with(Axis::Cluster, 0) == Self::PLAIN
    }

    fn level(&self, axis: Axis) -> usize {
        self.0[axis as usize]
    }

    fn with(mut self, axis: Axis, level: usize) -> Self {
        self.0[axis as usize] = level;
        self
    }

    pub(super) fn v3(&self) -> bool {
        self.level(Axis::Version) == 0
    }

    pub(super) fn cluster(&self) -> u64 {
        CLUSTERS[self.level(Axis::Cluster)]
    }

    pub(super) fn refcount_bits(&self) -> u32 {
        REFCOUNT_BITS[self.level(Axis::RefcountBits)]
    }

    pub(super) fn snapshots(&self) -> Snapshots {
        [Snapshots::None, Snapshots::Two, Snapshots::VmState][self.level(Axis::Snapshots)]
    }

    /// Two bitmaps, one of them disabled.
    pub(super) fn has_bitmaps(&self) -> bool {
        self.level(Axis::Bitmaps) == 1
    }

    pub(super) fn compression(&self) -> Compression {
        [Compression::None, Compression::Deflate, Compression::Zstd][self.level(Axis::Compression)]
    }

    pub(super) fn has_subclusters(&self) -> bool {
        self.level(Axis::Subclusters) == 1
    }

    pub(super) fn data_file(&self) -> DataFile {
        [DataFile::None, DataFile::External, DataFile::Raw][self.level(Axis::DataFile)]
    }

    pub(super) fn has_lazy_refcounts(&self) -> bool {
        self.level(Axis::LazyRefcounts) == 1
    }

    /// Over a backing file, which is shorter.
    pub(super) fn has_backing(&self) -> bool {
        self.level(Axis::Backing) == 1
    }

    /// Made here; otherwise QEMU makes it.
    pub(super) fn is_ours(&self) -> bool {
        self.level(Axis::Maker) == 1
    }

    /// The words after `-o` that make it.
    pub(super) fn options(&self) -> String {
        let compat = if self.v3() { "1.1" } else { "0.10" };
        let mut options = format!("compat={compat},cluster_size={}", self.cluster());
        if self.refcount_bits() != 16 {
            options += &format!(",refcount_bits={}", self.refcount_bits());
        }
        if self.compression() == Compression::Zstd {
            options += ",compression_type=zstd";
        }
        if self.has_subclusters() {
            options += ",extended_l2=on";
        }
        options += match self.data_file() {
            DataFile::None => "",
            DataFile::External => ",data_file=data.raw",
            DataFile::Raw => ",data_file=data.raw,data_file_raw=on",
        };
        if self.has_lazy_refcounts() {
            options += ",lazy_refcounts=on";
        }
        options
    }

    /// Length of the disk: some L2 tables where clusters are small; it ends inside a cluster.
    pub(super) fn len(&self) -> u64 {
        if self.cluster() >= 2 << 20 { (9 << 20) + 512 } else { (1 << 20) + 1536 }
    }

    /// Where a guest request goes.
    pub(super) fn extent(&self, place: Place) -> Extent {
        let c = self.cluster();
        let (at, len) = match place {
            // Neither end on a sector.
            Place::Across => (c / 2 + 100, 3 * c + 700),
            Place::Clusters => (c, 3 * c),
            // Nothing is allocated there at first.
            Place::Gap => (if c >= 2 << 20 { 3 * c } else { 768 << 10 }, c),
            Place::Part => (4 * c + c / 8, c / 4),
            Place::Disk => (0, self.len()),
        };
        Extent { at, len }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} compat {}",
            if self.is_ours() { "ours," } else { "QEMU's," },
            if self.v3() { "1.1" } else { "0.10" }
        )?;
        write!(f, ", clusters of {}", self.cluster())?;
        if self.refcount_bits() != 16 {
            write!(f, ", refcounts of {} bits", self.refcount_bits())?;
        }
        for (has, name) in [
            (self.snapshots() == Snapshots::Two, "snapshots"),
            (self.snapshots() == Snapshots::VmState, "snapshots with VM state"),
            (self.has_bitmaps(), "bitmaps"),
            (self.compression() == Compression::Deflate, "deflate"),
            (self.compression() == Compression::Zstd, "zstd"),
            (self.has_subclusters(), "subclusters"),
            (self.data_file() == DataFile::External, "data file"),
            (self.data_file() == DataFile::Raw, "raw data file"),
            (self.has_lazy_refcounts(), "lazy refcounts"),
            (self.has_backing(), "backing file"),
        ] {
            if has {
                write!(f, ", {name}")?;
            }
        }
        Ok(())
    }
}

/// Whether one image can have both levels, of different axes: what QEMU makes.
fn can_meet(a: (Axis, usize), b: (Axis, usize)) -> bool {
    let both = |x: fn(Axis, usize) -> bool, y: fn(Axis, usize) -> bool| {
        (x(a.0, a.1) && y(b.0, b.1)) || (x(b.0, b.1) && y(a.0, a.1))
    };
    let v2 = |axis, level| axis == Axis::Version && level == 1;
    let needs_v3 = |axis, level| match axis {
        Axis::RefcountBits | Axis::Bitmaps | Axis::Subclusters | Axis::DataFile | Axis::LazyRefcounts => {
            level > 0
        }
        Axis::Compression => level == 2,
        _ => false,
    };
    let snapshots = |axis, level| axis == Axis::Snapshots && level > 0;
    let data_file = |axis, level| axis == Axis::DataFile && level > 0;
    !(both(v2, needs_v3)
        || both(|axis, level| axis == Axis::Subclusters && level == 1, |axis, level| {
            axis == Axis::Cluster && CLUSTERS[level] < 16 << 10
        })
        // What is shared has two references.
        || both(snapshots, |axis, level| axis == Axis::RefcountBits && REFCOUNT_BITS[level] == 1)
        || both(snapshots, data_file)
        || both(data_file, |axis, level| axis == Axis::Compression && level > 0)
        || both(|axis, level| axis == Axis::DataFile && level == 2, |axis, level| {
            axis == Axis::Backing && level == 1
        }))
}

/// Whether so many references to one cluster cannot be counted: compressed data shares clusters.
fn is_crowded(levels: &[(Axis, usize)]) -> bool {
    let has = |wanted: Axis, which: fn(usize) -> bool| {
        levels.iter().any(|(axis, level)| *axis == wanted && which(*level))
    };
    has(Axis::Snapshots, |level| level > 0)
        && has(Axis::Compression, |level| level > 0)
        && has(Axis::RefcountBits, |level| REFCOUNT_BITS[level] <= 4)
}

/// Every shape that is tried, each once.
pub(super) fn shapes() -> Vec<Shape> {
    let mut all = single_features();
    for shape in covering_array() {
        if !all.contains(&shape) {
            all.push(shape);
        }
    }
    all
}

/// Each feature alone, with both versions and all cluster sizes.
fn single_features() -> Vec<Shape> {
    let mut all = Vec::new();
    for (version, cluster) in (0..2).flat_map(|version| (0..CLUSTERS.len()).map(move |c| (version, c))) {
        let plain = Shape::PLAIN.with(Axis::Version, version).with(Axis::Cluster, cluster);
        all.push(plain);
        for (axis, levels) in &AXES[2..] {
            all.extend((1..*levels).map(|level| plain.with(*axis, level)).filter(Shape::is_possible));
        }
    }
    all
}

impl Shape {
    fn levels(&self) -> impl Iterator<Item = (Axis, usize)> {
        AXES.iter().map(|(axis, _)| *axis).zip(self.0)
    }

    fn is_possible(&self) -> bool {
        let levels: Vec<_> = self.levels().collect();
        let meets =
            |(index, a): (usize, &(Axis, usize))| levels[index + 1..].iter().all(|b| can_meet(*a, *b));
        levels.iter().enumerate().all(meets) && !is_crowded(&levels)
    }
}

/// Two levels, of the axes with these indices, the lower first.
type Pair = ((usize, usize), (usize, usize));

/// The pairs of levels that can meet.
fn pairs() -> Vec<Pair> {
    let levels =
        || AXES.iter().enumerate().flat_map(|(axis, (_, levels))| (0..*levels).map(move |l| (axis, l)));
    levels()
        .flat_map(|a| levels().map(move |b| (a, b)))
        .filter(|(a, b)| a.0 < b.0 && can_meet((AXES[a.0].0, a.1), (AXES[b.0].0, b.1)))
        .collect()
}

/// Shapes that have each of [`pairs`] at least once. Each begins with a pair that none before it has; its
/// further levels are those that add the most new pairs.
fn covering_array() -> Vec<Shape> {
    let mut uncovered = pairs();
    let mut rows = Vec::new();
    while let Some(&(first, second)) = uncovered.first() {
        let mut chosen = vec![first, second];
        for (axis, (name, levels)) in AXES.iter().enumerate() {
            if axis == first.0 || axis == second.0 {
                continue;
            }
            let named: Vec<_> = chosen.iter().map(|(axis, level)| (AXES[*axis].0, *level)).collect();
            let possible = (0..*levels).filter(|level| {
                named.iter().all(|other| can_meet((*name, *level), *other))
                    && !is_crowded(&[&named[..], &[(*name, *level)]].concat())
            });
            let gain = |level: usize| {
                let pair = |other: &(usize, usize)| {
                    if axis < other.0 { ((axis, level), *other) } else { (*other, (axis, level)) }
                };
                chosen.iter().filter(|other| uncovered.contains(&pair(other))).count()
            };
            // The lowest of equals; level 0 is always possible.
            let best = possible.rev().max_by_key(|level| gain(*level)).unwrap_or(0);
            chosen.push((axis, best));
        }
        let mut shape = Shape::PLAIN;
        chosen.iter().for_each(|(axis, level)| shape.0[*axis] = *level);
        uncovered.retain(|(a, b)| !(shape.0[a.0] == a.1 && shape.0[b.0] == b.1));
        rows.push(shape);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_0_can_meet_every_level() {
        for (axis, levels) in AXES {
            for (other, _) in AXES.into_iter().filter(|(other, _)| *other != axis) {
                assert!((0..levels).all(|level| can_meet((axis, level), (other, 0))), "{axis:?} {other:?}");
            }
        }
    }

    #[test]
    fn the_array_covers_each_pair_with_possible_shapes() {
        let rows = covering_array();
        assert!(rows.iter().all(Shape::is_possible));
        for (a, b) in pairs() {
            let has = |row: &Shape| row.0[a.0] == a.1 && row.0[b.0] == b.1;
            assert!(rows.iter().any(has), "{:?} {} with {:?} {}", AXES[a.0].0, a.1, AXES[b.0].0, b.1);
        }
        // At least as many as the longest two axes have pairs; not one for each pair.
        assert!((35..70).contains(&rows.len()), "{} rows", rows.len());
    }

    #[test]
    fn axes_are_in_the_order_of_their_indices() {
        assert!(AXES.iter().enumerate().all(|(index, (axis, _))| *axis as usize == index));
    }
}
