//! QEMU's tools as the oracle of this crate's tests, on files of one directory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::path::Path;

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::run;
use serde_json::Value;

/// Runs `qemu-img` in `dir`; returns its output.
pub(crate) fn img(dir: &Path, args: &[&str]) -> Outcome<String> {
    run("qemu-img", dir, args)
}

/// Runs `qemu-io` commands on an image in `dir`.
pub(crate) fn io(dir: &Path, image: &str, commands: &[&str]) -> Outcome<String> {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    run("qemu-io", dir, ["-f", "qcow2"].into_iter().chain(commands).chain([image]))
}

/// `qemu-img info` as JSON.
pub(crate) fn info(dir: &Path, image: &str) -> Value {
    let text = img(dir, &["info", "-f", "qcow2", "--output=json", image]).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Asserts that `qemu-img check` finds nothing wrong, leaks included.
pub(crate) fn assert_clean(dir: &Path, image: &str, what: &str) {
    if let Err(text) = img(dir, &["check", "-f", "qcow2", image]) {
        panic!("{what}: {text}");
    }
}
