//! The tasks that link the product: passed on to the program in `xtask/product/`, to that in `xtask/fuzz/`,
//! or to that in `tests/crash/`, which parse their arguments.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use blockmirror_testing::{Outcome, workspace_root};

use crate::{Task, cargo};

/// The compiler's pass that counts edges, for the crate of the format alone.
const COUNT_EDGES: &str = r#"#!/bin/sh
case " $* " in
*" --crate-name blockmirror_qcow2 "*)
    exec "$@" -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=3 \
        -C llvm-args=-sanitizer-coverage-trace-pc-guard ;;
esac
exec "$@"
"#;

/// Tasks of `xtask-product`, `xtask-fuzz` and `blockmirror-crash`.
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
    /// Build the packages: manual pages, completions, deb, rpm, a static binary and an OCI image layout
    Dist(Passed),
    /// Fail each request of operations on qcow2 images
    Faults(Passed),
    /// Feed the NBD server, the NBD client, a daemon, `inspect` and the code of qcow2 hostile input
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
            Self::Dist(passed) => ("dist", passed),
            Self::Faults(passed) => ("faults", passed),
            Self::Fuzz(passed) => return fuzz(&passed.args),
            Self::Matrix(passed) => ("matrix", passed),
            Self::Mirror(passed) => ("mirror", passed),
            Self::Simulate(passed) => ("simulate", passed),
            Self::Stress(passed) => ("stress", passed),
        };
        // The first links the format alone.
        let package = if matches!(name, "crash" | "faults") { "blockmirror-crash" } else { "xtask-product" };
        let Some(program) = build(package, None)? else { return Ok(ExitCode::FAILURE) };
        let mut task = Command::new(program);
        task.arg(name).args(passed.args);
        replace(task)
    }
}

/// Images and parsers are fuzzed by a program that links the format alone, built with counters. Without a
/// target the others come first.
fn fuzz(args: &[OsString]) -> Outcome<ExitCode> {
    let of_format = args.first().is_some_and(|target| target == "image" || target == "parsers");
    let of_all = args.first().is_none_or(|first| first.as_encoded_bytes().starts_with(b"-"));
    if !of_format {
        let Some(program) = build("xtask-product", None)? else { return Ok(ExitCode::FAILURE) };
        let mut task = Command::new(program);
        task.arg("fuzz").args(args);
        if !of_all || args.iter().any(|arg| arg == "--help") {
            return replace(task);
        }
        if !task.status()?.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    let folder = workspace_root().join("target/fuzz");
    fs::create_dir_all(&folder)?;
    let wrapper = folder.join("rustc");
    fs::write(&wrapper, COUNT_EDGES)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let Some(program) = build("xtask-fuzz", Some(wrapper))? else { return Ok(ExitCode::FAILURE) };
    let mut task = Command::new(program);
    task.args(args);
    replace(task)
}

/// Builds a program, with a wrapper of the compiler for the workspace's own crates, which Cargo keeps apart
/// from those that are built without. `None` if it does not build.
fn build(package: &str, wrapper: Option<PathBuf>) -> Outcome<Option<PathBuf>> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--locked", "--release", "--package", package]);
    if let Some(wrapper) = wrapper {
        build.env("RUSTC_WORKSPACE_WRAPPER", wrapper);
    }
    if !build.status()?.success() {
        return Ok(None);
    }
    // Run where the caller is, not in the workspace: paths in the arguments are relative to that. Cargo puts
    // the program beside this one.
    Ok(Some(std::env::current_exe()?.with_file_name(package)))
}

/// Becomes `command`, so that signals, the exit code and the terminal are its own.
fn replace(mut command: Command) -> Outcome<ExitCode> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(format!("{}: {error}", command.get_program().display()).into())
}
