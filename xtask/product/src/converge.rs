//! `cargo xtask converge`: the throughput of a guest while it is mirrored, in each copy mode, on a virtual
//! clock.
//!
//! Devices that take 100 microseconds a request, and 16 random writes of 4 KiB under way: the figures are
//! those of the core's decisions alone and the same on every machine. Auto mode has to become ready and to
//! leave the guest 60 % of its throughput.

use std::process::ExitCode;

use blockmirror_mirror::CopyMode;
use blockmirror_mirror::simulate::{Devices, model_throughput};
use blockmirror_testing::Outcome;

use crate::Task;

const GRANULARITIES: [u64; 3] = [64 << 10, 1 << 20, 64 << 20];
const LEAST_SHARE: f64 = 0.6;

/// Print the throughput of a guest while it is mirrored, in each copy mode, on a virtual clock
#[derive(clap::Args)]
pub(crate) struct Converge {}

impl Task for Converge {
    fn run(self) -> Outcome<ExitCode> {
        let mut failures = 0;
        for (name, devices) in [("parallel", Devices::Parallel), ("serial", Devices::Serial)] {
            for mode in [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto] {
                for granularity in GRANULARITIES {
                    let report = model_throughput(mode, granularity, devices);
                    println!("{name:<9} {mode:<15} {:>6} KiB  {report}", granularity >> 10);
                    for (at, mode, reason) in &report.switches {
                        println!("    after {:.2} s {mode}: {reason}", at.as_secs_f64());
                    }
                    let bad = report.ready.is_none() || report.share < LEAST_SHARE;
                    failures += u32::from(mode == CopyMode::Auto && bad);
                }
            }
        }
        if failures > 0 {
            return Err(format!("auto mode fell short in {failures} cases").into());
        }
        Ok(ExitCode::SUCCESS)
    }
}
