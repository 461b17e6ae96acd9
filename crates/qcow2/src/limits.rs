//! Named caps on everything that an image declares about its own size.
//!
//! A parser compares with the cap *before* it allocates or loops; the error names the field, its value and
//! the cap. The values are those that QEMU's writers stay within, so that no image in use is refused.

/// The four bytes that every image starts with: `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;

/// The version in the header of an image that is being written in place: no version of the format, so that no
/// reader takes the image for whole.
pub const VERSION_UNFINISHED: u32 = 0xffff_fffe;

/// Smallest cluster that can have 32 subclusters of at least 512 bytes: 16 KiB.
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Host offsets are below this (bits 9 to 55 of a table entry).
pub const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Bytes of an L1 table, active or of a snapshot.
pub const MAX_L1_BYTES: u64 = 32 << 20;

/// Bytes of the refcount table.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Width of a refcount entry: 2^6 = 64 bits.
pub const MAX_REFCOUNT_ORDER: u32 = 6;

/// Bytes of the name of a backing file.
pub const MAX_BACKING_NAME: u32 = 1023;

/// Bytes of the name of a backing file's format.
pub const MAX_BACKING_FORMAT: usize = 15;

/// Internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;

/// Bytes of the snapshot table.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;

/// Bytes of the shortest entry of the snapshot table: its fixed part.
pub(crate) const MIN_SNAPSHOT_ENTRY: u64 = 40;

/// Bytes of extra data in one entry of the snapshot table.
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;

/// Persistent bitmaps.
pub const MAX_BITMAPS: u32 = 65535;

/// Bytes of the bitmap directory.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;

/// Bytes of a bitmap's name.
pub const MAX_BITMAP_NAME: usize = 1023;

/// Bytes of the bits of one persistent bitmap, as its table says.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;

/// Bytes of the tables of all persistent bitmaps of an image together, where it is opened for writing.
pub const MAX_BITMAP_TABLES_BYTES: u64 = 64 << 20;

/// Bytes of stored bits that are loaded when an image is opened for writing, of all bitmaps that record. In
/// memory they take up to a fifth more; bits that are all clear or all set are not stored and take nothing.
pub const MAX_LOADED_BITMAP_BYTES: u64 = 1 << 30;

/// Finest and coarsest granularity of a persistent bitmap, as powers of two.
pub const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
