//! `cargo xtask fuzz image` and `parsers`: qcow2 images, and bytes for the format's parsers, that are almost
//! right, by the million. What reaches new code is kept, and changed further.
//!
//! ```text
//!   corpus (testdata/) --> change --> run --> edges: something new? --> pool
//!                             ^                                          |
//!                             +------------------------------------------+
//! ```
//!
//! `cargo xtask fuzz` builds the format's crate with a counter on each edge (`edges`). Built without, all is
//! as random as the seed.

mod counting;
mod edges;
mod heap;
mod image;
mod parsers;
mod pool;
mod run;

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use blockmirror_testing::Outcome;
use clap::{Parser, ValueEnum};
use xtask_fuzz::corpus::Corpus;

use self::image::Images;
use self::parsers::{Parsers, Seeds};
use self::run::Plan;

/// Of both targets together: so many runs of a parser for each image.
const PARSERS_FOR_IMAGE: u64 = 20;

/// Give qcow2 images that are almost right to the format's code, guided by its coverage
#[derive(Parser)]
#[command(name = "cargo xtask fuzz", bin_name = "cargo xtask fuzz")]
struct Args {
    /// What is fuzzed; both if omitted
    target: Option<Target>,
    /// How many executions each
    #[arg(long, default_value_t = 100_000)]
    executions: u64,
    /// What is tried depends on it, and on the number of threads; by default another one each time
    #[arg(long)]
    seed: Option<u64>,
    /// Threads, each with a share of the executions and what it finds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    threads: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Whole images: opened, mapped, read, checked, repaired, written
    Image,
    /// The header, directories, entries and refcounts, from bytes
    Parsers,
}

fn main() -> ExitCode {
    match Args::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask fuzz: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    fn run(self) -> Outcome {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let seed = self.seed.unwrap_or_else(now);
        let plan = Plan { executions: self.executions, seed, threads: self.threads };
        let corpus = Corpus::load()?;
        if self.target != Some(Target::Image) {
            let more = if self.target.is_none() { PARSERS_FOR_IMAGE } else { 1 };
            let plan = Plan { executions: self.executions * more, ..plan };
            let seeds = Seeds::of(&corpus)?;
            plan.run("parsers", || Parsers::new(&seeds))?;
        }
        if self.target != Some(Target::Parsers) {
            plan.run("image", || Images::new(&corpus))?;
        }
        Ok(())
    }
}
