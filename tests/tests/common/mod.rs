//! Runs our command inside the test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(dead_code, reason = "each test file uses some of it")]

pub(crate) mod guest;
pub(crate) mod host;
pub(crate) mod nbd;
pub(crate) mod pki;
pub(crate) mod world;

use std::ffi::{OsStr, OsString};

/// What a run of our command left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Its exit code.
    pub(crate) code: u8,
    /// What it printed.
    pub(crate) stdout: String,
    /// What it complained of.
    pub(crate) stderr: String,
}

/// Runs `blockmirror` with `args`, inside this process.
pub(crate) fn ours<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let words =
        std::iter::once(OsString::from("blockmirror")).chain(args.into_iter().map(|a| a.as_ref().to_owned()));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = blockmirror_cli::run(words, &mut out, &mut err);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    Ran { code, stdout: text(out), stderr: text(err) }
}

/// Runs `blockmirror`, which must succeed; returns what it printed.
pub(crate) fn ours_ok<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let args: Vec<OsString> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let ran = ours(&args);
    assert_eq!(ran.code, 0, "blockmirror {args:?}: {}{}", ran.stdout, ran.stderr);
    ran.stdout
}
