//! Simulator: the core on a virtual clock, in random schedules with simulated devices, failures and a guest
//! that writes.
//!
//! One schedule is one seed. A single thread takes the parts of the job's workers, the guest, the operator
//! and the clock: at each step the generator chooses the party, and whether the devices succeed, late or at
//! all. The core is the one of real jobs, and data moves as it does there. The invariants are asserted at
//! every step and at the end; a schedule that breaks one is run again with a trace.
//!
//! A [`Scenario`] is a distribution of schedules. `copy` and `live` are unrestricted; each of the others aims
//! at one known bug of mirrors. `cargo xtask simulate` runs any number of seeds; a new scenario is a function
//! in `targeted.rs` or a file with a `run` function, and a line in [`SCENARIOS`].

pub(crate) mod closed_loop;
mod copy;
mod environment;
mod group;
mod guest;
#[cfg(test)]
mod known_bugs;
mod live;
mod steps;
mod targeted;
mod workers;

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::time::Duration;

use blockmirror_block::testing::Rng;
use steps::{Step, StepHash};

/// Lines of a trace that are kept: the last ones.
const TRACE_LINES: usize = 400;

/// How a schedule ended, no rule broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum End {
    /// The target is equal and durable, and the job ended by itself.
    Copied,
    /// The guest went over to the target.
    Pivoted,
    /// The target stayed behind as a copy.
    Kept,
    /// The job was cancelled.
    Cancelled,
    /// The job failed and said why.
    Failed,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copied => "copied",
            Self::Pivoted => "pivoted",
            Self::Kept => "kept",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

/// A distribution of schedules.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it covers, in one line.
    pub about: &'static str,
    /// Its share of the seeds.
    weight: u64,
    schedule: fn(u64, &mut Trace) -> End,
}

/// What a schedule without a violation gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SeedRun {
    /// How it ended.
    pub end: End,
    /// A hash over its steps (virtual time, operation, range, result, event), from the first to the last.
    pub hash: u64,
}

/// All of them.
const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "copy",
        about: "one-shot copies of a disk that is written",
        weight: 4,
        schedule: copy::run,
    },
    Scenario { name: "live", about: "jobs on a tap, any verb at any time", weight: 6, schedule: live::run },
    Scenario {
        name: "hot",
        about: "8 writers on one granule, slow source (1)",
        weight: 1,
        schedule: targeted::hot,
    },
    Scenario {
        name: "rewrite",
        about: "rewrites while the target is slow (2)",
        weight: 1,
        schedule: targeted::rewrite,
    },
    Scenario {
        name: "reorder",
        about: "one hot spot, 16 in flight, random delays (3)",
        weight: 1,
        schedule: targeted::reorder,
    },
    Scenario {
        name: "final-check",
        about: "writers through every end (4)",
        weight: 1,
        schedule: targeted::final_check,
    },
    Scenario {
        name: "unaligned",
        about: "unaligned writes through dirty granules (5)",
        weight: 1,
        schedule: targeted::unaligned,
    },
    Scenario {
        name: "prefilled",
        about: "zeros and holes over a target full of 0x2a (7)",
        weight: 1,
        schedule: targeted::prefilled,
    },
    Scenario { name: "odd", about: "lengths that fit nothing (8)", weight: 1, schedule: targeted::odd },
    Scenario {
        name: "errors",
        about: "failures of all kinds under all policies (10)",
        weight: 1,
        schedule: targeted::errors,
    },
    Scenario {
        name: "flush",
        about: "flushes that fail and lose what they should keep (11)",
        weight: 1,
        schedule: targeted::flush,
    },
    Scenario {
        name: "group",
        about: "jobs on several disks that end at one instant, any verb at any time",
        weight: 2,
        schedule: group::run,
    },
    Scenario { name: "paused", about: "pauses at any time (12)", weight: 1, schedule: targeted::paused },
    Scenario {
        name: "crowd",
        about: "12 writers through a few granules, failures",
        weight: 1,
        schedule: targeted::crowd,
    },
    Scenario {
        name: "tickets",
        about: "writers that poll and hold tickets, some of which never end; copy-ups",
        weight: 1,
        schedule: targeted::tickets,
    },
    Scenario {
        name: "queues",
        about: "callers that never wait: they sleep until they are woken, in all modes",
        weight: 1,
        schedule: targeted::queues,
    },
    Scenario {
        name: "log",
        about: "a log of regions that differ, with little room; a crash at every step",
        weight: 2,
        schedule: targeted::log,
    },
];

