//! One-shot copies: the job ends by itself; a guest writes to the source and marks it later, as a real one
//! does.
//!
//! In the end the target equals the source, or the job has said why not.

use std::time::Duration;

use blockmirror_block::ByteRange;
use blockmirror_block::testing::Rng;

use super::environment::{Environment, SPEEDS, write_randomly};
use super::steps::Step;
use super::workers::{Workers, range_of};
use super::{End, Trace};
use crate::error::Error;
use crate::machine::{Core, Next, Work};
use crate::options::OnError;
use crate::progress::{ErrorAction, Event, IoStatus, Operation};
use crate::state::{JobState, Verb};

/// Steps after which a schedule is taken to hang.
const MAX_STEPS: u32 = 400_000;

/// Runs one schedule.
pub(super) fn run(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed);
    let mut environment = Environment::random(&mut rng);
    if environment.options.on_source_error == OnError::Ignore && environment.len() > 0 && rng.one_in(4) {
        environment.faults.bad[Operation::Read as usize] =
            rng.byte_range(ByteRange::new(0, environment.len()), 1000);
    }
    if environment.options.on_target_error != OnError::Ignore {
        environment.faults.fills = rng.pick(&[0, 0, 200]);
    }
    let guest_writes = rng.pick(&[0, 3, 30]);
    run_in(rng, &environment, guest_writes, trace)
}

/// Runs a job in `environment`, with so many writes of the guest.
pub(super) fn run_in(rng: Rng, environment: &Environment, guest_writes: u64, trace: &mut Trace) -> End {
    trace.say(Duration::ZERO, || {
        format!("{:?}, {:?}, {:?}", environment.config, environment.latency, environment.faults)
    });
    let mut sim = Sim {
        rng,
        environment,
        core: Core::new(environment.config.clone()).unwrap(),
        workers: Workers::new(environment, false),
        now: Duration::ZERO,
        unmarked: Vec::new(),
        guest_writes,
        events: Vec::new(),
        offset: 0,
        standing: None,
        trace,
    };
    sim.run();
    sim.check_end()
}

struct Sim<'w> {
    rng: Rng,
    environment: &'w Environment,
    core: Core,
    workers: Workers<'w>,
    now: Duration,
    /// What the guest has written and not marked yet.
    unmarked: Vec<ByteRange>,
    guest_writes: u64,
    events: Vec<Event>,
    offset: u64,
    /// The offset at which a paused job stands.
    standing: Option<u64>,
    trace: &'w mut Trace,
}

