//! `cargo xtask coverage`: which lines the tests of the workspace run, crate by crate, against floors.
//!
//! The workspace's own crates are built once more with `-C instrument-coverage`, in a folder of their own; a
//! wrapper of rustc adds the flag, so that dependencies are built as ever. Child processes write profiles as
//! the tests do. Documentation tests do not count.
//!
//! What must hold: a crate below its floor fails the run. `xtask/coverage-floors.txt` has the floors; they
//! only rise.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use blockmirror_testing::{Outcome, workspace_root};
use cargo_metadata::Message;
use serde_json::Value;

use crate::{Task, cargo};

const FLOORS: &str = "xtask/coverage-floors.txt";
/// Parts of paths below `crates/` that are not the product: tests, what only tests use, the simulator.
const EXCLUDED: [&str; 5] = ["/tests/", "tests.rs", "testing", "/src/sim/", "/src/sim.rs"];

/// Measure the line coverage of the tests against floors; builds everything once more
#[derive(clap::Args)]
pub(crate) struct Coverage {
    /// The tests of this package only, and no floors; can be repeated
    #[arg(long, short)]
    package: Vec<String>,
    /// Print each file too
    #[arg(long)]
    files: bool,
}

/// Lines that could run, and those that did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Lines {
    count: u64,
    covered: u64,
}

impl Lines {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.covered += other.covered;
    }

    fn percent(self) -> f64 {
        if self.count == 0 { 100.0 } else { self.covered as f64 * 100.0 / self.count as f64 }
    }
}