/// A broken invariant.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The scenario's name.
    pub scenario: &'static str,
    /// The schedule.
    pub seed: u64,
    /// The assertion that failed.
    pub rule: String,
    /// The steps before it that were kept, oldest first.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        write!(f, "scenario {}, seed {}: {}", self.scenario, self.seed, self.rule)
    }
}

impl Scenario {
    /// All of them.
    pub fn all() -> &'static [Self] {
        SCENARIOS
    }

    /// The scenario of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SCENARIOS.iter().find(|scenario| scenario.name == name)
    }

    /// The scenario of `seed` where none is asked for.
    pub fn of_seed(seed: u64) -> &'static Self {
        let all: u64 = SCENARIOS.iter().map(|scenario| scenario.weight).sum();
        let mut at = Rng::from_state(seed).below(all);
        for scenario in SCENARIOS {
            if at < scenario.weight {
                return scenario;
            }
            at -= scenario.weight;
        }
        &SCENARIOS[0]
    }

    /// Runs one schedule.
    ///
    /// # Errors
    /// The rule that was broken. The panic behind it goes through the panic hook.
    pub fn run(&self, seed: u64) -> Result<SeedRun, Box<Violation>> {
        let once = |trace: &mut Trace| panic::catch_unwind(AssertUnwindSafe(|| (self.schedule)(seed, trace)));
        let mut first = Trace::default();
        let rule = match once(&mut first) {
            Ok(end) => return Ok(SeedRun { end, hash: first.hash.value() }),
            Err(rule) => rule,
        };
        let mut trace = Trace { on: true, ..Trace::default() };
        let again = once(&mut trace).err();
        let rule = match (message(&*rule), again.map(|again| message(&*again))) {
            (first, Some(second)) if first == second => first,
            (first, second) => {
                format!("{first}; run again: {}", second.as_deref().unwrap_or("no violation"))
            }
        };
        let trace = trace.lines.into();
        Err(Box::new(Violation { scenario: self.name, seed, rule, trace }))
    }
}

/// The message of a panic.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message").to_owned()
}

/// Takes the steps of a schedule: hashes each, and keeps the last as text if it is on.
#[derive(Debug, Default)]
struct Trace {
    on: bool,
    lines: VecDeque<String>,
    hash: StepHash,
    /// Which of several jobs the steps belong to.
    member: usize,
}

impl Trace {
    fn step(&mut self, now: Duration, step: Step<'_>) {
        self.hash.step(now, self.member, &step);
        // The figures follow every step: as text they would leave no room for what led to them.
        if !matches!(step, Step::Shows(_)) {
            let member = self.member;
            self.say(now, || format!("{member}: {step}"));
        }
    }

