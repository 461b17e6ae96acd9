//! Host files and block devices as [`Storage`](blockmirror_block::Storage).
//!
//! | type | what it is |
//! |---|---|
//! | [`FileOptions`] | how to open: writable, new, direct, with which image lock |
//! | [`FileStorage`] | an open file or block device |
//! | [`NewFile`] | a file under a temporary name, renamed into place once it is durable |
//! | [`PathHandle`] | a file that is found and not opened yet, to decide about |
//! | [`TargetPlan`] | decides how a target is written: new, replaced, in place; opens it as a [`TargetFile`] |
//! | [`FileId`] | which file it is, whatever name it was opened by |
//!
//! The crate does system calls and nothing else: it knows no image format. Data goes straight between the
//! caller's buffer and `pread`/`pwrite`; holes come from `SEEK_DATA`/`SEEK_HOLE`, zeroing and discarding from
//! `fallocate`, sharing of blocks between files from `FICLONERANGE`. Each open file holds an image lock
//! ([`blockmirror_image_lock`]) by default.
//!
//! ```
//! use blockmirror_block::{ByteRange, Storage, ZeroFlags};
//! use blockmirror_file::{Existing, FileOptions, NewFile};
//!
//! # fn main() -> blockmirror_block::Result<()> {
//! # let dir = tempfile::tempdir().map_err(|e| blockmirror_block::Error::io("create", e))?;
//! let path = dir.path().join("disk.raw");
//! let new = NewFile::create(&path, Existing::Refuse, &FileOptions::new())?;
//! new.storage().write_at(b"boot", 0)?;
//! new.storage().write_zeroes(ByteRange::new(4, 1 << 20), ZeroFlags::MAY_UNMAP)?;
//! assert!(!path.exists());
//! new.persist()?;
//!
//! let disk = FileOptions::new().open(&path)?;
//! let mut start = [0; 6];
//! disk.read_at(&mut start, 0)?;
//! assert_eq!(&start, b"boot\0\0");
//! # Ok(())
//! # }
//! ```

mod below;
mod carry;
mod claim;
mod device_stamp;
mod direct;
mod exclusive;
mod flushes;
mod from_fd;
mod growth;
mod handle;
mod holders;
mod holes;
mod id;
mod io;
mod leftover;
mod location;
mod long_write_gate;
mod mounts;
mod new_file;
mod open;
mod owner;
mod partial;
mod past_cache;
mod reflink;
mod space;
mod stamp;
mod storage;
mod target;
mod trial;
mod zeroes;

pub use device_stamp::DeviceStamp;
pub use handle::PathHandle;
pub use holders::{FileHolder, LoopUse};
pub use id::FileId;
pub use leftover::Leftover;
pub use new_file::{Existing, NewFile};
pub use open::{FileOptions, LockMode};
pub use past_cache::PastCache;
pub use space::FreeSpace;
pub use stamp::FileStamp;
pub use storage::FileStorage;
pub use target::{Decision, InPlace, Replacement, Surprise, TargetFile, TargetOptions, TargetPlan};
