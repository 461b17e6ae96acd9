//! Scripted groups of bare cores, on a virtual clock: all end or none.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange, ErrorKind, Geometry};

use super::GroupEvent;
use super::coordinator::{Coordinator, Members};
use crate::error::Error;
use crate::machine::config::Config;
use crate::machine::{Action, Admission, Cloned, Core, Done, Ending, Moved, Next, Work};
use crate::options::{CopyMode, MirrorOptions, OnError};
use crate::progress::{Event, Operation};
use crate::scan::{CopyAction, CopyExtent, Failure};
use crate::state::{JobState, Refused, Verb};

const M: u64 = 1 << 20;

/// Two members and who brings them together.
struct Group {
    cores: Vec<RefCell<Core>>,
    coordinator: RefCell<Coordinator>,
    now: Cell<Duration>,
}

impl Members for Group {
    fn count(&self) -> usize {
        self.cores.len()
    }

    fn name(&self, index: usize) -> String {
        format!("disk{index}")
    }

    fn with<R>(&self, index: usize, f: impl FnOnce(&mut Core, Duration) -> R) -> R {
        let mut core = self.cores[index].borrow_mut();
        core.on_timer(self.now.get());
        f(&mut core, self.now.get())
    }
}

fn honest(work: Work) -> Done {
    match work {
        Work::Scan { range, .. } => Done::Scanned(vec![CopyExtent {
            range,
            action: CopyAction::Copy { target_zero: false },
            below: false,
        }]),
        Work::Copy { range, .. } => Done::Copied(Moved { copied: range.len(), ..Moved::default() }),
        Work::Clone { range, .. } => Done::Cloned(Cloned { end: range.end(), ..Cloned::default() }),
        Work::Zero { .. } => Done::Zeroed,
        Work::Flush | Work::PeriodicFlush => Done::Flushed,
        Work::End(_) => Done::Ended,
    }
}

impl Group {
    fn new(options: [MirrorOptions; 2]) -> Self {
        let core = |options: &MirrorOptions| {
            let mut config = Config::new(options, 65_536, M, Geometry::plain());
            config.live = true;
            let mut core = Core::new(config).unwrap();
            core.join_group();
            RefCell::new(core)
        };
        Self {
            cores: options.iter().map(core).collect(),
            coordinator: RefCell::default(),
            now: Cell::new(Duration::ZERO),
        }
    }

    /// Both are ready, and the events of before are gone.
    fn ready(options: MirrorOptions) -> Self {
        let group = Self::new([options.clone(), options]);
        group.drive(0);
        group.poll();
        assert!(group.events().is_empty(), "one of them is not ready");
        group.drive(1);
        group.poll();
        assert_eq!(group.events(), [GroupEvent::Ready]);
        for index in 0..2 {
            group.core(index, |core| core.take_events());
        }
        group
    }

    fn core<R>(&self, index: usize, f: impl FnOnce(&mut Core) -> R) -> R {
        self.with(index, |core, _| f(core))
    }

    fn poll(&self) {
        self.coordinator.borrow_mut().poll(self);
    }

    fn events(&self) -> Vec<GroupEvent> {
        std::iter::from_fn(|| self.coordinator.borrow_mut().take_event()).collect()
    }

    fn next(&self, index: usize) -> Option<Action> {
        match self.core(index, |core| core.next(self.now.get())) {
            Next::Do(action) => Some(action),
            Next::Wait(_) | Next::Finished => None,
        }
    }

    fn report(&self, index: usize, action: Action, result: Result<Done, Failure>) {
        self.core(index, |core| core.on_completion(self.now.get(), action.id, result));
    }

    /// Performs everything that member `index` has to do, as honest devices do; what came out.
    fn drive(&self, index: usize) -> Vec<Work> {
        let mut log = Vec::new();
        while let Some(action) = self.next(index) {
            log.push(action.work);
            self.report(index, action, Ok(honest(action.work)));
        }
        log
    }

