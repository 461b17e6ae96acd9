//! Runs a small concurrent program under the model checker, many times, each in another order.
//!
//! Only there with `--cfg shuttle`; `cargo xtask model` builds and runs the models so. What the program does
//! must depend on nothing but the order: it takes locks, threads and time from [`sync`](crate::sync), and
//! makes everything anew each time. A failure prints the schedule that led to it.

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

/// The default number of orders that are tried.
const ORDERS: usize = 300;
/// Priorities change so often in a run of the second kind: most bugs need two or three.
const DEPTH: usize = 3;

/// Runs `program` in so many random orders, and in as many in which few threads change places at chosen
/// points.
///
/// The environment says more: `BLOCKMIRROR_MODEL_ORDERS` how many, `BLOCKMIRROR_MODEL_SEED` which.
///
/// # Panics
/// When `program` does, when its threads wait for each other, and when it does not come to an end.
pub fn explore(program: impl Fn() + Send + Sync + 'static) {
    let number = |name, otherwise| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise);
    let orders = number("BLOCKMIRROR_MODEL_ORDERS", ORDERS as u64) as usize;
    let seed = number("BLOCKMIRROR_MODEL_SEED", 1);
    let mut config = Config::new();
    // Engines and formats go deeper than the checker thinks threads do.
    config.stack_size = 1 << 20;
    config.max_steps = MaxSteps::FailAfter(300_000);
    let program = std::sync::Arc::new(program);
    let again = std::sync::Arc::clone(&program);
    Runner::new(RandomScheduler::new_from_seed(seed, orders), config.clone()).run(move || again());
    Runner::new(PctScheduler::new_from_seed(seed, DEPTH, orders), config).run(move || program());
}
