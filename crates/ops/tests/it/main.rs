//! The integration tests of this crate, in one program.

mod commit;
mod common;
mod convert;
mod stream;
