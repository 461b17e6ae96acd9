//! Child processes that do not depend on how the test run itself was started.

use std::ffi::OsStr;
use std::process::Command;

/// A command for `program` whose SIGINT, SIGHUP, SIGTERM and SIGQUIT have their default disposition.
///
/// A shell starts a background job with SIGINT and SIGQUIT ignored, `nohup` with SIGHUP; a child inherits
/// that, and so would a program under test, which keeps an inherited disposition. Needs `env` of GNU
/// coreutils 8.31.
pub fn with_default_signals(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal=INT,HUP,TERM,QUIT").arg(program);
    command
}
