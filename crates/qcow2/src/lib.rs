//! The qcow2 image format.
//!
//! [`format`] holds the structures, pure: bytes in, typed values out. [`error`] and [`limits`] say what is refused
//! and why.

pub mod error;
pub mod format;
pub mod limits;
pub mod offset;

pub use error::{Error, Result, WriteRefusal};
pub use format::header::{BackingRef, Compression, DataFileRef, FileName, Header};
