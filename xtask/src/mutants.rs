//! `cargo xtask mutants`: changes the product in small ways, one at a time, and looks whether a test notices.
//!
//! Runs `cargo-mutants` over the parts where an unnoticed change loses data: the write path of qcow2 and the
//! core of the mirror. A long task: each change is a build and a run of its crate's tests. What survives is
//! listed in `target/mutants/mutants.out/missed.txt`.

use std::process::ExitCode;

use blockmirror_testing::{Outcome, workspace_root};

use crate::{Task, cargo};

/// A package, and the files of it that are changed.
const PARTS: [(&str, &[&str]); 2] = [
    (
        "blockmirror-qcow2",
        &[
            "crates/qcow2/src/write.rs",
            "crates/qcow2/src/write/*.rs",
            "crates/qcow2/src/writeback.rs",
            "crates/qcow2/src/refcounts.rs",
            "crates/qcow2/src/refcounts/*.rs",
            "crates/qcow2/src/zero.rs",
            "crates/qcow2/src/overlap.rs",
        ],
    ),
    ("blockmirror-mirror", &["crates/mirror/src/machine.rs", "crates/mirror/src/machine/**/*.rs"]),
];

/// Change the write path and the mirror's core in small ways, and list what no test notices; takes hours
#[derive(clap::Args)]
pub(crate) struct Mutants {
    /// Try one change in so many only
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "100")]
    sample: Option<u32>,
    /// Which sample, from 0
    #[arg(long, default_value_t = 0, requires = "sample")]
    seed: u32,
    /// The files of this package only
    #[arg(long, short, value_parser = ["blockmirror-qcow2", "blockmirror-mirror"])]
    package: Option<String>,
    /// Only list the changes
    #[arg(long)]
    list: bool,
}

impl Task for Mutants {
    fn run(self) -> Outcome<ExitCode> {
        let found = cargo().args(["mutants", "--version"]).output()?;
        if !found.status.success() {
            return Err("cargo-mutants is not there: cargo install --locked cargo-mutants".into());
        }
        let output = workspace_root().join("target/mutants");
        std::fs::create_dir_all(&output)?;
        let mut cargo = cargo();
        cargo.arg("mutants").arg("--output").arg(output);
        let wanted = |package: &str| self.package.as_ref().is_none_or(|only| only == package);
        for (package, files) in PARTS.iter().filter(|(package, _)| wanted(package)) {
            cargo.args(["--package", package]);
            cargo.args(files.iter().flat_map(|file| ["--file", file]));
        }
        if let Some(parts) = self.sample {
            cargo.arg(format!("--shard={}/{parts}", self.seed));
        }
        if self.list {
            cargo.arg("--list");
        }
        // Documentation tests are slow, and say nothing that the others do not.
        cargo.args(["--", "--locked", "--lib", "--tests"]);
        let status = cargo.status()?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
