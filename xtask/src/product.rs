//! The tasks that link the product: passed on to the program in `xtask/product/`, or to that in
//! `tests/crash/`, which parse their arguments.

use std::ffi::OsString;
use std::process::ExitCode;

use blockmirror_testing::Outcome;

use crate::{Task, cargo};

/// Tasks of `xtask-product` and `blockmirror-crash`.
#[derive(clap::Subcommand)]
pub(crate) enum Product {
    /// Time fixed scenarios side by side with qemu-img
    Bench(Passed),
    /// Model how fast mirrors of devices of several kinds converge
    Converge(Passed),
    /// Crash qcow2 images at every moment of sequences of operations
    Crash(Passed),
    /// Run `blockmirror daemon`
    #[command(hide = true)]
    Daemon(Passed),
    /// Fail each request of operations on qcow2 images
    Faults(Passed),
    /// Feed the NBD server, the NBD client and a daemon hostile input
    Fuzz(Passed),
    /// Try operations on images with every feature, beside QEMU
    Matrix(Passed),
    /// Run `blockmirror mirror`; without arguments, mirror an image from testdata/ and verify the copy
    Mirror(Passed),
    /// Run mirror jobs on a virtual clock and check every step
    Simulate(Passed),
    /// Mirror disks under writers, for as long as asked
    Stress(Passed),
}

/// The arguments of a task, unparsed.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Passed {
    /// The task's arguments; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl Task for Product {
    fn run(self) -> Outcome<ExitCode> {
        let (name, passed) = match self {
            Self::Bench(passed) => ("bench", passed),
            Self::Converge(passed) => ("converge", passed),
            Self::Crash(passed) => ("crash", passed),
            Self::Daemon(passed) => ("daemon", passed),
            Self::Faults(passed) => ("faults", passed),
            Self::Fuzz(passed) => ("fuzz", passed),
            Self::Matrix(passed) => ("matrix", passed),
            Self::Mirror(passed) => ("mirror", passed),
            Self::Simulate(passed) => ("simulate", passed),
            Self::Stress(passed) => ("stress", passed),
        };
        let mut build = cargo();
        // The first links the format alone.
        let package = if matches!(name, "crash" | "faults") { "blockmirror-crash" } else { "xtask-product" };
        build.args(["build", "--quiet", "--locked", "--release", "--package", package]);
        if !build.status()?.success() {
            return Ok(ExitCode::FAILURE);
        }
        // Run where the caller is, not in the workspace: paths in the arguments are relative to that. Cargo
        // puts the program beside this one.
        let program = std::env::current_exe()?.with_file_name(package);
        let mut task = std::process::Command::new(program);
        task.arg(name).args(passed.args);
        replace(task)
    }
}

/// Becomes `command`, so that signals, the exit code and the terminal are its own.
fn replace(mut command: std::process::Command) -> Outcome<ExitCode> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(format!("{}: {error}", command.get_program().display()).into())
}
