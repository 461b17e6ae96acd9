//! QEMU's tools as the oracle.
//!
//! A test calls [`Qemu::find`] and returns if there are none: that is a [`skip`].

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::{Outcome, skip};

/// Proof that `qemu-img` and `qemu-io` can be run.
#[derive(Clone, Copy, Debug)]
pub struct Qemu(());

impl Qemu {
    /// The tools, if they are installed.
    ///
    /// # Panics
    /// If they are not and `BLOCKMIRROR_REQUIRE_QEMU` is `1`.
    pub fn find(asked_by: &str) -> Option<Self> {
        have(asked_by, &["qemu-img", "qemu-io"]).then_some(Self(()))
    }

    /// Runs `qemu-img` and returns what it printed, whatever its exit code.
    pub fn img_output<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Outcome<Output> {
        output("qemu-img", Path::new("."), args)
    }

    /// The same inside `dir`.
    pub fn img_output_in<S: AsRef<OsStr>>(
        self,
        dir: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Outcome<Output> {
        output("qemu-img", dir, args)
    }

    /// Runs `qemu-img`; anything but exit code 0 is an error that carries what it printed.
    pub fn img<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Outcome<String> {
        run("qemu-img", Path::new("."), args)
    }

    /// Runs `qemu-img` inside `dir`, so that names given and names stored in images are relative to it.
    pub fn img_in<S: AsRef<OsStr>>(self, dir: &Path, args: impl IntoIterator<Item = S>) -> Outcome<String> {
        run("qemu-img", dir, args)
    }

    /// Runs the commands of `script` in one `qemu-io` session on `image`.
    pub fn io(self, format: &str, image: &Path, script: &[&str]) -> Outcome<String> {
        let mut args: Vec<&OsStr> = vec![OsStr::new("-f"), OsStr::new(format)];
        for command in script {
            args.extend([OsStr::new("-c"), OsStr::new(command)]);
        }
        args.push(image.as_os_str());
        run("qemu-io", Path::new("."), args)
    }

    /// The same on a node that is described by `options`.
    pub fn io_on(self, options: &str, script: &[&str]) -> Outcome<String> {
        let mut args = vec!["--image-opts"];
        for command in script {
            args.extend(["-c", command]);
        }
        args.push(options);
        run("qemu-io", Path::new("."), args)
    }

    /// Whether `qemu-img check` finds neither damage nor leaks; the error holds its findings.
    pub fn check(self, image: &Path) -> Outcome {
        run("qemu-img", Path::new("."), [OsStr::new("check"), image.as_os_str()]).map(drop)
    }

    /// Whether both images read the same; the error says where they differ.
    pub fn compare(self, format_a: &str, a: &Path, format_b: &str, b: &Path) -> Outcome {
        let args = ["compare", "-f", format_a, "-F", format_b].map(OsStr::new);
        run("qemu-img", Path::new("."), args.into_iter().chain([a.as_os_str(), b.as_os_str()])).map(drop)
    }

    /// Copies `image` into a raw file that holds every guest byte. Runs in the image's folder: QEMU takes the
    /// name of a data file as relative to where it runs.
    pub fn to_raw(self, format: &str, image: &Path, raw: &Path) -> Outcome {
        let args = ["convert", "-f", format, "-O", "raw"].map(OsStr::new);
        let dir = image.parent().unwrap_or(Path::new("."));
        run("qemu-img", dir, args.into_iter().chain([image.as_os_str(), raw.as_os_str()])).map(drop)
    }
}

/// A Python that has the package `qemu.qmp` from PyPI: the one that `BLOCKMIRROR_PYTHON` names, or `python3`.
/// Programs that came with the package lie beside it. If there is none the skip of `asked_by` is printed.
///
/// # Panics
/// If there is none and `BLOCKMIRROR_REQUIRE_QEMU` is `1`.
pub fn python(asked_by: &str) -> Option<PathBuf> {
    let python = std::env::var("BLOCKMIRROR_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = "import sys, qemu.qmp; print(sys.executable)";
    let output = Command::new(&python).args(["-c", script]).output();
    let found = output.ok().filter(|output| output.status.success());
    if let Some(found) = found {
        return Some(PathBuf::from(String::from_utf8_lossy(&found.stdout).trim()));
    }
    skip(
        asked_by,
        format_args!(
            "{python} lacks the package qemu.qmp: install it, and set BLOCKMIRROR_PYTHON if it is in a venv"
        ),
    );
    None
}

/// Whether every one of `tools` can be run; if not, the skip of `asked_by` is printed.
///
/// # Panics
/// If one cannot and `BLOCKMIRROR_REQUIRE_QEMU` is `1`.
pub fn have(asked_by: &str, tools: &[&str]) -> bool {
    let runs = |tool: &str| {
        // Where a word beats two dashes.
        let asks = if tool == "socat" { "-V" } else { "--version" };
        Command::new(tool).arg(asks).output().is_ok_and(|out| out.status.success())
    };
    let Some(missing) = tools.iter().find(|tool| !runs(tool)) else { return true };
    skip(asked_by, format_args!("{missing} cannot be run"));
    false
}

/// Whether a server listens at `socket`, which exists a moment before that. Looked up: to connect would be to
/// be a client.
pub fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(3) == Some(ACCEPTS) && words.nth(3).is_some_and(|path| Path::new(path) == socket)
    })
}

/// Runs a program inside `dir`; anything but exit code 0 is an error that carries what it printed.
pub fn run<S: AsRef<OsStr>>(program: &str, dir: &Path, args: impl IntoIterator<Item = S>) -> Outcome<String> {
    let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let out = output(program, dir, &args)?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&out.stderr);
    Err(format!("{program} {args:?}: {}\n{stdout}{stderr}", out.status).into())
}

fn output<S: AsRef<OsStr>>(program: &str, dir: &Path, args: impl IntoIterator<Item = S>) -> Outcome<Output> {
    Command::new(program)
        .current_dir(dir)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .map_err(|e| format!("cannot run {program}: {e}").into())
}