    /// Drives both and the coordinator until nothing moves; the ends that were performed.
    fn settle(&self) -> Vec<(usize, Ending)> {
        let mut ends = Vec::new();
        loop {
            self.poll();
            let logs = [self.drive(0), self.drive(1)];
            for (index, log) in logs.iter().enumerate() {
                ends.extend(log.iter().filter_map(|work| match work {
                    Work::End(ending) => Some((index, *ending)),
                    _ => None,
                }));
            }
            if logs.iter().all(Vec::is_empty) {
                self.poll();
                return ends;
            }
        }
    }

    fn complete(&self) {
        for index in 0..2 {
            self.core(index, Core::complete).unwrap();
        }
    }

    fn begin(&self, index: usize, start: u64, end: u64) -> (u64, Admission) {
        self.core(index, |core| {
            let id = core.on_guest_write(ByteRange::new(start, end));
            (id, core.guest_admit(id))
        })
    }

    fn finish(&self, index: usize, id: u64) {
        self.core(index, |core| core.guest_finished(id, true, None));
    }

    /// Whether a guest of member `index` would have to wait now.
    fn holds(&self, index: usize) -> bool {
        self.core(index, |core| core.overdue_at().is_some())
    }

    fn state(&self, index: usize) -> JobState {
        self.core(index, |core| core.progress(Duration::ZERO).state)
    }

    fn attempts(&self) -> u64 {
        self.coordinator.borrow().attempts()
    }

    fn wait(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }
}

fn io_error() -> Failure {
    Failure { operation: Operation::Write, error: block::Error::new(ErrorKind::Io, "test") }
}

const PIVOTS: [(usize, Ending); 2] = [(0, Ending::Pivot), (1, Ending::Pivot)];
const REST: Duration = Duration::from_millis(5);

#[test]
fn no_member_ends_before_the_end_of_all_was_asked_for_and_then_all_do() {
    let group = Group::ready(MirrorOptions::new());
    group.core(0, Core::complete).unwrap();
    assert!(group.settle().is_empty());
    assert!(!group.holds(0), "no guest is quiesced while others are not asked");
    group.core(1, Core::complete).unwrap();
    assert_eq!(group.settle(), PIVOTS);
    assert_eq!((group.events(), group.attempts()), (vec![GroupEvent::Completed], 1));
    for index in 0..2 {
        let events = group.core(index, |core| core.take_events());
        let states = [JobState::Waiting, JobState::Pending].map(Event::Status);
        let end = [Event::Completed { error: None }].into_iter();
        let end = end.chain([JobState::Concluded, JobState::Null].map(Event::Status));
        assert_eq!(events, states.into_iter().chain(end).collect::<Vec<_>>());
    }
}

#[test]
fn each_ends_as_it_was_asked_to() {
    let group = Group::ready(MirrorOptions::new());
    group.core(0, Core::complete).unwrap();
    group.core(1, Core::cancel).unwrap();
    assert_eq!(group.settle(), [(0, Ending::Pivot), (1, Ending::Keep)]);
}

#[test]
fn every_guest_is_quiesced_until_every_member_is_clean_and_flushed() {
    let group = Group::ready(MirrorOptions::new());
    let (write, _) = group.begin(1, 0, 512);
    group.complete();
    group.poll();
    assert!(group.holds(0) && group.holds(1));
    assert_eq!(group.drive(0), [Work::Flush]);
    group.poll();
    assert!(group.drive(0).is_empty(), "settled, but the other is not");
    assert_eq!(group.begin(0, 0, 1).1, Admission::Wait);
    group.finish(1, write);
    let flush = loop {
        let action = group.next(1).unwrap();
        if action.work == Work::Flush {
            break action;
        }
        group.report(1, action, Ok(honest(action.work)));
        group.poll();
    };
    assert!(group.next(0).is_none());
    group.report(1, flush, Ok(Done::Flushed));
    group.poll();
    assert_eq!(
        (group.drive(0), group.drive(1)),
        (vec![Work::End(Ending::Pivot)], vec![Work::End(Ending::Pivot)])
    );
}

