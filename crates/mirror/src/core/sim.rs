//! The core alone, on a virtual clock: random schedules with simulated devices, failures and a guest that
//! writes.
//!
//! One schedule is one seed. A single thread plays all the threads of a job, the guest, the operator and the
//! clock: at each step the dice choose who does what, and whether the devices let it succeed, late or at all.
//! Nothing else is made up: the core is the one that jobs run, and data moves as it does there. What must
//! hold is asserted at every step and at the end; a schedule that breaks a rule is played again with a trace.
//!
//! A [`Scenario`] is a way to throw the dice. `copy` and `live` know no bounds; the others lean on one known
//! way to get a mirror wrong. `cargo xtask simulate` plays as many as one likes; a new scenario is a file
//! with a `play` function and a line in [`SCENARIOS`].

mod copy;
mod group;
mod guest;
mod hands;
mod live;
#[cfg(test)]
mod provocations;
pub(super) mod rng;
mod slants;
mod steps;
mod world;

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::time::Duration;

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
    /// The job was given up on request.
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

/// A way to throw the dice.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// One word, to name it by.
    pub name: &'static str,
    /// What it is about, in one line.
    pub about: &'static str,
    /// Its share of the seeds.
    weight: u64,
    play: fn(u64, &mut Trace) -> End,
}

/// How a schedule without a violation ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Played {
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
        play: copy::play,
    },
    Scenario { name: "live", about: "jobs on a tap, any verb at any time", weight: 6, play: live::play },
    Scenario {
        name: "hot",
        about: "8 writers on one granule, slow source (1)",
        weight: 1,
        play: slants::hot,
    },
    Scenario {
        name: "rewrite",
        about: "rewrites while the target is slow (2)",
        weight: 1,
        play: slants::rewrite,
    },
    Scenario {
        name: "reorder",
        about: "one hot spot, 16 in flight, random delays (3)",
        weight: 1,
        play: slants::reorder,
    },
    Scenario {
        name: "last-look",
        about: "writers through every end (4)",
        weight: 1,
        play: slants::last_look,
    },
    Scenario {
        name: "unaligned",
        about: "unaligned writes through dirty granules (5)",
        weight: 1,
        play: slants::unaligned,
    },
    Scenario {
        name: "prefilled",
        about: "zeros and holes over a target full of 0x2a (7)",
        weight: 1,
        play: slants::prefilled,
    },
    Scenario { name: "odd", about: "lengths that fit nothing (8)", weight: 1, play: slants::odd },
    Scenario {
        name: "errors",
        about: "failures of all kinds under all policies (10)",
        weight: 1,
        play: slants::errors,
    },
    Scenario {
        name: "flush",
        about: "flushes that fail and lose what they should keep (11)",
        weight: 1,
        play: slants::flush,
    },
    Scenario {
        name: "group",
        about: "jobs on several disks that end at one instant, any verb at any time",
        weight: 2,
        play: group::play,
    },
    Scenario { name: "paused", about: "pauses at any time (12)", weight: 1, play: slants::paused },
    Scenario {
        name: "crowd",
        about: "12 writers through a few granules, failures",
        weight: 1,
        play: slants::crowd,
    },
];

/// A rule that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The scenario's name.
    pub scenario: &'static str,
    /// The schedule.
    pub seed: u64,
    /// The assertion that failed.
    pub rule: String,
    /// What happened before, oldest first, as far as it was kept.
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

    /// The scenario that `seed` plays where none is asked for.
    pub fn of_seed(seed: u64) -> &'static Self {
        let all: u64 = SCENARIOS.iter().map(|scenario| scenario.weight).sum();
        let mut at = rng::Rng::new(seed).below(all);
        for scenario in SCENARIOS {
            if at < scenario.weight {
                return scenario;
            }
            at -= scenario.weight;
        }
        &SCENARIOS[0]
    }

    /// Plays one schedule; how it ended, and a hash over its steps.
    ///
    /// # Errors
    /// The rule that was broken. The panic that it is made of is printed by whatever panic hook there is.
    pub fn play(&self, seed: u64) -> Result<Played, Box<Violation>> {
        let once = |trace: &mut Trace| panic::catch_unwind(AssertUnwindSafe(|| (self.play)(seed, trace)));
        let mut first = Trace::default();
        let rule = match once(&mut first) {
            Ok(end) => return Ok(Played { end, hash: first.hash.value() }),
            Err(rule) => rule,
        };
        let mut trace = Trace { on: true, ..Trace::default() };
        let again = once(&mut trace).err();
        let rule = match (message(&*rule), again.map(|again| message(&*again))) {
            (first, Some(second)) if first == second => first,
            (first, second) => {
                format!("{first}; played again: {}", second.as_deref().unwrap_or("no violation"))
            }
        };
        let trace = trace.lines.into();
        Err(Box::new(Violation { scenario: self.name, seed, rule, trace }))
    }
}

/// What a panic said.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic without words").to_owned()
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
        let member = self.member;
        self.say(now, || format!("{member}: {step}"));
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

    /// Plays `seeds` of a scenario; how often each end was reached.
    pub(super) fn tally(name: &str, seeds: Range<u64>) -> BTreeMap<End, u64> {
        let scenario = Scenario::named(name).unwrap();
        let mut ends = BTreeMap::new();
        for seed in seeds {
            let played = scenario.play(seed).unwrap_or_else(|violation| panic!("{violation}"));
            *ends.entry(played.end).or_default() += 1;
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
            let hashes: Vec<u64> = (0..4).map(|seed| scenario.play(seed).unwrap().hash).collect();
            let again: Vec<u64> = (0..4).map(|seed| scenario.play(seed).unwrap().hash).collect();
            assert_eq!(hashes, again, "{}", scenario.name);
            assert!(hashes.windows(2).all(|pair| pair[0] != pair[1]), "{}: {hashes:x?}", scenario.name);
        }
    }

    /// The report of a broken rule is enough to reproduce it.
    #[test]
    fn a_violation_names_its_seed_and_comes_with_a_trace() {
        fn play(seed: u64, trace: &mut Trace) -> End {
            trace.say(Duration::from_millis(2), || format!("seed {seed} begins"));
            assert!(seed != 7, "seven is not allowed");
            End::Copied
        }
        let scenario = Scenario { name: "picky", about: "", weight: 1, play };
        assert_eq!(scenario.play(6).unwrap().end, End::Copied);
        insta::assert_snapshot!(scenario.play(7).unwrap_err(), @"
        2.0000 ms  seed 7 begins
        scenario picky, seed 7: seven is not allowed
        ");
    }
}
