//! The qcow2 image format.
//!
//! [`mod@format`] holds the structures, pure: bytes in, typed values out. [`error`] and [`limits`] say what
//! is refused and why.

mod backing;
mod cache;
mod compressed;
mod context;
mod copy_up;
mod create;
mod cut_short;
mod damage;
mod decompress;
mod dirty;
pub mod error;
mod extents;
pub mod format;
mod holes;
mod image;
pub mod limits;
mod meta;
pub mod offset;
pub mod options;
mod overlap;
mod provide;
mod read;
mod refcounts;
mod reopen;
mod resize;
mod stop;
mod unfinished;
mod verify;
mod write;
mod writeback;
mod zero;
mod zero_query;

pub use create::{CreateOptions, Preallocation, Version};
pub use cut_short::CutShort;
pub use damage::Damage;
pub use error::{Error, Result, WriteRefusal};
pub use format::header::{BackingRef, Compression, DataFileRef, FileName, Header};
pub use image::{DEFAULT_CACHE_BYTES, OpenOptions, Qcow2};
pub use read::{ReadGuard, ReadRun, ReadSource};
pub use unfinished::Unfinished;
pub use write::{WriteGuard, WriteRun};
