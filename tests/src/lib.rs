//! The stress test of live mirrors that the tests of the whole and `cargo xtask stress` share, and the
//! example of README.md, so that it is compiled.

pub mod live;

/// README.md.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
