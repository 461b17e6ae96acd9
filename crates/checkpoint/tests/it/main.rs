//! The integration tests of this crate, in one program.

mod activity;
mod crash;
mod hostile;
mod log;
