//! Bitmaps over very large disks.
//!
//! | type | what it is |
//! |---|---|
//! | [`ChunkBitmap`] | a set of chunk numbers, as a 64-way tree whose uniform parts own no memory |
//! | [`DirtyBitmap`] | the dirty bytes of a disk, kept at a granularity |
//! | [`Cursor`] | a walk over the dirty runs of a bitmap that changes meanwhile |
//!
//! In the tree, every subtree that is all clear or all set is two bits in its parent; only mixed ones are
//! nodes. A disk of 8 TiB at 4 KiB therefore costs some hundred bytes whether it is all clean or all dirty,
//! and finding the next dirty or clean granule in it looks at one word per level (six of them). With 1 %
//! dirty in runs of 64 MiB it costs 2 MiB. The worst case is something dirty and something clean in each
//! stretch of 4096 granules: less than 600 bytes for each, which is 36 MiB for 1 TiB at 4 KiB and 300 MiB for
//! 8 TiB. Who must not spend that takes a coarser granularity for a longer disk, as the mirror job does: it
//! stays below 40 MiB a bitmap ([`affordable_granularity`]).
//!
//! The crate is pure: no I/O, no locks, no clock, no dependencies. A mirror job keeps its bitmap inside the
//! mutex of its core.
//!
//! ```
//! use blockmirror_bitmap::DirtyBitmap;
//!
//! let mut dirty = DirtyBitmap::new(8 << 40, 4096)?;
//! dirty.set(10_000..10_001);
//! assert_eq!(dirty.dirty_bytes(), 4096);
//! let run = dirty.next_dirty(0, 1 << 20).unwrap_or_default();
//! assert_eq!(run, 8192..12288);
//! dirty.clear(run);
//! assert_eq!(dirty.next_dirty(0, 1 << 20), None);
//! # Ok::<(), blockmirror_bitmap::GranularityError>(())
//! ```

#![forbid(unsafe_code)]

mod chunk;
mod dirty;
mod leaf;
mod serial;
#[cfg(test)]
mod tests;
mod tree;

pub use chunk::ChunkBitmap;
pub use dirty::{
    Cursor, DirtyBitmap, GranularityError, MAX_GRANULARITY, MIN_GRANULARITY, affordable_granularity,
    worst_case_bytes,
};
