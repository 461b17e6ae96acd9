//! The integration tests of this crate, in one program.

mod block_device;
mod files;
mod model;
mod new_file;
mod set_writable;
