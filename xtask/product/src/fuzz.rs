//! `cargo xtask fuzz`: peers that say almost the right thing, by the million, to what listens to strangers:
//! the NBD server, the NBD client, the daemon's QMP, and `inspect`. Images that are almost right are in a
//! program of their own (`xtask/fuzz/`), all but those that are read beside `qemu-img`.
//!
//! Whole conversations are made, spoiled here and there and given to the real thing over real sockets. What
//! must hold: nothing panics, nothing waits for ever, nothing is held afterwards, memory does not grow; and
//! the conversations among them that were left as they are get what they ask for, so that the others have a
//! way in.

mod client;
mod inspect;
mod mutants;
mod qmp;
mod server;
mod spoil;

use std::panic;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blockmirror_testing::Outcome;
use blockmirror_testing::resident::resident;
use clap::ValueEnum;

use crate::Task;

/// Executions that a thread takes at a time, or a tenth of all; what is alive belongs to one such turn.
const TURN: u64 = 4096;
/// Of all targets together, one mutant for so many executions of another.
const MUTANTS_ONE_IN: u64 = 100;
/// More memory at the end than after a tenth of the way is a leak.
const MOST_GROWTH: u64 = 32 << 20;
/// Longer than anything here takes, on any machine.
const HANG: Duration = Duration::from_secs(60);

/// Panics of any thread since [`count_panics`].
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Give broken conversations to the NBD server, the NBD client and the daemon's QMP, files of strangers to
/// `inspect`, and damaged images to qcow2's code, alone and beside qemu-img
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    /// What is fuzzed; everything if omitted, `image` and `parsers` too, which are in a program of their own
    target: Option<Target>,
    /// How many conversations (QMP: requests) each
    #[arg(long, default_value_t = 100_000)]
    executions: u64,
    /// What is said depends on it; by default another one each time
    #[arg(long)]
    seed: Option<u64>,
    /// Threads that speak
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Target {
    Server,
    Client,
    Qmp,
    /// Files from strangers, given to `inspect`
    Inspect,
    /// Damaged qcow2 images, read beside qemu-img; a process each
    Mutants,
}

/// What is spoken to.
trait Listener: Sync {
    /// Gives it the conversations that `seed` stands for, `count` of them. An error says what did not hold.
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard>;

    /// After all of them: whether nothing is left of them. An error says what is.
    fn left(&self) -> Outcome;
}

/// What came of conversations.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    /// Left as they were, and answered as they should be.
    honest: u64,
    /// Requests that were answered or done.
    done: u64,
    /// Refusals, of whatever kind.
    refused: u64,
}

impl Heard {
    fn add(&mut self, other: Self) {
        self.honest += other.honest;
        self.done += other.done;
        self.refused += other.refused;
    }

    /// Prints what came of `executions` conversations; `late` is the resident memory after them, in bytes.
    fn print(self, name: &str, seed: u64, executions: u64, seconds: f64, late: u64) {
        let Self { honest, done, refused } = self;
        println!(
            "{name:<7} seed {seed}: {executions} executions in {seconds:.1} s ({:.0} a second), no panic; {honest} \
             honest, {done} done, {refused} refused; {} MiB",
            executions as f64 / seconds,
            late >> 20
        );
    }
}

/// Counts panics in [`PANICS`] and reports them as before.
fn count_panics() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        hook(info);
    }));
}

impl Task for Fuzz {
    fn run(self) -> Outcome<ExitCode> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let seed = self.seed.unwrap_or_else(now);
        let targets = match self.target {
            Some(target) => vec![target],
            None => Target::value_variants().to_vec(),
        };
        count_panics();
        for target in targets {
            match target {
                Target::Server => self.throw("server", seed, &server::ServerListener::new()?)?,
                Target::Client => self.throw("client", seed, &client::ClientListener::new(self.threads)?)?,
                Target::Qmp => self.throw("qmp", seed, &qmp::QmpListener::new()?)?,
                Target::Inspect => self.throw("inspect", seed, &inspect::InspectListener::new()?)?,
                Target::Mutants => self.throw("mutants", seed, &mutants::MutantListener::new()?)?,
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Fuzz {
    fn throw(&self, name: &str, seed: u64, listener: &dyn Listener) -> Outcome {
        // A process for each mutant.
        let executions = if self.target.is_none() && name == "mutants" {
            self.executions / MUTANTS_ONE_IN
        } else {
            self.executions
        };
        let started = Instant::now();
        let turn = TURN.min(executions.div_ceil(10)).max(1);
        let (next, done, early) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let speaker = || -> Outcome<Heard> {
            let mut heard = Heard::default();
            loop {
                let from = next.fetch_add(turn, Ordering::Relaxed);
                if from >= executions {
                    return Ok(heard);
                }
                let count = turn.min(executions - from);
                let answers = listener
                    .speak(seed.wrapping_add(from / turn), count)
                    .map_err(|e| format!("{name}, seed {seed}, after {from} executions: {e}"))?;
                heard.add(answers);
                let before = done.fetch_add(count, Ordering::Relaxed);
                if before + count >= executions / 10 && early.load(Ordering::Relaxed) == 0 {
                    early.store(resident(), Ordering::Relaxed);
                }
                if PANICS.load(Ordering::Relaxed) > 0 {
                    return Err(format!("{name}, seed {seed}, after {from} executions: a panic").into());
                }
            }
        };
        let heard = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads.max(1)).map(|_| scope.spawn(speaker)).collect();
            let mut heard = Heard::default();
            for thread in threads {
                heard.add(thread.join().map_err(|_| format!("{name}, seed {seed}: a panic"))??);
            }
            Outcome::Ok(heard)
        })?;
        listener.left().map_err(|e| format!("{name}, seed {seed}: {e}"))?;
        let (early, late) = (early.load(Ordering::Relaxed), resident());
        if late > early + MOST_GROWTH {
            return Err(format!(
                "{name}, seed {seed}: {} MiB more memory after {} executions",
                (late - early) >> 20,
                executions
            )
            .into());
        }
        if heard.honest == 0 || heard.done == 0 || heard.refused == 0 {
            return Err(format!("{name}, seed {seed}: too little was heard: {heard:?}").into());
        }
        heard.print(name, seed, executions, started.elapsed().as_secs_f64(), late);
        Ok(())
    }
}
