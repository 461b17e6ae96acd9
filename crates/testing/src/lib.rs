//! What the tests of all crates and the developers' commands share: QEMU's tools as the oracle, visible
//! skips, scratch directories in memory, disk contents that tell where they belong, the images under
//! `testdata/`, mutations of images, images that cost time and what they may cost, child processes with
//! default signal dispositions, loop devices and file systems on them.
//!
//! A dev-dependency by path, never published. It depends on no crate under test, so that an error in one of
//! them cannot hide in the oracle.

pub mod bounds;
pub mod content;
pub mod hostile;
mod loop_device;
mod loop_fs;
pub mod matrix;
pub mod mutate;
pub mod process;
pub mod qemu;
pub mod resident;
pub mod scratch;
pub mod testdata;
mod wait;

use std::error::Error;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

pub use loop_device::LoopDevice;
pub use loop_fs::LoopFs;
pub use wait::eventually;

/// The result of a helper; the message names the file or the command.
pub type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// The directory that holds the workspace.
pub fn workspace_root() -> PathBuf {
    // This crate lies in `crates/testing/`.
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_owned()
}

/// Prints a line past the test runner's capture, which takes what `eprintln!` prints.
pub fn report(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Reports that `test` is skipped because of `why`.
///
/// # Panics
/// If `BLOCKMIRROR_REQUIRE_QEMU` is `1`: then nothing may be skipped.
pub fn skip(test: &str, why: fmt::Arguments<'_>) {
    let required = std::env::var_os("BLOCKMIRROR_REQUIRE_QEMU").is_some_and(|value| value == "1");
    assert!(!required, "{test}: skipped, although BLOCKMIRROR_REQUIRE_QEMU=1: {why}");
    report(format_args!("SKIPPED {test}: {why}"));
}

/// Reports that a part of a test is skipped because the machine does not support it: loop devices, mounts,
/// other users, a file system's feature. Unlike [`skip`] it is never refused: no package adds these.
pub fn skip_unsupported(why: fmt::Arguments<'_>) {
    report(format_args!("SKIPPED: {why}"));
}
