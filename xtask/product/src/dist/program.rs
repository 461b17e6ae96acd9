//! The command itself: built with optimisation, its debugging symbols in a file of their own.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::{Outcome, workspace_root};

use super::run;

const MUSL: &str = "x86_64-unknown-linux-musl";

/// The command, linked with the system's libraries.
pub(super) fn build_dynamic(out: &Path) -> Outcome<PathBuf> {
    build(out, None, "blockmirror")
}

/// The command without shared libraries.
pub(super) fn build_static(out: &Path) -> Outcome<PathBuf> {
    build(out, Some(MUSL), "blockmirror-static")
}

fn build(out: &Path, target: Option<&str>, name: &str) -> Outcome<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace_root());
    command.args(["build", "--quiet", "--locked", "--release", "--package", "blockmirror-cli"]);
    if let Some(target) = target {
        command.args(["--target", target]);
        if target == MUSL {
            command.env("CC_x86_64_unknown_linux_musl", "musl-gcc");
        }
    }
    run(&mut command)?;
    let folder = workspace_root().join("target").join(target.unwrap_or_default());
    split_symbols(&folder.join("release/blockmirror"), &out.join(name))
}

/// Copies the program at `from` to `to` without its symbols, which go to `to` with `.debug` behind its name.
fn split_symbols(from: &Path, to: &Path) -> Outcome<PathBuf> {
    let debug = to.with_added_extension("debug");
    run(Command::new("objcopy").arg("--only-keep-debug").arg(from).arg(&debug))?;
    let mut link = std::ffi::OsString::from("--add-gnu-debuglink=");
    link.push(debug.file_name().unwrap_or(OsStr::new("blockmirror.debug")));
    let folder = to.parent().ok_or("no folder for the program")?;
    fs::remove_file(to).or_else(|error| if to.exists() { Err(error) } else { Ok(()) })?;
    run(Command::new("objcopy").current_dir(folder).arg("--strip-unneeded").arg(link).arg(from).arg(to))?;
    Ok(to.to_path_buf())
}