impl Task for Coverage {
    fn run(self) -> Outcome<ExitCode> {
        let folder = workspace_root().join("target/coverage");
        let profiles = folder.join("profiles");
        if profiles.exists() {
            fs::remove_dir_all(&profiles)?;
        }
        fs::create_dir_all(&profiles)?;
        let tools = llvm_tools()?;
        let wrapper = folder.join("rustc");
        fs::write(&wrapper, "#!/bin/sh\nexec \"$@\" -C instrument-coverage\n")?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;

        let programs = self.build(&folder, &wrapper)?;
        let mut tests = self.cargo_test(&folder, &wrapper);
        // One file for each program, into which each process of it adds its counts.
        tests.arg("--no-fail-fast").env("LLVM_PROFILE_FILE", profiles.join("%m.profraw"));
        let passed = tests.status()?.success();

        let merged = folder.join("all.profdata");
        let mut merge = Command::new(tools.join("llvm-profdata"));
        merge.args(["merge", "-sparse", "-failure-mode=warn", "-o"]).arg(&merged).arg(&profiles);
        if !merge.status()?.success() {
            return Err("llvm-profdata failed".into());
        }
        let mut export = Command::new(tools.join("llvm-cov"));
        export.args(["export", "-summary-only", "-instr-profile"]).arg(&merged);
        for program in &programs {
            export.arg("-object").arg(program);
        }
        let exported = export.stderr(Stdio::inherit()).output()?;
        if !exported.status.success() {
            return Err("llvm-cov failed".into());
        }
        let files = lines_of_files(&serde_json::from_slice(&exported.stdout)?, &workspace_root());
        if self.files {
            files.iter().for_each(|(file, lines)| print_row(file, *lines, None));
        }
        let floors = if self.package.is_empty() {
            fs::read_to_string(workspace_root().join(FLOORS))?
        } else {
            String::new()
        };
        let all_reached = report(&by_crate(&files), &parse_floors(&floors)?, self.package.is_empty());
        if !passed {
            return Err("tests failed".into());
        }
        Ok(if all_reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Coverage {
    fn cargo_test(&self, folder: &Path, wrapper: &Path) -> Command {
        let mut cargo = cargo();
        cargo.args(["test", "--locked", "--tests"]);
        match &self.package[..] {
            [] => cargo.arg("--workspace"),
            packages => cargo.args(packages.iter().flat_map(|package| ["--package", package])),
        };
        cargo.env("CARGO_TARGET_DIR", folder).env("RUSTC_WORKSPACE_WRAPPER", wrapper);
        // What runs while crates are built is not to be counted.
        cargo.env("LLVM_PROFILE_FILE", "/dev/null");
        cargo
    }

    /// Builds the tests; returns all programs that have counters.
    fn build(&self, folder: &Path, wrapper: &Path) -> Outcome<BTreeSet<PathBuf>> {
        let mut cargo = self.cargo_test(folder, wrapper);
        cargo.args(["--no-run", "--message-format=json-render-diagnostics"]);
        let mut build = cargo.stdout(Stdio::piped()).spawn()?;
        let mut programs = BTreeSet::new();
        if let Some(messages) = build.stdout.take() {
            for message in Message::parse_stream(BufReader::new(messages)) {
                if let Message::CompilerArtifact(artifact) = message? {
                    programs.extend(artifact.executable.map(PathBuf::from));
                }
            }
        }
        if !build.wait()?.success() {
            return Err("the tests do not build".into());
        }
        Ok(programs)
    }
}

/// Where the toolchain has its LLVM tools: only those read the profiles of its compiler.
fn llvm_tools() -> Outcome<PathBuf> {
    let rustc = |what: &[&str]| -> Outcome<String> {
        let mut rustc = Command::new("rustc");
        let printed = rustc.current_dir(workspace_root()).args(what).output()?;
        Ok(String::from_utf8(printed.stdout)?)
    };
    let about = rustc(&["-vV"])?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("rustc names no host")?;
    let tools = Path::new(rustc(&["--print", "sysroot"])?.trim()).join("lib/rustlib").join(host).join("bin");
    if !tools.join("llvm-cov").exists() {
        return Err("the toolchain has no LLVM tools: rustup component add llvm-tools".into());
    }
    Ok(tools)
}

/// The lines of each file of the product, by its path below `root`.
fn lines_of_files(export: &Value, root: &Path) -> BTreeMap<String, Lines> {
    let mut found = BTreeMap::new();
    for file in export["data"][0]["files"].as_array().into_iter().flatten() {
        let Some(path) = file["filename"].as_str() else { continue };
        let Ok(path) = Path::new(path).strip_prefix(root.join("crates")) else { continue };
        let path = path.display().to_string();
        if EXCLUDED.iter().any(|part| path.contains(part)) {
            continue;
        }
        let of = |what: &str| file["summary"]["lines"][what].as_u64().unwrap_or_default();
        found.insert(path, Lines { count: of("count"), covered: of("covered") });
    }
    found
}

fn by_crate(files: &BTreeMap<String, Lines>) -> BTreeMap<String, Lines> {
    let mut crates: BTreeMap<String, Lines> = BTreeMap::new();
    for (path, lines) in files {
        let name = path.split('/').next().unwrap_or_default();
        crates.entry(name.to_owned()).or_default().add(*lines);
    }
    crates
}

/// The floors in percent, by crate: a line each, behind its name.
fn parse_floors(text: &str) -> Outcome<BTreeMap<String, f64>> {
    let mut floors = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let (name, floor) = line.split_once(' ').ok_or_else(|| format!("{FLOORS}: {line}"))?;
        floors.insert(name.to_owned(), floor.trim().parse()?);
    }
    Ok(floors)
}

/// Prints a row for each crate; whether each has a floor, where one is `needed`, and reaches it.
fn report(crates: &BTreeMap<String, Lines>, floors: &BTreeMap<String, f64>, needed: bool) -> bool {
    let mut all = true;
    for (name, lines) in crates {
        let floor = floors.get(name);
        print_row(name, *lines, floor.copied());
        all &= floor.map_or(!needed, |floor| lines.percent() >= *floor);
    }
    let gone: Vec<_> = floors.keys().filter(|name| !crates.contains_key(*name)).collect();
    if !gone.is_empty() {
        println!("{FLOORS}: no such crates: {gone:?}");
    }
    all && gone.is_empty()
}

fn print_row(name: &str, lines: Lines, floor: Option<f64>) {
    let percent = lines.percent();
    let verdict = match floor {
        None => String::new(),
        Some(floor) if percent < floor => format!("  below {floor} %"),
        Some(floor) => format!("  at least {floor} %"),
    };
    println!("{name:<40} {:>6} of {:>6} lines {percent:>6.2} %{verdict}", lines.covered, lines.count);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_of_the_product_are_summed_by_crate() {
        let file = |name: &str, count: u64, covered: u64| json!({"filename": name, "summary": {"lines": {"count": count, "covered": covered}}});
        let export = json!({"data": [{"files": [
            file("/w/crates/a/src/lib.rs", 10, 9),
            file("/w/crates/a/src/b.rs", 10, 10),
            file("/w/crates/a/src/b/tests.rs", 10, 0),
            file("/w/crates/a/tests/it/c.rs", 10, 0),
            file("/w/crates/mirror/src/sim/d.rs", 10, 0),
            file("/w/crates/testing/src/lib.rs", 10, 0),
            file("/w/xtask/src/main.rs", 10, 0),
            file("/registry/serde/src/lib.rs", 10, 0),
        ]}]});
        let crates = by_crate(&lines_of_files(&export, Path::new("/w")));
        assert_eq!(crates, BTreeMap::from([("a".to_owned(), Lines { count: 20, covered: 19 })]));
    }

    #[test]
    fn a_crate_without_a_floor_or_below_it_fails() {
        let crates = BTreeMap::from([("a".to_owned(), Lines { count: 100, covered: 95 })]);
        let reached = |floors: &str| report(&crates, &parse_floors(floors).unwrap(), true);
        assert!(reached("# Why.\na 95\n"));
        assert!(!reached("a 95.1\n"));
        assert!(!reached(""));
        assert!(!reached("a 90\nb 90\n"));
        assert!(report(&crates, &BTreeMap::new(), false));
    }
}
