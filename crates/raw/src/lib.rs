//! A [`Storage`](blockmirror_block::Storage) as a disk, byte for byte.
//!
//! A disk, or what another format lives in, may also be a part of a storage: [`StoragePart`].
//!
//! The raw format has no header: disk offset is storage offset. What this crate adds is what a disk promises
//! and a run of bytes does not: a length in whole sectors, bounds, holes as extents, durable writes. And one
//! refusal: a disk that was only *guessed* to be raw must not be made to look like another format by its
//! guest.
//!
//! ```
//! use std::sync::Arc;
//! use blockmirror_block::{BlockDevice, Storage};
//! use blockmirror_file::FileOptions;
//! use blockmirror_raw::{Raw, RawOptions};
//!
//! # fn main() -> blockmirror_block::Result<()> {
//! # let dir = tempfile::tempdir().map_err(|e| blockmirror_block::Error::io("create", e))?;
//! let file = FileOptions::new().create_new(true).open(dir.path().join("disk.raw"))?;
//! file.set_len(1000)?;
//! let disk = Raw::open(Arc::new(file), RawOptions::new())?;
//! assert_eq!(disk.len(), 1024);
//! # Ok(())
//! # }
//! ```

mod magic;
mod part;
mod raw;

pub use magic::{foreign_format, foreign_formats};
pub use part::{Part, StoragePart};
pub use raw::{Raw, RawOptions, SECTOR};
