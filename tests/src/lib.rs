//! What the tests of the whole and the developer commands share beyond `blockmirror_testing`: disk contents
//! that tell where they belong, mutations of images, and the images under `testdata/`.
//!
//! Called by the programs in `tests/tests/` and by `xtask`. Nothing here but [`live`] knows the crates under
//! test, so that an error in them cannot hide in the judge.

pub mod content;
pub mod live;
pub mod matrix;
pub mod mutate;
pub mod testdata;

use std::path::PathBuf;

/// The folder that holds the workspace.
pub fn workspace_root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// The example of README.md, so that it is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
