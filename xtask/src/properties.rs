//! `cargo xtask properties`: the property tests of all crates with fresh cases, many more of them than in a
//! test run.
//!
//! `cargo test` draws from the fixed seed of `.cargo/config.toml`, so that a run is the same everywhere;
//! fresh seeds belong here. A failure is minimised by proptest, which writes its seed to a
//! `.proptest-regressions` file beside the test or to `proptest-regressions/`: commit that file, or better a
//! named test of the minimal case.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use blockmirror_testing::Outcome;

use crate::{Task, cargo};

/// Run the property tests with a fresh seed and more cases
#[derive(clap::Args)]
pub(crate) struct Properties {
    /// Cases of each property, where the test has no fixed number
    #[arg(long, default_value_t = 5_000)]
    cases: u32,
    /// What is drawn depends on it; by default another one each time
    #[arg(long)]
    seed: Option<u64>,
    /// Runs, each with the next seed
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// The properties of this package only
    #[arg(long, short)]
    package: Option<String>,
    /// Only tests whose name contains this
    filter: Option<String>,
}

impl Task for Properties {
    fn run(self) -> Outcome<ExitCode> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let first = self.seed.unwrap_or_else(now);
        for seed in first..first.saturating_add(self.runs) {
            println!("seed {seed}");
            let mut cargo = cargo();
            cargo.args(["test", "--locked", "--quiet"]);
            match &self.package {
                Some(package) => cargo.args(["--package", package]),
                // The tests across crates have no properties, and processes that many cases would not change.
                None => cargo.args([
                    "--workspace",
                    "--exclude",
                    "blockmirror-tests",
                    "--exclude",
                    "xtask",
                    "--exclude",
                    "xtask-fuzz",
                    "--exclude",
                    "xtask-product",
                ]),
            };
            cargo
                .args(["--lib", "--tests"])
                .args(&self.filter)
                .env("PROPTEST_RNG_SEED", seed.to_string())
                .env("PROPTEST_CASES", self.cases.to_string());
            if !cargo.status()?.success() {
                println!("again: cargo xtask properties --seed {seed} --cases {}", self.cases);
                return Ok(ExitCode::FAILURE);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
