//! A [`Storage`](blockmirror_block::Storage) as a disk, byte for byte.
//!
//! The raw format has no header: disk offset is storage offset. What this crate adds is what a disk promises and
//! a run of bytes does not: a length in whole sectors, bounds, holes as extents, durable writes. And one refusal:
//! a disk that was only *guessed* to be raw must not be made to look like another format by its guest.

mod magic;
mod raw;

pub use magic::foreign_format;
pub use raw::{Raw, RawOptions, SECTOR};
