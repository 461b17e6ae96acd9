//! The `blockmirror` binary. Everything is in the library of the same package.

use std::process::ExitCode;

fn main() -> ExitCode {
    blockmirror_cli::run_here(std::env::args_os())
}
