//! `cargo xtask kill` and `cargo xtask power-cut`: the tests of copies and mirrors that go on, at many more
//! instants than in a test run.

use std::process::ExitCode;

use blockmirror_testing::Outcome;

use crate::{Task, cargo};

/// Kill copies, or daemons with live mirrors, at random instants, go on with them, and compare
#[derive(clap::Args)]
pub(crate) struct Kill {
    /// Instants of copies, over all cells
    #[arg(long, default_value_t = 1_000)]
    instants: u32,
    /// Live mirrors under guests that write, in place of copies
    #[arg(long, conflicts_with = "instants")]
    live: Option<u32>,
    /// Decides which instants
    #[arg(long, default_value_t = 1)]
    seed: u32,
}

/// Cut the power during copies with a checkpoint and live mirrors with a log, in recorded storages
#[derive(clap::Args)]
pub(crate) struct PowerCut {
    /// States of the log and the disks, of copies and of mirrors each
    #[arg(long, default_value_t = 50_000)]
    points: u32,
}

impl Task for Kill {
    fn run(self) -> Outcome<ExitCode> {
        let seed = ("BLOCKMIRROR_KILL_SEED", self.seed);
        match self.live {
            Some(mirrors) => {
                let count = ("BLOCKMIRROR_LIVE_KILLS", mirrors);
                test(["blockmirror-tests", "daemon", "live_log::kill::"], &[count, seed])
            }
            None => test(["blockmirror-cli", "it", "kill::"], &[("BLOCKMIRROR_KILLS", self.instants), seed]),
        }
    }
}

impl Task for PowerCut {
    fn run(self) -> Outcome<ExitCode> {
        test(["blockmirror-ops", "it", "power_cut"], &[("BLOCKMIRROR_POWER_CUTS", self.points)])
    }
}

/// Runs the tests `filter` of a program of `package` with `numbers` in the environment.
fn test([package, program, filter]: [&str; 3], numbers: &[(&str, u32)]) -> Outcome<ExitCode> {
    let mut cargo = cargo();
    cargo.args([
        "test",
        "--locked",
        "--quiet",
        "--package",
        package,
        "--test",
        program,
        filter,
        "--",
        "--nocapture",
    ]);
    let status = cargo.envs(numbers.iter().map(|(name, number)| (name, number.to_string()))).status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
