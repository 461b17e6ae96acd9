//! Groups: jobs on several taps that end at one instant, all or none.
//!
//! The coordinator is that of real groups. It visits one member at a time, and before each visit the
//! generator may choose another party to act: a guest, a worker of a job, an operator with a verb for one
//! member. Must hold: when the first member ends well, no guest write is under way anywhere and every target
//! is equal and durable; then all end well, and otherwise none does.

use std::cell::RefCell;
use std::time::Duration;

use blockmirror_block::testing::Rng;

use super::environment::{Environment, MODES};
use super::guest::{Workload, Write};
use super::steps::Step;
use super::workers::Workers;
use super::{End, Trace};
use crate::error::Error;
use crate::group::{Coordinator, GroupEvent, Members};
use crate::machine::MemberStage;
use crate::machine::{Admission, Core, Done, Ending, Next, TargetWriter};
use crate::progress::Operation;
use crate::state::{JobState, Verb};

/// Steps after which the guests rest, nothing fails any more, and the operator only wants the end.
const STEPS: u32 = 2000;
/// Steps after which a schedule is taken to hang.
const MAX_STEPS: u32 = 400_000;

/// Runs one schedule.
pub(super) fn run(seed: u64, trace: &mut Trace) -> End {
    let mut rng = Rng::from_state(seed ^ 0x9609);
    let by_itself = rng.one_in(2);
    let count = 2 + rng.index(2);
    let mut worlds = Vec::new();
    for _ in 0..count {
        let mut environment = Environment::random(&mut rng);
        environment.config.live = true;
        environment.config.auto_finalize = by_itself || rng.one_in(2);
        environment.config.auto_dismiss = rng.one_in(2);
        environment.config.copy_mode = rng.pick(&MODES);
        environment.faults.one_in *= 8;
        worlds.push(environment);
    }
    let workload = Workload::random();
    let members = worlds.iter().map(|environment| Member::new(environment, &mut rng)).collect();
    let sim = GroupSim { rng, members, workload, now: Duration::ZERO, closing: false, trace };
    let mut coordinator = Coordinator::default();
    let sim = RefCell::new(sim);
    for step in 0..MAX_STEPS {
        if step == STEPS {
            sim.borrow_mut().close();
        }
        if sim.borrow_mut().rng.one_in(12) {
            coordinator.poll(&sim);
            while let Some(event) = coordinator.take_event() {
                sim.borrow_mut().on_event(event);
            }
        }
        let mut sim = sim.borrow_mut();
        sim.step();
        if coordinator.is_over() && sim.members.iter().all(|member| member.writes.is_empty()) {
            break;
        }
    }
    let sim = sim.into_inner();
    assert!(
        coordinator.is_over(),
        "hangs: {:?}",
        sim.members.iter().map(|m| m.core.view()).collect::<Vec<_>>()
    );
    sim.check_end()
}

struct GroupSim<'w> {
    rng: Rng,
    members: Vec<Member<'w>>,
    workload: Workload,
    now: Duration,
    /// The guests rest, and the operator only wants the end.
    closing: bool,
    trace: &'w mut Trace,
}

struct Member<'w> {
    environment: &'w Environment,
    core: Core,
    workers: Workers<'w>,
    writes: Vec<Write>,
    /// How it is to end.
    wish: Ending,
    ended: Option<Ending>,
}

impl Members for RefCell<GroupSim<'_>> {
    fn count(&self) -> usize {
        self.borrow().members.len()
    }

    fn name(&self, index: usize) -> String {
        index.to_string()
    }

    fn with<R>(&self, index: usize, f: impl FnOnce(&mut Core, Duration) -> R) -> R {
        let mut sim = self.borrow_mut();
        // Guests and jobs go on while the coordinator goes from one member to the next.
        while sim.rng.one_in(3) {
            sim.step();
        }
        let now = sim.now;
        let core = &mut sim.members[index].core;
        core.on_timer(now);
        f(core, now)
    }
}

impl<'w> Member<'w> {
    fn new(environment: &'w Environment, rng: &mut Rng) -> Self {
        let mut core = Core::new(environment.config.clone()).unwrap();
        core.join_group();
        let wish = rng.pick(&[Ending::Pivot, Ending::Keep]);
        Self {
            environment,
            core,
            workers: Workers::new(environment, false),
            writes: Vec::new(),
            wish,
            ended: None,
        }
    }

