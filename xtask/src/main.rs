//! `cargo xtask`: the developers' commands. Run it without arguments for the list.
//!
//! One file per task; each gives a [`Task`], and `Tasks` below is the only place that knows them all.

mod bench;
mod converge;
mod daemon;
mod docs;
mod fuzz;
mod mirror;
mod model;
mod properties;
mod simulate;
mod stress;
mod testdata;
mod tidy;

use std::process::ExitCode;

use blockmirror_testing::Outcome;
use clap::{Parser, Subcommand};

/// A developer's command: its arguments, and what it does.
trait Task {
    /// Does the work, printing what it does. An error is one message.
    fn run(self) -> Outcome<ExitCode>;
}

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer commands of blockmirror", arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    task: Tasks,
}

#[derive(Subcommand)]
enum Tasks {
    Bench(bench::Bench),
    Converge(converge::Converge),
    Docs(docs::Docs),
    Fuzz(fuzz::Fuzz),
    #[command(hide = true)]
    Daemon(daemon::Daemon),
    #[command(hide = true)]
    Measure(bench::Measure),
    Mirror(mirror::Mirror),
    Model(model::Model),
    Properties(properties::Properties),
    Simulate(simulate::Simulate),
    Stress(stress::StressTask),
    Testdata(testdata::Testdata),
    Tidy(tidy::Tidy),
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Tasks::Bench(task) => task.run(),
        Tasks::Converge(task) => task.run(),
        Tasks::Docs(task) => task.run(),
        Tasks::Fuzz(task) => task.run(),
        Tasks::Daemon(task) => task.run(),
        Tasks::Measure(task) => task.run(),
        Tasks::Mirror(task) => task.run(),
        Tasks::Model(task) => task.run(),
        Tasks::Properties(task) => task.run(),
        Tasks::Simulate(task) => task.run(),
        Tasks::Stress(task) => task.run(),
        Tasks::Testdata(task) => task.run(),
        Tasks::Tidy(task) => task.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("cargo xtask: {error}");
        ExitCode::FAILURE
    })
}
