//! `cargo xtask kill` and `cargo xtask power-cut`: the tests of copies that go on, at many more instants
//! than in a test run.

use std::process::ExitCode;

use blockmirror_testing::Outcome;

use crate::{Task, cargo};

/// Kill copies at random instants, go on with them, and compare
#[derive(clap::Args)]
pub(crate) struct Kill {
    /// Instants, over all cells
    #[arg(long, default_value_t = 1_000)]
    instants: u32,
}

/// Cut the power during copies with a checkpoint, in recorded storages
#[derive(clap::Args)]
pub(crate) struct PowerCut {
    /// States of log and target
    #[arg(long, default_value_t = 50_000)]
    points: u32,
}

impl Task for Kill {
    fn run(self) -> Outcome<ExitCode> {
        test("blockmirror-cli", "kill::", "BLOCKMIRROR_KILLS", self.instants)
    }
}

impl Task for PowerCut {
    fn run(self) -> Outcome<ExitCode> {
        test("blockmirror-ops", "power_cut::", "BLOCKMIRROR_POWER_CUTS", self.points)
    }
}

/// Runs the tests `filter` of `package` with `count` in the environment as `variable`.
fn test(package: &str, filter: &str, variable: &str, count: u32) -> Outcome<ExitCode> {
    let mut cargo = cargo();
    cargo.args([
        "test",
        "--locked",
        "--quiet",
        "--package",
        package,
        "--test",
        "it",
        filter,
        "--",
        "--nocapture",
    ]);
    let status = cargo.env(variable, count.to_string()).status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