impl Sim<'_> {
    fn run(&mut self) {
        for _ in 0..MAX_STEPS {
            match self.rng.below(12) {
                0..4 => {
                    if self.ask() {
                        break;
                    }
                }
                4..9 => self.perform_half(),
                9 => self.guest(),
                10 => self.operator(),
                _ => self.now += Duration::from_micros(self.rng.below(30_000)),
            }
            self.check_step();
        }
        assert!(self.workers.are_empty());
        assert!(self.core.is_concluded(), "the job hangs: {:?}", self.core.progress(self.now));
    }

    /// Asks for an action, as a thread does; whether the job is over.
    fn ask(&mut self) -> bool {
        let next = self.core.next(self.now);
        self.trace.step(self.now, Step::Asked(&next));
        match next {
            Next::Finished => return true,
            Next::Do(action) => {
                self.workers.take(&mut self.rng, self.now, action);
            }
            Next::Wait(until) => {
                // Nothing else can run: let the clock jump.
                if let Some(until) = until
                    && self.workers.are_empty()
                    && self.rng.one_in(2)
                {
                    assert!(until > self.now, "waiting for the past spins");
                    self.now = until;
                }
            }
        }
        false
    }

    fn perform_half(&mut self) {
        let Some(index) = self.workers.pick(&mut self.rng, self.now) else {
            if let Some(next) = self.workers.next_time(self.now) {
                self.now = next;
            }
            return;
        };
        if self.workers.work(index) == Work::Flush {
            // A writer waits for its mark before it calls a write done; the last flush comes after that.
            while let Some(range) = self.unmarked.pop() {
                self.core.mark_dirty(range);
            }
        }
        let end = self.workers.perform_half(&mut self.core, &mut self.rng, self.now, index, self.trace);
        assert_eq!(end, None, "only a job on a tap has a last step");
    }

    /// Writes to the source, or delivers a mark.
    fn guest(&mut self) {
        if !self.unmarked.is_empty() && self.rng.one_in(2) {
            let index = self.rng.index(self.unmarked.len());
            let range = self.unmarked.swap_remove(index);
            self.trace.step(self.now, Step::Marks(range));
            self.core.mark_dirty(range);
        } else if self.guest_writes > 0 && !self.core.is_concluded() {
            self.guest_writes -= 1;
            let range = write_randomly(&mut self.rng, &self.environment.source);
            self.trace.step(self.now, Step::WritesSource(range));
            self.unmarked.push(range);
        }
    }

    /// Resumes what an error stopped, and sometimes interferes.
    fn operator(&mut self) {
        let progress = self.core.progress(self.now);
        if progress.state == JobState::Paused {
            let stopped = self
                .events
                .iter()
                .any(|event| matches!(event, Event::Error { action, .. } if *action == ErrorAction::Stop));
            assert!(stopped || progress.io_status == IoStatus::Ok);
            self.workers.faults.make_room();
            let answer = self.core.resume();
            self.trace.step(self.now, Step::Asks { verb: Verb::Resume, answer });
            answer.unwrap();
            assert_eq!(self.core.progress(self.now).io_status, IoStatus::Ok);
        } else if self.rng.one_in(20) {
            let answer = self.core.pause();
            self.trace.step(self.now, Step::Asks { verb: Verb::Pause, answer });
            assert!(matches!(self.core.next(self.now), Next::Wait(None) | Next::Finished));
        } else if self.rng.one_in(20) {
            let speed = self.rng.pick(&SPEEDS);
            let answer = self.core.set_speed(self.now, speed);
            self.trace.step(self.now, Step::Asks { verb: Verb::SetSpeed, answer });
        }
    }

    /// What must hold at every moment.
    fn check_step(&mut self) {
        for event in self.core.take_events() {
            self.trace.step(self.now, Step::Emitted(&event));
            self.events.push(event);
        }
        let progress = self.core.progress(self.now);
        self.trace.step(self.now, Step::Shows(&progress));
        assert!(progress.offset >= self.offset, "the offset goes back");
        assert!(progress.len >= progress.offset && progress.in_flight <= progress.len - progress.offset);
        let moving: u64 =
            self.workers.works().filter(|w| !matches!(w, Work::Scan { .. })).map(|w| range_of(w).len()).sum();
        assert_eq!(progress.in_flight, moving, "what is in flight");
        self.offset = progress.offset;
        let stands = progress.state == JobState::Paused && self.workers.are_empty();
        if let Some(offset) = self.standing.filter(|_| stands) {
            assert_eq!(offset, progress.offset, "it moves while it is paused");
        }
        self.standing = stands.then_some(progress.offset);
    }

    fn check_end(&mut self) -> End {
        let failed = |side: Operation| {
            self.events.iter().any(|event| {
                matches!(event, Event::Error { operation, action: ErrorAction::Report, .. } if *operation == side)
            })
        };
        let injected = self.workers.faults.injected;
        match self.core.take_result().unwrap() {
            Err(Error::Source(_)) => assert!(injected[0] > 0 && failed(Operation::Read)),
            Err(Error::Target(_)) => assert!(injected[1] > 0 && failed(Operation::Write)),
            Err(other) => panic!("{other}"),
            Ok(()) => {
                self.compare();
                return End::Copied;
            }
        }
        End::Failed
    }

    fn compare(&self) {
        assert!(self.workers.unflushed.is_empty(), "the end without a flush");
        let progress = self.core.progress(self.now);
        assert_eq!((progress.offset, progress.dirty_left), (progress.len, 0));
        let given_up = self.core.given_up();
        assert_eq!(progress.given_up, given_up.iter().map(|g| g.range.len()).sum::<u64>());
        let faults = &self.workers.faults;
        let touched = self.core.whole_granules(faults.bad[Operation::Read as usize]);
        for gap in &given_up {
            assert!(faults.injected != [0, 0]);
            assert!(
                faults.one_in > 0 || touched.contains_range(gap.range),
                "gave up {} for {touched}",
                gap.range
            );
        }
        let gaps: Vec<ByteRange> = given_up.iter().map(|gap| gap.range).collect();
        assert_eq!(self.environment.difference(&gaps), None, "first difference");
    }
}
