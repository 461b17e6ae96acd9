//! The damages, by how far QEMU and we agree on them.

use super::image::Kind::{
    Bitmaps, Compressed, DataFile, Extended, ExtendedCompressed, Narrow, Plain, Short, Small, Snapshots,
    TwoTables, V2,
};
use super::image::{Bytes, COMPRESSED, COPIED, FAR, Kind};

/// A kind of damage: its name, the image, and the change.
pub(crate) type Damage = (&'static str, Kind, fn(&mut Bytes));

/// A check of these finds what QEMU's finds, figure by figure.
pub(crate) const SAME: &[Damage] = &[
    ("none", Plain, |_| {}),
    ("none", V2, |_| {}),
    ("none", Compressed, |_| {}),
    ("none", Extended, |_| {}),
    ("none", ExtendedCompressed, |_| {}),
    ("none", DataFile, |_| {}),
    ("none", Small, |_| {}),
    ("none", Narrow, |_| {}),
    ("none", Snapshots, |_| {}),
    ("none", Bitmaps, |_| {}),
    // Refcounts.
    ("refcount too high", Plain, |b| b.set_refcount(7, 3)),
    ("refcount too high by one", V2, |b| b.set_refcount(12, 2)),
    ("leaked cluster", Plain, |b| b.set_refcount(7, 65535)),
    ("refcount zero", Plain, |b| b.set_refcount(7, 0)),
    ("refcount zero", V2, |b| b.set_refcount(9, 0)),
    ("refcount zero of a table", Plain, |b| b.set_refcount(4, 0)),
    ("refcount of the L1 table zero", DataFile, |b| b.set_refcount(3, 0)),
    ("refcount too low, shared", Snapshots, |b| b.set_refcount_of(b.snapshot_l2() + 8, 1)),
    ("refcount too low, compressed", Compressed, |b| b.set_refcount(5, 1)),
    ("refcount saturated", Plain, |b| b.set_refcount(8, 65535)),
    ("refcounts past the end", Plain, |b| b.set_refcount(10_000, 1)),
    // Refcount structures.
    ("block misaligned", Plain, |b| b.change(b.refcount_table(), |w| w + 512)),
    ("second block misaligned", Plain, |b| b.set(b.refcount_table() + 8, 0x4_0200)),
    ("block entry with reserved bits", Plain, |b| b.change(b.refcount_table(), |w| w | 1)),
    ("second block with reserved bits", Plain, |b| b.set(b.refcount_table() + 8, 0x4_0001)),
    ("block entry with a high bit", Plain, |b| b.change(b.refcount_table(), |w| w | 1 << 60)),
    ("block past the end", Plain, |b| b.set(b.refcount_table(), FAR)),
    ("second block past the end", Plain, |b| b.set(b.refcount_table() + 8, FAR)),
    ("no block", Plain, |b| b.set(b.refcount_table(), 0)),
    ("no block", Small, |b| b.set(b.refcount_table() + 8, 0)),
    ("block twice", Plain, |b| b.set(b.refcount_table() + 8, b.get(b.refcount_table()))),
    ("block in the refcount table", Plain, |b| b.set(b.refcount_table(), b.refcount_table())),
    ("block in the L1 table", Plain, |b| b.set(b.refcount_table(), b.l1())),
    ("refcount table past the end", Plain, |b| b.set(48, FAR)),
    ("refcount table in the L1 table", Plain, |b| b.set(48, b.l1())),
    ("refcount table too long", Plain, |b| b.set_len(56, 3, 4)),
    // L1 entries.
    ("L1 entry with a low reserved bit", Plain, |b| b.change(b.l1(), |w| w | 1)),
    ("L1 entry with a high reserved bit", Plain, |b| b.change(b.l1(), |w| w | 1 << 57)),
    ("L1 entry past the end", Plain, |b| b.set(b.l1(), FAR | COPIED)),
    ("L1 entry just past the end", Plain, |b| b.set(b.l1(), b.end())),
    ("L1 entry without COPIED", Plain, |b| b.change(b.l1(), |w| w & !COPIED)),
    ("two L1 entries with one table", TwoTables, |b| b.set(b.l1() + 8, b.get(b.l1()))),
    ("L1 table past the end", Plain, |b| b.set(40, FAR)),
    ("L1 table longer than the disk", Plain, |b| b.set_len(36, 1000, 4)),
    // L2 entries.
    ("L2 entry with a low reserved bit", Plain, |b| b.change(b.l2(), |w| w | 2)),
    ("L2 entry with a high reserved bit", Plain, |b| b.change(b.l2(), |w| w | 1 << 57)),
    ("empty L2 entry with a reserved bit", Plain, |b| b.set(b.l2() + 800, 2)),
    ("L2 entry misaligned", Plain, |b| b.change(b.l2(), |w| w + 512)),
    ("zero L2 entry misaligned", Plain, |b| b.change(b.l2(), |w| (w + 512) | 1)),
    ("L2 entry past the end", Plain, |b| b.set(b.l2(), FAR | COPIED)),
    ("L2 entry just past the end", Plain, |b| b.set(b.l2(), b.end())),
    ("L2 entry behind the disk, past the end", Short, |b| b.set(b.l2() + 800, FAR)),
    ("L2 entry behind the disk", Short, |b| b.set(b.l2() + 800, b.get(b.l2()))),
    ("L2 entry with COPIED alone", Plain, |b| b.set(b.l2() + 800, COPIED)),
    ("zero L2 entry with COPIED", Plain, |b| b.set(b.l2() + 800, COPIED | 1)),
    ("two entries on a cluster", Plain, |b| b.set(b.l2() + 160, b.get(b.l2()))),
    ("two entries on a cluster", Small, |b| b.set(b.l2() + 160, b.get(b.l2()))),
    ("two entries on a cluster, as they should be", Plain, |b| {
        b.change(b.l2(), |w| w & !COPIED);
        b.set(b.l2() + 160, b.get(b.l2()));
        b.set_refcount_of(b.l2(), 2);
    }),
    ("entry on an L2 table", Plain, |b| b.set(b.l2() + 160, b.l2() | COPIED)),
    ("entry on the L1 table", Plain, |b| b.set(b.l2() + 160, b.l1() | COPIED)),
    ("entry on a refcount block", Plain, |b| b.set(b.l2() + 160, b.refcount_block() | COPIED)),
    ("entry on the refcount table", Plain, |b| b.set(b.l2() + 160, b.refcount_table() | COPIED)),
    ("L2 entry without COPIED", Plain, |b| b.change(b.l2(), |w| w & !COPIED)),
    ("zero flag in version 2", V2, |b| b.change(b.l2(), |w| w | 1)),
    ("compressed with COPIED", Compressed, |b| b.change(b.l2(), |w| w | COPIED)),
    ("compressed past the end", Compressed, |b| b.set(b.l2(), COMPRESSED | FAR)),
    ("compressed far away", Compressed, |b| b.set(b.l2(), u64::MAX >> 1)),
    // Subclusters.
    ("subcluster with both bits", Extended, |b| b.change(b.l2() + 8, |w| w | 1 << 32)),
    ("subclusters without a cluster", Extended, |b| b.set(b.l2() + 328, 3)),
    ("both bits without a cluster", Extended, |b| b.set(b.l2() + 328, 3 << 32 | 1)),
    ("cluster without subclusters", Extended, |b| b.set(b.l2() + 8, 0)),
    ("misaligned with subclusters", Extended, |b| b.change(b.l2(), |w| w + 512)),
    ("misaligned without subclusters", Extended, |b| {
        b.change(b.l2(), |w| w + 512);
        b.set(b.l2() + 8, 0);
    }),
    // Data files.
    ("compressed with a data file", DataFile, |b| b.set(b.l2(), COMPRESSED | 0x5_0000)),
    ("no COPIED with a data file", DataFile, |b| b.change(b.l2() + 8, |w| w & !COPIED)),
    ("another offset in a data file", DataFile, |b| b.change(b.l2() + 8, |w| w + 0x10_0000)),
    ("misaligned in a data file", DataFile, |b| b.change(b.l2() + 8, |w| w + 512)),
    // Snapshots.
    ("snapshot's L1 table misaligned", Snapshots, |b| b.change(b.snapshot(), |w| w + 512)),
    ("snapshot's L1 table past the end", Snapshots, |b| b.set(b.snapshot(), FAR)),
    ("snapshot's L1 table in the header", Snapshots, |b| b.set(b.snapshot(), 0)),
    ("snapshot's L1 table absurd", Snapshots, |b| b.set_len(b.snapshot() + 8, FAR, 4)),
    ("snapshot's L1 table longer", Snapshots, |b| b.set_len(b.snapshot() + 8, 100, 4)),
    ("snapshot's L1 table empty", Snapshots, |b| b.set_len(b.snapshot() + 8, 0, 4)),
    ("snapshot's L1 entry with a reserved bit", Snapshots, |b| b.change(b.snapshot_l1(), |w| w | 1)),
    ("snapshot's L1 entry past the end", Snapshots, |b| b.set(b.snapshot_l1(), FAR)),
    ("snapshot's L1 entry with COPIED", Snapshots, |b| b.change(b.snapshot_l1(), |w| w | COPIED)),
    ("snapshot's L2 entry with a reserved bit", Snapshots, |b| b.change(b.snapshot_l2(), |w| w | 2)),
    ("snapshot's zero L2 entry misaligned", Snapshots, |b| b.change(b.snapshot_l2() + 8, |w| (w + 512) | 1)),
    ("snapshot's L2 entry past the end", Snapshots, |b| b.set(b.snapshot_l2(), FAR)),
    ("a snapshot less", Snapshots, |b| b.set_len(60, 1, 4)),
    ("a snapshot more", Snapshots, |b| b.set_len(60, 3, 4)),
    ("snapshot table misaligned", Snapshots, |b| b.set(64, b.snapshot() + 512)),
    ("snapshots absurd", Snapshots, |b| b.set_len(60, 0x2_0000, 4)),
    // Bitmaps.
    ("bitmap table past the end", Bitmaps, |b| b.set(b.bitmap_directory(), FAR)),
    ("bitmap data past the end", Bitmaps, |b| b.set(b.bitmap_table(), FAR)),
    ("bitmaps not valid", Bitmaps, |b| b.set(88, 0)),
    ("bitmap in use", Bitmaps, |b| b.set_len(b.bitmap_directory() + 12, 3, 4)),
    ("bitmap table refcount", Bitmaps, |b| b.set_refcount(b.bitmap_table() >> 16, 0)),
    // Header and file.
    ("dirty", Plain, |b| b.set(72, 1)),
    ("dirty, refcount zero", Plain, |b| {
        b.set(72, 1);
        b.set_refcount(7, 0);
    }),
    ("marked corrupt", Plain, |b| b.set(72, 2)),
    ("cut", Plain, |b| b.0.truncate(b.0.len() - 200_000)),
    ("cut inside the last cluster", Plain, |b| b.0.truncate(b.0.len() - 1000)),
    ("L1 size too small", TwoTables, |b| b.set_len(36, 1, 4)),
    ("L1 size absurd", Plain, |b| b.set_len(36, FAR, 4)),
    ("L1 offset misaligned", Plain, |b| b.set(40, b.l1() + 512)),
    ("backing name absurd", Plain, |b| {
        b.set(8, 0x200);
        b.set_len(16, 5000, 4);
    }),
];

/// Of these the verdict is QEMU's, and figures differ: QEMU also takes for tables what is none (a misaligned
/// table, the header), or for entries what lies past the end of the file; it does not count compressed data
/// that can be read, takes a refcount of one for that of one reference where it can say no more, and reads
/// what a cut refcount table lacks as zeros.
pub(crate) const SAME_VERDICT: &[Damage] = &[
    ("L1 entry misaligned", Plain, |b| b.change(b.l1(), |w| w + 512)),
    ("L1 entry in the header", Plain, |b| b.set(b.l1(), COPIED)),
    ("snapshot's L1 entry misaligned", Snapshots, |b| b.change(b.snapshot_l1(), |w| w + 512)),
    ("snapshot's L1 table over all of the file", Snapshots, |b| b.set_len(b.snapshot() + 8, 4_000_000, 4)),
    ("refcount table in the header", Plain, |b| b.set(48, 0)),
    ("cut behind the tables", Plain, |b| b.0.truncate(70_000)),
    ("no refcount table", Plain, |b| b.set_len(56, 0, 4)),
    ("snapshot table past the end", Snapshots, |b| b.set(64, FAR)),
    ("snapshot's name absurd", Snapshots, |b| b.set_len(b.snapshot() + 12, 60_000, 2)),
    ("more references than a bit can say", Narrow, |b| b.set(b.l2() + 160, b.get(b.l2()))),
    ("compressed run past the end", Compressed, |b| b.set(b.l2(), COMPRESSED | 255 << 54 | (b.len() - 100))),
    ("compressed with subclusters", Extended, |b| {
        b.set(b.l2(), COMPRESSED | 0x5_0000);
        b.set(b.l2() + 8, 5);
    }),
    ("a compressed cluster with subclusters", ExtendedCompressed, |b| b.set(b.l2() + 8, 5)),
    ("more sectors than there are", ExtendedCompressed, |b| b.change(b.l2() + 48, |w| w | 255 << 54)),
];

/// These QEMU does not open or check. Some of them it repairs all the same.
pub(crate) const NOT_FOR_QEMU: &[Damage] = &[
    ("refcount table misaligned", Plain, |b| b.set(48, b.refcount_table() + 512)),
    ("refcount table absurd", Plain, |b| b.set_len(56, 0x10_0000, 4)),
    ("snapshot's extra data too long", Snapshots, |b| b.set_len(b.snapshot() + 36, 5000, 4)),
    ("snapshot's extra data absurd", Snapshots, |b| b.set_len(b.snapshot() + 36, 0xffff_ff00, 4)),
    ("snapshot without extra data", Snapshots, |b| b.set_len(b.snapshot() + 36, 0, 4)),
    ("bitmap type", Bitmaps, |b| b.set_len(b.bitmap_directory() + 16, 2, 1)),
    ("bitmap flags", Bitmaps, |b| b.set_len(b.bitmap_directory() + 12, 0xf8, 4)),
    ("bitmap granularity", Bitmaps, |b| b.set_len(b.bitmap_directory() + 17, 3, 1)),
    ("bitmap table misaligned", Bitmaps, |b| b.change(b.bitmap_directory(), |w| w + 512)),
    ("bitmap table in the header", Bitmaps, |b| b.set(b.bitmap_directory(), 0)),
    ("bitmap table too long", Bitmaps, |b| b.set_len(b.bitmap_directory() + 8, 100_000, 4)),
    ("bitmap entry with a reserved bit", Bitmaps, |b| b.change(b.bitmap_table(), |w| w | 2)),
    ("bitmap entry misaligned", Bitmaps, |b| b.change(b.bitmap_table(), |w| w + 512)),
    ("bitmap name absurd", Bitmaps, |b| b.set_len(b.bitmap_directory() + 18, 5000, 2)),
    ("two bitmaps with one name", Bitmaps, |b| b.set_len(b.bitmap_directory() + 24, 0x31, 1)),
    ("bitmap directory too short", Bitmaps, |b| b.change(b.bitmaps() + 8, |w| w - 8)),
    ("bitmap directory past the end", Bitmaps, |b| b.set(b.bitmaps() + 16, FAR)),
    ("a bitmap more", Bitmaps, |b| b.set_len(b.bitmaps(), 3, 4)),
    ("a bitmap less", Bitmaps, |b| b.set_len(b.bitmaps(), 1, 4)),
];
