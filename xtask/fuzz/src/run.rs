//! Runs a target on some threads and says what came of it.
//!
//! Each thread has a share of the executions, its own random numbers and its own pool, so a run with the same
//! arguments does the same. What must hold: nothing panics, memory does not grow, and what was left as it was
//! is accepted, so that the others have a way in.

use std::fs;
use std::thread;
use std::time::Instant;

use blockmirror_block::testing::Rng;
use blockmirror_testing::resident::resident;
use blockmirror_testing::{Outcome, workspace_root};

use crate::edges;

/// More memory at the end than after a tenth of the way, beside what the pools keep, is a leak.
const MOST_GROWTH: u64 = 32 << 20;

/// What came of one execution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    /// The input was left as it was, and answered as it should be.
    pub(crate) honest: bool,
    /// It was accepted; else refused.
    pub(crate) accepted: bool,
}

/// What is fuzzed, on one thread.
pub(crate) trait Target {
    /// One execution. An error says what did not hold.
    fn run(&mut self, rng: &mut Rng) -> Outcome<Verdict>;

    /// Edges that have run, and inputs that are kept for it.
    fn reached(&self) -> (usize, usize);
}

/// What came of all executions of a thread.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    honest: u64,
    accepted: u64,
    refused: u64,
    edges: usize,
    kept: usize,
}

/// How much is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) executions: u64,
    pub(crate) seed: u64,
    pub(crate) threads: u64,
}

impl Plan {
    /// Runs the targets that `make` makes, one for each thread.
    pub(crate) fn run<T: Target>(self, name: &str, make: impl Fn() -> T + Sync) -> Outcome {
        let Self { executions, seed, threads } = self;
        let started = Instant::now();
        let share = |thread: u64| executions * (thread + 1) / threads - executions * thread / threads;
        let part = |thread| run_part(&mut make(), seed.wrapping_add(thread), share(thread));
        let tallies = thread::scope(|scope| {
            let part = &part;
            let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || part(thread))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().map_err(|_| "a panic")?)
                .collect::<Outcome<Vec<Tally>>>()
        });
        let tallies = tallies.map_err(|error| format!("{name}, seed {seed}: {error}"))?;
        let sum = |of: fn(&Tally) -> u64| tallies.iter().map(of).sum::<u64>();
        let (honest, accepted, refused) = (sum(|t| t.honest), sum(|t| t.accepted), sum(|t| t.refused));
        if accepted == 0 || refused == 0 {
            return Err(format!("{name}, seed {seed}: too little was tried: {tallies:?}").into());
        }
        let most = |of: fn(&Tally) -> usize| tallies.iter().map(of).max().unwrap_or(0);
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{name:<7} seed {seed}: {executions} executions in {seconds:.1} s ({:.0} a second), no panic; \
             {honest} honest, {accepted} accepted, {refused} refused; {} of {} edges, {} kept; {} MiB",
            executions as f64 / seconds,
            most(|t| t.edges),
            edges::count(),
            most(|t| t.kept),
            resident() >> 20
        );
        Ok(())
    }
}

fn run_part(target: &mut impl Target, seed: u64, executions: u64) -> Outcome<Tally> {
    let mut rng = Rng::new(seed, 3);
    let mut tally = Tally::default();
    let mut early = 0;
    for at in 0..executions {
        let verdict = target.run(&mut rng).map_err(|e| format!("after {at} executions: {e}"))?;
        tally.honest += u64::from(verdict.honest);
        if verdict.accepted {
            tally.accepted += 1
        } else {
            tally.refused += 1
        }
        if at == executions / 10 {
            early = resident();
        }
    }
    (tally.edges, tally.kept) = target.reached();
    let (late, allowed) = (resident(), MOST_GROWTH + crate::pool::MOST_BYTES as u64 * 4);
    if early > 0 && late > early + allowed {
        return Err(format!("{} MiB more memory after {executions} executions", (late - early) >> 20).into());
    }
    Ok(tally)
}

/// Saves an input that something did not hold for; says where.
pub(crate) fn save(bytes: &[u8], extension: &str) -> String {
    let folder = workspace_root().join("target/fuzz");
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let path = folder.join(format!("{hash:016x}.{extension}"));
    match fs::create_dir_all(&folder).and_then(|()| fs::write(&path, bytes)) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("not saved: {}: {error}", path.display()),
    }
}
