//! The integration tests of this crate, in one program.

mod commit;
mod commit_image;
mod common;
mod conformance;
mod convert;
mod cost;
mod power_cut;
mod region_log;
mod resume;
mod resume_in_place;
mod resume_trouble;
mod stream;
mod verify;
