//! The integration tests of this crate, in one program.

mod crash;
mod hostile;
mod log;
