//! `cargo xtask ci`: every check of a change, in the order of what fails soonest. `.ci/run` installs what is
//! missing on a bare machine and calls it.

use std::process::{Command, ExitCode};

use blockmirror_testing::{Outcome, workspace_root};

use crate::Task;

/// Each is a command line. Stops at the first that fails.
const STEPS: [&str; 14] = [
    "cargo fmt --all --check",
    "cargo xtask tidy",
    "cargo xtask testdata --check",
    "cargo clippy --locked --workspace --all-targets -- -D warnings",
    // The README's own test command.
    "cargo test --locked --workspace",
    "cargo doc --locked --workspace --no-deps --quiet",
    "cargo xtask simulate --seeds 20000",
    "cargo xtask model --orders 100",
    "cargo xtask fuzz --executions 20000 --seed 1",
    "cargo xtask crash --points 20000",
    "cargo xtask faults --one-in 30",
    "cargo xtask matrix --one-in 20",
    "cargo xtask mirror",
    "cargo xtask bench --smoke",
];

/// Run the checks of a change: format, house rules, lints, tests, docs, short runs of the long tasks
#[derive(clap::Args)]
pub(crate) struct Ci {}

impl Task for Ci {
    fn run(self) -> Outcome<ExitCode> {
        for step in STEPS {
            println!("\n== {step}");
            let mut words = step.split(' ');
            let mut command = Command::new(words.next().unwrap_or_default());
            command.args(words).current_dir(workspace_root());
            if step.starts_with("cargo doc") {
                command.env("RUSTDOCFLAGS", "-D warnings");
            }
            if !command.status()?.success() {
                return Err(format!("{step}: failed").into());
            }
        }
        println!("all green");
        Ok(ExitCode::SUCCESS)
    }
}