    /// No write of the guest is under way, and the target is equal and durable.
    fn assert_one_instant(&self) {
        let under_way = self.writes.iter().filter(|write| write.admission != Admission::Wait).count();
        assert_eq!(under_way, 0, "writes under way");
        assert!(self.workers.unflushed.is_empty() && self.workers.through.is_empty(), "not flushed");
        assert_eq!(self.environment.difference(&[]), None, "first difference");
    }
}

impl GroupSim<'_> {
    /// A random verb for a random member.
    fn step(&mut self) {
        let index = self.rng.index(self.members.len());
        self.trace.member = index;
        self.members[index].core.on_timer(self.now);
        match self.rng.below(16) {
            0..4 => self.ask(index),
            4..9 => self.perform_half(index),
            9..14 => self.guest(index),
            14 => self.operator(index),
            _ => self.now += Duration::from_micros(self.rng.below(30_000)),
        }
        let core = &mut self.members[index].core;
        for event in core.take_events() {
            self.trace.step(self.now, Step::Emitted(&event));
        }
        self.trace.step(self.now, Step::Shows(&core.progress(self.now)));
    }

    fn close(&mut self) {
        self.trace.step(self.now, Step::Closes);
        self.closing = true;
        self.members.iter_mut().for_each(|member| member.workers.faults.clear());
    }

    fn on_event(&mut self, event: GroupEvent) {
        self.trace.step(self.now, Step::GroupEmitted(&event));
        let well = self.members.iter().filter(|member| member.ended.is_some()).count();
        match event {
            GroupEvent::Completed => assert_eq!(well, self.members.len()),
            GroupEvent::Failed { .. } | GroupEvent::Cancelled => {
                assert_eq!(well, 0, "some ended, some did not")
            }
            GroupEvent::Ready | GroupEvent::Pending => assert_eq!(well, 0, "too late"),
        }
    }

    fn ask(&mut self, index: usize) {
        let member = &mut self.members[index];
        let next = member.core.next(self.now);
        self.trace.step(self.now, Step::Asked(&next));
        match next {
            Next::Finished => {}
            Next::Do(action) => {
                member.workers.take(&mut self.rng, self.now, action);
            }
            Next::Wait(Some(until)) if member.workers.are_empty() && self.rng.one_in(4) => {
                assert!(until > self.now, "waiting for the past spins");
                self.now = until;
            }
            Next::Wait(_) => {}
        }
    }

    fn perform_half(&mut self, index: usize) {
        let member = &mut self.members[index];
        let Some(op) = member.workers.pick(&mut self.rng, self.now) else {
            let next = self.members.iter().filter_map(|member| member.workers.next_time(self.now)).min();
            if let Some(next) = next.filter(|_| self.rng.one_in(8)) {
                self.now = next;
            }
            return;
        };
        let end = member.workers.perform_half(&mut member.core, &mut self.rng, self.now, op, self.trace);
        if let Some((id, ending)) = end {
            self.trace.step(self.now, Step::JobDisks { id, ending });
            self.end(index, ending);
            self.members[index].core.on_completion(self.now, id, Ok(Done::Ended));
        }
    }

    fn end(&mut self, index: usize, ending: Ending) {
        let first = self.members.iter().all(|member| member.ended.is_none());
        for (other, member) in self.members.iter().enumerate() {
            if first || other == index {
                let stage = member.core.view().stage;
                assert_eq!(stage, MemberStage::Prepared, "{index} ends, and {other} is not sure to");
                member.assert_one_instant();
            }
        }
        self.members[index].ended = Some(ending);
    }

    fn guest(&mut self, index: usize) {
        let (now, closing) = (self.now, self.closing);
        let member = &mut self.members[index];
        let len = member.environment.len();
        if member.writes.len() < self.workload.writers
            && len > 0
            && !closing
            && self.rng.one_in(self.workload.begin_one_in)
        {
            let mut write = Write::random(&mut self.rng, len, &self.workload);
            write.ticket = member.core.on_guest_write(write.range);
            self.trace.step(now, Step::GuestBegins { ticket: write.ticket, range: write.range });
            member.writes.push(write);
            return;
        }
        if member.writes.is_empty() {
            return;
        }
        let nth = self.rng.index(member.writes.len());
        let mut write = member.writes.swap_remove(nth);
        let more = match (write.admission, write.source) {
            (Admission::Wait, _) => {
                let (ticket, answer) = (write.ticket, member.core.guest_admit(write.ticket));
                write.admission = answer;
                self.trace.step(now, Step::GuestAsks { ticket, answer });
                if answer == Admission::Wait && member.core.resume_if_overdue(now) {
                    self.trace.step(now, Step::Overdue);
                }
                write.admission != Admission::JobEnded
            }
            (_, None) => {
                let fails = member.workers.faults.one_in > 0 && self.rng.one_in(10);
                write.put(&mut self.rng, &member.environment.source, fails);
                write.source = Some(!fails);
                self.trace.step(now, Step::GuestAtSource { ticket: write.ticket, fails });
                if write.admission == Admission::SourceAndTarget
                    && !member.core.guest_at_target(write.ticket, TargetWriter::Tap)
                {
                    write.admission = Admission::SourceOnly;
                }
                true
            }
            (Admission::SourceAndTarget, Some(true)) if write.target.is_none() => {
                let failure = member.workers.faults.inject(&mut self.rng, Operation::Write, write.range);
                write.put_at_target(
                    &mut self.rng,
                    &member.environment.source,
                    &member.environment.target,
                    failure,
                );
                member.workers.through.push(write.range);
                let (ticket, result) = (write.ticket, &write.target);
                self.trace.step(now, Step::GuestAtTarget { ticket, result });
                true
            }
            (_, Some(ok)) => {
                self.trace.step(now, Step::GuestEnds { ticket: write.ticket });
                member.core.guest_finished(write.ticket, ok, write.target.take().flatten());
                false
            }
        };
        if more {
            member.writes.push(write);
        }
    }

    fn operator(&mut self, index: usize) {
        let member = &mut self.members[index];
        let state = member.core.progress(self.now).state;
        if self.closing {
            let _ = member.core.resume();
            let _ = match member.wish {
                Ending::Keep if state == JobState::Ready => member.core.cancel(),
                Ending::Keep => Ok(()),
                _ => member.core.complete(),
            };
            let _ = member.core.finalize();
            return;
        }
        let verb = self.rng.pick(&Verb::ALL);
        let fatal = verb == Verb::ForceCancel || (verb == Verb::Cancel && state == JobState::Running);
        if fatal && !self.rng.one_in(60) || verb == Verb::Pause && !self.rng.one_in(3) {
            return;
        }
        // What is refused when is the matter of other schedules.
        let answer = match verb {
            Verb::Cancel => member.core.cancel(),
            Verb::ForceCancel => member.core.force_cancel(),
            Verb::Pause => member.core.pause(),
            Verb::Resume => {
                member.workers.faults.make_room();
                member.core.resume()
            }
            Verb::Change => member.core.change(self.rng.pick(&MODES)),
            Verb::Complete => member.core.complete(),
            Verb::Finalize => member.core.finalize(),
            Verb::SetSpeed => member.core.set_speed(self.now, 0),
            _ => return,
        };
        self.trace.step(self.now, Step::Asks { verb, answer });
    }

    fn check_end(mut self) -> End {
        let ends: Vec<Option<Ending>> = self.members.iter().map(|member| member.ended).collect();
        let results: Vec<_> =
            self.members.iter_mut().map(|member| member.core.take_result().unwrap()).collect();
        for (ended, result) in ends.iter().zip(&results) {
            assert_eq!(ended.is_some(), result.is_ok(), "{result:?}");
        }
        if results.iter().all(Result::is_ok) {
            return if ends.contains(&Some(Ending::Pivot)) { End::Pivoted } else { End::Kept };
        }
        assert!(results.iter().all(Result::is_err), "{ends:?}");
        let own = |error: &Error| !matches!(error, Error::Group { .. });
        let causes: Vec<Error> = results.into_iter().filter_map(Result::err).filter(own).collect();
        assert!(!causes.is_empty(), "no member was lost by itself");
        if causes.iter().all(|cause| matches!(cause, Error::Cancelled)) {
            End::Cancelled
        } else {
            End::Failed
        }
    }
}
