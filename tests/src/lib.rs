//! What the tests of the whole and the developers' commands share: the stress test of live mirrors (`cargo
//! xtask stress`), reading damaged images beside QEMU (`cargo xtask fuzz mutants`), and the example of
//! README.md, so that it is compiled.

pub mod live;
pub mod mutant;

/// README.md.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