    /// Keeps a line that is no step.
    fn say(&mut self, now: Duration, line: impl FnOnce() -> String) {
        if self.on {
            if self.lines.len() == TRACE_LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(format!("{:.4} ms  {}", now.as_secs_f64() * 1e3, line()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::Range;

    use super::*;

    /// Runs `seeds` of a scenario; how often each end was reached.
    pub(super) fn tally(name: &str, seeds: Range<u64>) -> BTreeMap<End, u64> {
        let scenario = Scenario::named(name).unwrap();
        let mut ends = BTreeMap::new();
        for seed in seeds {
            let run = scenario.run(seed).unwrap_or_else(|violation| panic!("{violation}"));
            *ends.entry(run.end).or_default() += 1;
        }
        ends
    }

    #[test]
    fn two_thousand_copies_end_with_an_equal_target_or_a_reported_failure() {
        let ends = tally("copy", 0..2000);
        // Both ends must really have been reached, or the schedules prove nothing.
        assert!(ends[&End::Copied] > 1000 && ends[&End::Failed] > 100, "{ends:?}");
    }

    #[test]
    fn two_thousand_live_schedules_lose_no_write() {
        let ends = tally("live", 0..2000);
        let reached = |end| ends.get(&end).copied().unwrap_or(0);
        assert!(reached(End::Pivoted) > 200 && reached(End::Kept) > 200, "{ends:?}");
        assert!(reached(End::Cancelled) > 60 && reached(End::Failed) > 60, "{ends:?}");
    }

    #[test]
    fn a_thousand_groups_end_all_or_none() {
        let ends = tally("group", 0..1000);
        let reached = |end| ends.get(&end).copied().unwrap_or(0);
        assert!(reached(End::Pivoted) > 150 && reached(End::Kept) > 20, "{ends:?}");
        assert!(reached(End::Cancelled) > 20 && reached(End::Failed) > 20, "{ends:?}");
    }

    /// An abort beside a ticket that never ends is over all the same, and its bitmap has what the target
    /// lacks.
    #[test]
    fn a_thousand_schedules_with_leaked_tickets_end() {
        let ends = tally("tickets", 0..1000);
        let reached = |end| ends.get(&end).copied().unwrap_or(0);
        assert!(reached(End::Cancelled) > 200 && reached(End::Pivoted) > 40, "{ends:?}");
    }

    /// Callers that never wait keep no job from ending, and none sleeps while it would be admitted.
    #[test]
    fn a_thousand_schedules_of_callers_that_never_wait_end() {
        let ends = tally("queues", 0..1000);
        let reached = |end| ends.get(&end).copied().unwrap_or(0);
        assert!(reached(End::Pivoted) > 100 && reached(End::Kept) > 100, "{ends:?}");
        assert!(reached(End::Cancelled) > 20 && reached(End::Failed) > 20, "{ends:?}");
    }

    #[test]
    fn a_thousand_schedules_with_a_log_have_what_differs_marked() {
        let ends = tally("log", 0..1000);
        let reached = |end| ends.get(&end).copied().unwrap_or(0);
        assert!(reached(End::Pivoted) > 100 && reached(End::Kept) > 100, "{ends:?}");
        assert!(reached(End::Cancelled) > 20 && reached(End::Failed) > 20, "{ends:?}");
    }

    #[test]
    fn every_scenario_gets_its_share_of_the_seeds() {
        let mut names: Vec<&str> = (0..500).map(|seed| Scenario::of_seed(seed).name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Scenario::all().len());
    }

    /// A schedule is a function of its seed, to the last step.
    #[test]
    fn a_seed_has_one_hash_and_seeds_differ() {
        for scenario in Scenario::all() {
            let hashes: Vec<u64> = (0..4).map(|seed| scenario.run(seed).unwrap().hash).collect();
            let again: Vec<u64> = (0..4).map(|seed| scenario.run(seed).unwrap().hash).collect();
            assert_eq!(hashes, again, "{}", scenario.name);
            assert!(hashes.windows(2).all(|pair| pair[0] != pair[1]), "{}: {hashes:x?}", scenario.name);
        }
    }

    /// The report of a broken rule is enough to reproduce it.
    #[test]
    fn a_violation_names_its_seed_and_comes_with_a_trace() {
        fn run(seed: u64, trace: &mut Trace) -> End {
            trace.say(Duration::from_millis(2), || format!("seed {seed} begins"));
            assert!(seed != 7, "seven is not allowed");
            End::Copied
        }
        let scenario = Scenario { name: "picky", about: "", weight: 1, schedule: run };
        assert_eq!(scenario.run(6).unwrap().end, End::Copied);
        insta::assert_snapshot!(scenario.run(7).unwrap_err(), @"
        2.0000 ms  seed 7 begins
        scenario picky, seed 7: seven is not allowed
        ");
    }
}
