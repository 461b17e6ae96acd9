//! `cargo xtask`: the developers' commands. Run it without arguments for the list.
//!
//! One file per task; each gives a [`Task`], and `Tasks` below is the only place that knows them all. Those
//! in [`product::Product`] link the product and are in a program of their own (`xtask/product/`), so that the
//! others build in seconds.

mod ci;
mod coverage;
mod docs;
mod model;
mod mutants;
mod product;
mod properties;
mod readme;
mod resume;
mod testdata;
mod tidy;

use std::process::{Command, ExitCode};

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
    Ci(ci::Ci),
    Coverage(coverage::Coverage),
    Docs(docs::Docs),
    Model(model::Model),
    Mutants(mutants::Mutants),
    Kill(resume::Kill),
    PowerCut(resume::PowerCut),
    Properties(properties::Properties),
    Testdata(testdata::Testdata),
    Tidy(tidy::Tidy),
    #[command(flatten)]
    Product(product::Product),
}

/// Cargo, in the workspace.
fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(blockmirror_testing::workspace_root());
    cargo
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Tasks::Ci(task) => task.run(),
        Tasks::Coverage(task) => task.run(),
        Tasks::Docs(task) => task.run(),
        Tasks::Model(task) => task.run(),
        Tasks::Mutants(task) => task.run(),
        Tasks::Kill(task) => task.run(),
        Tasks::PowerCut(task) => task.run(),
        Tasks::Properties(task) => task.run(),
        Tasks::Testdata(task) => task.run(),
        Tasks::Tidy(task) => task.run(),
        Tasks::Product(task) => task.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("cargo xtask: {error}");
        ExitCode::FAILURE
    })
}
