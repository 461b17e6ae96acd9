//! The developers' commands that link the product. `cargo xtask` builds this program, optimised, and passes
//! its arguments on; the commands that need no product are in `xtask` itself, which builds in seconds.
//!
//! One file per task; each gives a [`Task`], and `Tasks` below is the only place that knows them all.

mod bench;
mod converge;
mod daemon;
mod dist;
mod fuzz;
mod matrix;
mod mirror;
mod simulate;
mod stress;

use std::process::ExitCode;

use blockmirror_testing::Outcome;
use clap::{Parser, Subcommand};

/// A developer's command: its arguments, and what it does.
trait Task {
    /// Does the work, printing what it does. An error is one message.
    fn run(self) -> Outcome<ExitCode>;
}

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    task: Tasks,
}

#[derive(Subcommand)]
enum Tasks {
    Bench(bench::Bench),
    #[command(hide = true)]
    Check(daemon::CheckTask),
    Converge(converge::Converge),
    #[command(hide = true)]
    Convert(mirror::Convert),
    Dist(dist::Dist),
    Fuzz(fuzz::Fuzz),
    #[command(hide = true)]
    Daemon(daemon::DaemonTask),
    #[command(hide = true)]
    Measure(bench::Measure),
    Matrix(matrix::Matrix),
    Mirror(mirror::Mirror),
    #[command(hide = true)]
    QemuImg(matrix::QemuImg),
    Simulate(simulate::Simulate),
    Stress(stress::StressTask),
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Tasks::Bench(task) => task.run(),
        Tasks::Check(task) => task.run(),
        Tasks::Converge(task) => task.run(),
        Tasks::Convert(task) => task.run(),
        Tasks::Dist(task) => task.run(),
        Tasks::Fuzz(task) => task.run(),
        Tasks::Daemon(task) => task.run(),
        Tasks::Measure(task) => task.run(),
        Tasks::Matrix(task) => task.run(),
        Tasks::Mirror(task) => task.run(),
        Tasks::QemuImg(task) => task.run(),
        Tasks::Simulate(task) => task.run(),
        Tasks::Stress(task) => task.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("cargo xtask: {error}");
        ExitCode::FAILURE
    })
}
