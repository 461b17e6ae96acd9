//! The integration tests of this crate, in one program.

mod chain;
mod compare;
mod create;
mod in_place;
mod inspect;
mod inspect_caps;
mod open_storage;
