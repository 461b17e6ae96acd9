//! The `blockmirror` binary. Everything is in the library of the same package.

use std::process::ExitCode;

fn main() -> ExitCode {
    blockmirror::run(std::env::args_os())
}
