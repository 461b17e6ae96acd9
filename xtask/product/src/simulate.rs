//! `cargo xtask simulate`: runs jobs on a virtual clock, one schedule a seed, and checks the rules at every
//! step.
//!
//! The same seed runs the same schedule on every machine. A broken rule is shown with what led to it and
//! with the command that runs it again; the first one ends the run.

use std::collections::BTreeMap;
use std::panic;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use blockmirror_mirror::simulate::{End, Scenario, SeedRun, Violation};
use blockmirror_testing::Outcome;

use crate::Task;

/// Seeds that a thread takes at a time.
const BATCH: u64 = 64;

/// Run mirror jobs on a virtual clock, with simulated devices, guests and failures, and check the rules
#[derive(clap::Args)]
pub(crate) struct Simulate {
    /// How many seeds to run, from --seed on
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run this scenario only, whatever the seed
    #[arg(long)]
    scenario: Option<String>,
    /// Threads that run them
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Print a hash over the steps of each scenario's schedules: two versions of the core that decide alike
    /// print the same
    #[arg(long)]
    hash: bool,
    /// List the scenarios
    #[arg(long)]
    list: bool,
}

/// The schedules of one scenario.
#[derive(Default)]
struct Sum {
    ends: BTreeMap<End, u64>,
    /// The hashes of all, in whatever order they ran.
    hash: u64,
}

impl Sum {
    fn add(&mut self, seed: u64, ran: SeedRun) {
        *self.ends.entry(ran.end).or_default() += 1;
        // Rotated by the seed, so that two schedules that change places are seen.
        self.hash = self.hash.wrapping_add(ran.hash.rotate_left((seed % 63) as u32));
    }

    fn merge(&mut self, other: Self) {
        for (end, count) in other.ends {
            *self.ends.entry(end).or_default() += count;
        }
        self.hash = self.hash.wrapping_add(other.hash);
    }
}

/// By the scenario's name.
type Tally = BTreeMap<&'static str, Sum>;

impl Task for Simulate {
    fn run(self) -> Outcome<ExitCode> {
        if self.list {
            for scenario in Scenario::all() {
                println!("{:<12} {}", scenario.name, scenario.about);
            }
            return Ok(ExitCode::SUCCESS);
        }
        let only = match &self.scenario {
            None => None,
            Some(name) => {
                let known = Scenario::named(name);
                Some(known.ok_or_else(|| format!("no scenario is called {name}; --list shows them"))?)
            }
        };
        // What a broken rule says is shown once, with its seed, when it is known what led to it.
        panic::set_hook(Box::new(|info| {
            if let Some(place) = info.location() {
                eprintln!("broken at {place}");
            }
        }));
        let started = Instant::now();
        let ran = self.run_all(only);
        let _ = panic::take_hook();
        match ran {
            Err(violation) => {
                eprintln!("{violation}");
                eprintln!(
                    "\nagain: cargo xtask simulate --scenario {} --seed {} --seeds 1",
                    violation.scenario, violation.seed
                );
                Ok(ExitCode::FAILURE)
            }
            Ok(tally) => {
                show(&tally, self.hash);
                let seconds = started.elapsed().as_secs_f64();
                let rate = self.seeds as f64 / seconds;
                println!("{} seeds, no rule broken; {seconds:.1} s, {rate:.0} a second", self.seeds);
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Simulate {
    fn run_all(&self, only: Option<&'static Scenario>) -> Result<Tally, Box<Violation>> {
        let end = self.seed.saturating_add(self.seeds);
        let next = AtomicU64::new(self.seed);
        let total = Mutex::new(Ok(Tally::new()));
        let player = || {
            let mut mine = Tally::new();
            loop {
                let from = next.fetch_add(BATCH, Ordering::Relaxed);
                if from >= end {
                    break;
                }
                for seed in from..from.saturating_add(BATCH).min(end) {
                    let scenario = only.unwrap_or_else(|| Scenario::of_seed(seed));
                    match scenario.run(seed) {
                        Ok(ran) => mine.entry(scenario.name).or_default().add(seed, ran),
                        Err(violation) => {
                            next.store(u64::MAX - (1 << 32), Ordering::Relaxed);
                            let mut total = total.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                            if total.is_ok() {
                                *total = Err(violation);
                            }
                            return;
                        }
                    }
                }
            }
            let mut total = total.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if let Ok(total) = &mut *total {
                for (name, sum) in mine {
                    total.entry(name).or_default().merge(sum);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(player);
            }
        });
        total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn show(tally: &Tally, hash: bool) {
    for (name, sum) in tally {
        if hash {
            println!("{name:<12} {:>8} {:016x}", sum.ends.values().sum::<u64>(), sum.hash);
            continue;
        }
        let ends: Vec<String> = sum.ends.iter().map(|(ending, count)| format!("{count} {ending}")).collect();
        println!("{name:<12} {}", ends.join(", "));
    }
}
