//! The bitmaps against naive models.

mod chunk;
mod dirty;
mod size;
