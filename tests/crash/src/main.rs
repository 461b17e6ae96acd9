//! `cargo xtask crash`: sequences of operations on qcow2 images, with a crash at every moment of each; `cargo
//! xtask faults`: with a failure of each request. The front page of the package says what is checked.

use std::process::ExitCode;
use std::time::Instant;

use blockmirror_block::testing::Rng;
use blockmirror_crash::{FaultTally, FaultyOp, Op, Sequence, Start, Tally};
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;
use clap::{Parser, Subcommand};

/// After a failure one crash point of so many is looked at.
const THIN: u64 = 40;
/// Points between two lines that say how far a long run is.
const REPORT_EVERY: u64 = 50_000;
/// Violations that are shown.
const SHOWN: usize = 20;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    task: Tasks,
}

#[derive(Subcommand)]
enum Tasks {
    Crash(Crash),
    Faults(FaultEach),
}

fn main() -> ExitCode {
    let done = match Args::parse().task {
        Tasks::Crash(task) => task.run(),
        Tasks::Faults(task) => task.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("cargo xtask: {error}");
        ExitCode::FAILURE
    })
}

/// Crash qcow2 images at every moment of sequences of operations
#[derive(clap::Args)]
struct Crash {
    /// End after so many crash points, of sequences in an order that the seed decides; all of them if omitted
    #[arg(long)]
    points: Option<u64>,
    /// What is drawn depends on it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many long random sequences are played beside those of up to three operations
    #[arg(long, default_value_t = 100)]
    sequences: u64,
    /// List the images that sequences start from
    #[arg(long)]
    list: bool,
    /// Play one sequence on this start of the list
    #[arg(long, requires = "ops")]
    start: Option<usize>,
    /// The operations of that sequence, separated by commas
    #[arg(long, requires = "start", value_delimiter = ',')]
    ops: Vec<String>,
}

impl Crash {
    fn run(self) -> Outcome<ExitCode> {
        if self.list {
            for (index, start) in Start::all().iter().enumerate() {
                println!("{index:>3}  {start}");
            }
            return Ok(ExitCode::SUCCESS);
        }
        let qemu = Qemu::find("cargo xtask crash");
        let begun = Instant::now();
        let mut tally = Tally::default();
        for sequence in self.chosen()? {
            let (points, before) = (tally.points, tally.violations.len());
            tally.replay(&sequence, qemu);
            tally.violations[before..].iter().for_each(|violation| println!("{violation}"));
            if points / REPORT_EVERY != tally.points / REPORT_EVERY {
                eprintln!("{tally}; {:.1} s", begun.elapsed().as_secs_f64());
            }
            if tally.violations.len() >= SHOWN || self.points.is_some_and(|most| tally.points >= most) {
                break;
            }
        }
        println!("seed {}: {tally}; {:.1} s", self.seed, begun.elapsed().as_secs_f64());
        Ok(if tally.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Crash {
    fn chosen(&self) -> Outcome<Vec<Sequence>> {
        if let Some(index) = self.start {
            let start = *Start::all().get(index).ok_or("no such start; --list has them")?;
            let op = |name: &String| Op::from_name(name).ok_or_else(|| format!("no such operation: {name}"));
            let ops = self.ops.iter().map(op).collect::<Result<Vec<_>, _>>()?;
            return Ok(vec![Sequence { start, ops, thin: 1 }]);
        }
        let mut rng = Rng::new(self.seed, 0);
        let mut sequences = Sequence::exhaustive();
        sequences.extend((0..self.sequences).map(|_| Sequence::random(&mut rng)));
        if self.points.is_some() {
            for last in (1..sequences.len()).rev() {
                let other = rng.index(last + 1);
                sequences.swap(last, other);
            }
        }
        Ok(sequences)
    }
}

/// Fail each request of operations on qcow2 images
#[derive(clap::Args)]
struct FaultEach {
    /// One operation of so many, which the seed chooses
    #[arg(long, default_value_t = 1)]
    one_in: u64,
    /// What is chosen depends on it
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl FaultEach {
    fn run(self) -> Outcome<ExitCode> {
        let begun = Instant::now();
        let mut rng = Rng::new(self.seed, 0);
        let mut tally = FaultTally::default();
        for op in FaultyOp::all() {
            let before = tally.violations.len();
            if before < SHOWN && rng.one_in(self.one_in) {
                op.fail_each(THIN, &mut tally);
            }
            tally.violations[before..].iter().for_each(|violation| println!("{violation}"));
        }
        println!("seed {}: {tally}; {:.1} s", self.seed, begun.elapsed().as_secs_f64());
        Ok(if tally.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
