//! Host files and block devices as [`Storage`](blockmirror_block::Storage).
//!
//! | type | what it is |
//! |---|---|
//! | [`FileOptions`] | how to open: writable, new, direct, with which image lock |
//! | [`FileStorage`] | an open file or block device |
//! | [`NewFile`] | a file under a temporary name, renamed into place once it is durable |
//! | [`FileId`] | which file it is, whatever name it was opened by |
//!
//! The crate does system calls and nothing else: it knows no image format. Data goes straight between the
//! caller's buffer and `pread`/`pwrite`; holes come from `SEEK_DATA`/`SEEK_HOLE`, zeroing and discarding from
//! `fallocate`, copies between files from `copy_file_range`. Each open file holds an image lock
//! ([`blockmirror_image_lock`]) unless told not to.

mod copy;
mod direct;
mod flush;
mod holes;
mod io;
mod new_file;
mod open;
mod storage;
mod zeroes;

pub use new_file::{Existing, NewFile};
pub use open::{FileOptions, LockMode};
pub use storage::{FileId, FileStorage};
