//! The integration tests of this crate, in one program.

mod activity;
mod crash;
mod digests;
mod hostile;
mod log;
