//! What the tests of the whole and the developer commands share: QEMU's tools as the oracle, scratch folders
//! in memory, disk contents that tell where they belong, and the images under `testdata/`.
//!
//! Called by the files in `tests/tests/` and by `xtask`. Nothing here but [`live`] knows the crates under
//! test, so that an error in them cannot hide in the judge.

pub mod content;
pub mod live;
pub mod matrix;
pub mod mutate;
pub mod qemu;
pub mod resident;
pub mod rng;
pub mod scratch;
pub mod testdata;

use std::error::Error;
use std::fmt;
use std::io::Write as _;
use std::path::PathBuf;

/// The result of a helper; the message names the file or the command.
pub type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// The folder that holds the workspace.
pub fn workspace_root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// Prints a figure that a reader of the test run wants to see, past the runner's capture.
pub fn report(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The example of README.md, so that it is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