#[test]
fn one_failed_flush_resumes_all_guests_and_a_later_attempt_succeeds() {
    for policy in [OnError::Ignore, OnError::Stop] {
        let group = Group::ready(MirrorOptions::new().on_target_error(policy));
        group.complete();
        group.poll();
        assert_eq!(group.drive(0), [Work::Flush]);
        let flush = group.next(1).unwrap();
        group.report(1, flush, Err(io_error()));
        group.poll();
        assert!(!group.holds(0) && !group.holds(1));
        let (write, admission) = group.begin(0, 0, 1);
        assert_eq!(admission, Admission::SourceOnly);
        group.finish(0, write);
        if policy == OnError::Stop {
            assert!(group.settle().is_empty());
            assert!(!group.holds(0), "the other is stopped by an error");
            group.core(1, Core::resume).unwrap();
        }
        group.wait(Duration::from_secs(1));
        assert_eq!(group.settle(), PIVOTS);
        assert_eq!((group.attempts(), group.events()), (2, vec![GroupEvent::Completed]));
    }
}

#[test]
fn dirt_at_the_final_check_of_one_resumes_all_guests() {
    let group = Group::ready(MirrorOptions::new());
    group.complete();
    group.poll();
    let flush = group.next(1).unwrap();
    group.drive(0);
    group.core(1, |core| core.mark_dirty(ByteRange::new(0, 1)));
    group.report(1, flush, Ok(Done::Flushed));
    group.poll();
    assert!(!group.holds(0) && !group.holds(1));
    assert_eq!(group.attempts(), 1);
    assert!(group.settle().is_empty(), "the guest of the other goes on for a while");
    group.wait(REST);
    assert_eq!(group.settle(), PIVOTS);
}

/// Dirt that comes between the poll of a member and its prepare.
#[test]
fn a_prepare_that_one_refuses_is_rolled_back_for_all() {
    let group = Group::ready(MirrorOptions::new());
    group.complete();
    group.poll();
    group.drive(0);
    group.drive(1);
    assert!(group.core(0, Core::prepare));
    group.core(1, |core| core.mark_dirty(ByteRange::new(0, 1)));
    assert!(!group.core(1, Core::prepare));
    for index in 0..2 {
        group.core(index, Core::resume_for_group);
        assert!(!group.holds(index));
    }
    group.wait(REST);
    assert_eq!(group.settle(), PIVOTS);
}

#[test]
fn a_member_that_fails_before_the_end_takes_all_with_it() {
    let group = Group::ready(MirrorOptions::new());
    group.complete();
    group.poll();
    assert_eq!(group.drive(0), [Work::Flush]);
    let flush = group.next(1).unwrap();
    group.report(1, flush, Err(io_error()));
    assert!(group.settle().is_empty(), "no member pivots");
    let failed =
        vec![GroupEvent::Failed { member: 1, error: "cannot write the target: test: I/O error".into() }];
    assert_eq!(group.events(), failed);
    let error = group.core(0, Core::take_result).unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "cancelled with its group: disk1: cannot write the target: test: I/O error"
    );
    assert!(group.core(0, |core| core.take_events()).contains(&Event::Cancelled));
    assert!(matches!(group.core(1, Core::take_result), Some(Err(Error::Target(_)))));
}

/// At any stage before the commit: while it copies, ready, quiesced, settled, pending.
#[test]
fn force_cancel_of_one_at_any_stage_takes_all_with_it() {
    for stage in 0..5 {
        let options = || MirrorOptions::new().auto_finalize(stage != 4);
        let group = if stage == 0 { Group::new([options(), options()]) } else { Group::ready(options()) };
        if stage >= 2 {
            group.complete();
            group.poll();
        }
        if stage >= 3 {
            group.drive(0);
        }
        if stage == 4 {
            group.settle();
            assert_eq!((group.state(0), group.state(1)), (JobState::Pending, JobState::Pending));
        }
        group.core(1, Core::force_cancel).unwrap();
        assert!(group.settle().is_empty(), "stage {stage}");
        assert_eq!(group.events().last(), Some(&GroupEvent::Cancelled));
        assert!(matches!(group.core(1, Core::take_result), Some(Err(Error::Cancelled))));
        let other = group.core(0, Core::take_result).unwrap().unwrap_err();
        assert_eq!(other.to_string(), "cancelled with its group: disk1: cancelled");
    }
}

