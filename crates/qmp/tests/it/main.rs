//! The integration tests of this crate, in one program.

mod client;
mod keyval;
mod reference;
mod sessions;
mod storm;
mod stream;
