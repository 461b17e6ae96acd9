//! The format's structures: bytes in, typed values out, no I/O except in [`header::Header::read`] and the
//! readers of the two directories. The engine builds on these; everything an image says is checked here
//! first.

pub mod bitmap_name;
pub mod bitmaps;
pub mod entry;
pub mod extension;
pub mod feature;
mod field;
pub mod header;
pub mod refcount;
pub(crate) mod relist;
pub(crate) mod rewrite;
pub mod snapshot;
