//! The vocabulary of disks.
//!
//! Everything above this crate speaks in these words:
//!
//! | word | what it is |
//! |---|---|
//! | [`BlockDevice`] | a virtual disk: fixed length, positional reads and writes, zeroing, extents |
//! | [`Storage`] | what a format lives in: a growable run of bytes, usually a host file |
//! | [`Extent`] | one maximal run of a disk with the same answer to "what is here?" |
//! | [`ByteRange`] | a half-open range of bytes |
//! | [`Geometry`] | cluster size, alignments and what zeroing costs |
//! | [`Error`] | a kind for machines; operation, file, offset and cause for people |
//!
//! Devices are synchronous, positional (`&self`) and thread-safe. Callers bring threads; devices bring no
//! runtime. [`cancel`] ends the calls of one caller. [`RangeLock`] orders overlapping operations,
//! [`GroupCommit`] joins flushes, [`zero`] finds runs of zeros, and [`testing`] holds the in-memory,
//! recording and fault-injecting doubles that every crate above is tested with.
//!
//! ```text
//!    guest, job, server          read_at, write_at, write_zeroes, discard, flush, extents
//!             |
//!        BlockDevice             a disk: filters and formats stand on each other
//!             |
//!         Storage                bytes of a host file, a block device or an export
//! ```
//!
//! ```
//! use blockmirror_block::{BlockDevice, ByteRange, Visit, WriteFlags, testing::MemoryDisk};
//!
//! let disk = MemoryDisk::new(1 << 20);
//! disk.write_at(b"boot", 64 << 10, WriteFlags::NONE)?;
//! let mut found = Vec::new();
//! disk.extents(ByteRange::new(0, disk.len()), &mut |extent| {
//!     if !extent.reads_as_zero() {
//!         found.push(extent.range);
//!     }
//!     Visit::Continue(())
//! })?;
//! assert!(found.iter().any(|range| range.contains(64 << 10)));
//! # Ok::<(), blockmirror_block::Error>(())
//! ```

mod buffer;
pub mod cancel;
mod clone_units;
mod device;
mod error;
mod extent;
mod flags;
mod geometry;
mod group_commit;
mod lost;
mod range;
mod range_lock;
mod range_map;
pub mod size;
mod storage;
mod storage_event;
pub mod sync;
pub mod testing;
mod visit;
pub mod zero;

pub use buffer::AlignedBuf;
pub use clone_units::CloneUnits;
pub use device::BlockDevice;
pub use error::{BoxError, Error, ErrorKind, Result};
pub use extent::{Extent, ExtentKind, ExtentMerger, QueryBudget};
pub use flags::{WriteFlags, ZeroFlags};
pub use geometry::{Backing, DiscardEffect, Geometry, ZeroCost};
pub use group_commit::GroupCommit;
pub use lost::read_lost_as_zeros;
pub use range::ByteRange;
pub use range_lock::{RangeGuard, RangeLock};
pub use range_map::RangeMap;
pub use storage::{HostRun, Storage, StorageExtent, StorageInfo};
pub use storage_event::StorageEvent;
pub use visit::Visit;
