//! Crash-safe logs of regions of a disk: those that a copy has finished, or those that a live job may lack.
//!
//! A [`Checkpoint`] divides a disk into regions and keeps, on a [`Storage`](blockmirror_block::Storage),
//! which of them are marked. A copy marks a region once a flush of its target covers it; after a crash
//! [`Checkpoint::open`] says what need not be copied again. The [`Identity`] in the file says what is
//! copied, so that a log is not used for another disk.
//!
//! An [`ActivityLog`] has the same format and the opposite meaning: a marked region may differ. A job that
//! mirrors a disk which is written meanwhile marks a region before the first write to it and clears it when
//! both disks have it durably.
//!
//! ```text
//!   +----------+----------+----------+-----------------------------+----------------------------+
//!   | header 0 | header 1 | identity | area 0: snapshot, records.. | area 1: snapshot, records..|
//!   +----------+----------+----------+-----------------------------+----------------------------+
//! ```
//!
//! A log may have a [`Digest`] of each marked region ([`Checkpoint::create_with_digests`]), which tells later
//! whether a disk that shows no times has changed. A table of them follows the areas then.
//!
//! Records are appended to one area. When it is full, a snapshot of all regions begins the other one, and the
//! header that is not in use comes to point there. Each part has a CRC, and nothing that a valid header leads
//! to is ever written over: after a crash at any instant the log is that of the last call that returned, or
//! has the marks of the one under way besides. The format is specified in `docs/checkpoint.md`.
//!
//! ```
//! use std::sync::Arc;
//! use blockmirror_block::testing::MemoryStorage;
//! use blockmirror_checkpoint::{Checkpoint, Identity};
//!
//! # fn main() -> Result<(), blockmirror_checkpoint::Error> {
//! let storage = Arc::new(MemoryStorage::new());
//! let mut identity = Identity::new();
//! identity.push("source", "disk.raw");
//! let mut log = Checkpoint::create(Arc::clone(&storage) as _, 100 << 20, 1 << 20, identity)?;
//! log.mark(&[0..7])?;
//!
//! let log = Checkpoint::open(storage)?;
//! assert_eq!(log.identity().get("source"), Some("disk.raw"));
//! assert_eq!((log.marked_bytes(), log.regions().next_clear(0)), (7 << 20, Some(7)));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod activity;
mod crc;
mod digests;
mod error;
mod header;
mod identity;
mod log;
mod marked;
mod record;

pub use activity::ActivityLog;
pub use digests::Digest;
pub use error::Error;
pub use header::{MAX_REGIONS, region_size};
pub use identity::{Identity, MAX_IDENTITY};
pub use log::Checkpoint;
