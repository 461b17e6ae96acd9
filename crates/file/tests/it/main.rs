//! The integration tests of this crate, in one program.

mod block_device;
mod files;
mod model;
mod new_file;
mod reflink;
mod set_writable;
