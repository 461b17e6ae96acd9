//! The integration tests of this crate, in one program.

mod commit;
mod common;
mod conformance;
mod convert;
mod stream;
