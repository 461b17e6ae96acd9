//! `cargo xtask model`: runs the crates' models under the model checker.
//!
//! The checker replaces locks and threads in all crates (`--cfg shuttle`), so everything is built once more,
//! in a folder of its own.

use std::env;
use std::process::ExitCode;

use blockmirror_testing::Outcome;
use blockmirror_testing::workspace_root;

use crate::{Task, cargo};

/// The packages that have models, in `tests/shuttle.rs`.
const PACKAGES: [&str; 3] = ["blockmirror-block", "blockmirror-mirror", "blockmirror-qcow2"];

/// Everything is built once more for this, so what the models do not spend their time in is built in a hurry.
const PROFILE: [&str; 4] = [
    "profile.dev.package.\"*\".opt-level=0",
    "profile.dev.package.shuttle.opt-level=2",
    "profile.dev.package.generator.opt-level=2",
    "profile.dev.package.smallvec.opt-level=2",
];

/// Run concurrent code under a model checker that tries many orders of its steps
#[derive(clap::Args)]
pub(crate) struct Model {
    /// Orders to try of each kind, for each model
    #[arg(long, default_value_t = 300)]
    orders: u64,
    /// Which orders: another number gives others
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The models of this package only
    #[arg(long, short, value_parser = PACKAGES)]
    package: Option<String>,
    /// Only models whose name contains this
    filter: Option<String>,
}

impl Task for Model {
    fn run(self) -> Outcome<ExitCode> {
        let root = workspace_root();
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
        let flags = format!("{} --cfg shuttle", env::var("RUSTFLAGS").unwrap_or_default());
        let mut cargo = cargo();
        cargo.args(["test", "--locked", "--test", "shuttle"]);
        cargo.args(PROFILE.iter().flat_map(|setting| ["--config", setting]));
        match &self.package {
            Some(package) => cargo.args(["--package", package]),
            None => cargo.args(PACKAGES.iter().flat_map(|package| ["--package", package])),
        };
        cargo
            .args(self.filter)
            .env("CARGO_TARGET_DIR", target.join("model"))
            .env("RUSTFLAGS", flags.trim_start())
            .env("BLOCKMIRROR_MODEL_ORDERS", self.orders.to_string())
            .env("BLOCKMIRROR_MODEL_SEED", self.seed.to_string());
        let status = cargo.status()?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