#[test]
fn between_prepare_and_end_nothing_stops_a_member_and_a_rollback_remembers() {
    for broken in [false, true] {
        let group = Group::ready(MirrorOptions::new());
        group.complete();
        group.poll();
        group.drive(0);
        group.drive(1);
        assert!(group.core(0, Core::prepare) && group.core(1, Core::prepare));
        group.wait(Duration::from_secs(1000));
        assert!(group.core(0, |core| !core.resume_if_overdue(Duration::from_secs(1000))));
        assert!(matches!(group.core(0, Core::pause), Err(Refused::State { verb: Verb::Pause, .. })));
        assert!(group.next(0).is_none(), "not before all are prepared");
        group.core(0, Core::force_cancel).unwrap();
        if broken {
            group.core(0, Core::resume_for_group);
            group.core(1, Core::resume_for_group);
            assert!(group.settle().is_empty());
            assert_eq!(group.events(), [GroupEvent::Cancelled]);
        } else {
            group.core(0, Core::commit);
            group.core(1, Core::commit);
            assert_eq!(
                (group.drive(0), group.drive(1)),
                (vec![Work::End(Ending::Pivot)], vec![Work::End(Ending::Pivot)])
            );
        }
    }
}

/// With `auto_finalize` off for one, all wait; the copies go on; one word ends all.
#[test]
fn one_that_is_to_be_finalized_makes_all_wait_for_it() {
    let group = Group::new([MirrorOptions::new().auto_finalize(false), MirrorOptions::new()]);
    group.settle();
    group.complete();
    assert!(group.settle().is_empty());
    assert_eq!(group.events(), [GroupEvent::Ready, GroupEvent::Pending]);
    let tells = |index| group.core(index, |core| core.take_events()).contains(&Event::Pending);
    assert_eq!((tells(0), tells(1)), (true, false));
    assert_eq!((group.state(0), group.state(1)), (JobState::Pending, JobState::Pending));
    let (write, admission) = group.begin(1, 0, 512);
    assert_eq!(admission, Admission::SourceOnly, "no guest is quiesced meanwhile");
    group.finish(1, write);
    assert!(group.settle().is_empty());
    group.core(1, Core::finalize).unwrap();
    assert_eq!(group.settle(), PIVOTS);
}

#[test]
fn while_one_is_paused_no_guest_is_quiesced() {
    let group = Group::ready(MirrorOptions::new());
    group.core(1, Core::pause).unwrap();
    group.complete();
    assert!(group.settle().is_empty());
    assert!(!group.holds(0));
    group.core(1, Core::resume).unwrap();
    assert_eq!(group.settle(), PIVOTS);
}

/// A guest of one that writes on and on while the other is slow waits no longer than the limit.
#[test]
fn a_guest_write_that_waits_too_long_ends_the_attempt_for_all() {
    let group = Group::ready(MirrorOptions::new().copy_mode(CopyMode::WriteBlocking));
    group.complete();
    group.poll();
    group.drive(0);
    let flush = group.next(1).unwrap();
    let (write, admission) = group.begin(0, 0, 512);
    assert_eq!(admission, Admission::Wait);
    group.wait(Duration::from_secs(1));
    assert!(group.core(0, |core| core.resume_if_overdue(Duration::from_secs(1))));
    assert_eq!(group.core(0, |core| core.guest_admit(write)), Admission::SourceAndTarget);
    group.poll();
    assert!(!group.holds(1));
    group.core(0, |core| core.guest_finished(write, true, Some(Ok(()))));
    group.report(1, flush, Ok(Done::Flushed));
    assert!(group.settle().is_empty(), "the guests go on for as long as they were held");
    group.wait(Duration::from_secs(1));
    assert_eq!(group.settle(), PIVOTS);
    assert_eq!(group.attempts(), 2);
}
