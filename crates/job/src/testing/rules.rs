//! The rules that each kind of job follows.

use super::life::{Life, PLAIN, Stage};
use super::subject::{Disk, Kind, Setup};
use crate::{Event, JobState, OnError, Refused, Verb};

/// The job can be held in each state that its features promise. The other rules stand on this.
///
/// # Panics
/// If not.
pub fn check_stages(kind: &dyn Kind) {
    for stage in Stage::of(kind.features()) {
        assert_eq!(Life::at(kind, stage).state(), stage.state(), "{stage:?}");
    }
}

/// In each state, each verb is allowed or refused as the table says. Beyond the table, a job that is paused
/// refuses another pause and a cancel without force, and one that is not refuses to be resumed. A refusal
/// changes nothing.
///
/// # Panics
/// If not.
pub fn check_refusals(kind: &dyn Kind) {
    let features = kind.features();
    for stage in Stage::of(features) {
        for verb in Verb::ALL.into_iter().filter(|verb| !features.lacks.contains(verb)) {
            let life = Life::at(kind, stage).drained();
            let events = life.events().len();
            let answer = life.request(verb);
            assert_eq!(answer, expected(stage, verb), "{stage:?}, {verb}");
            if answer.is_err() {
                assert_eq!(life.state(), stage.state(), "{stage:?}, {verb}: a refusal");
                let life = life.drained();
                assert_eq!(life.events().len(), events, "{stage:?}, {verb}: {:?}", life.names());
            }
        }
    }
}

fn expected(stage: Stage, verb: Verb) -> Result<(), Refused> {
    let state = stage.state();
    if !state.allows(verb) {
        return Err(Refused::State { verb, state });
    }
    match verb {
        Verb::Pause | Verb::Cancel if stage.is_paused() => Err(Refused::Paused { verb }),
        Verb::Resume if !stage.is_paused() => Err(Refused::NotPaused),
        _ => Ok(()),
    }
}

/// Whatever is asked of the job in whatever state, it moves along the table, from `created` on.
///
/// # Panics
/// If not.
pub fn check_moves(kind: &dyn Kind) {
    let features = kind.features();
    for stage in Stage::of(features) {
        for verb in Verb::ALL.into_iter().filter(|verb| !features.lacks.contains(verb)) {
            let life = Life::at(kind, stage);
            let _ = life.request(verb);
            // Wherever that has led: on, and then to the end.
            let _ = life.request(Verb::Resume).and_then(|()| life.request(Verb::Pause));
            let _ = life.request(Verb::ForceCancel);
            assert_moves(&life.unblocked().until_over(), &format!("{stage:?}, {verb}"));
        }
    }
    let fails = Setup { disk: Disk::Fails, ..PLAIN };
    assert_moves(&Life::start(kind, fails).until_over(), "a failed disk");
}

fn assert_moves(life: &Life, context: &str) {
    let states: Vec<_> = life.events().iter().filter_map(status).collect();
    assert_eq!(states.first(), Some(&JobState::Created), "{context}: {:?}", life.names());
    for pair in states.windows(2) {
        assert!(
            pair[0].can_transition_to(pair[1]),
            "{context}: {} to {}: {:?}",
            pair[0],
            pair[1],
            life.names()
        );
    }
}

fn status(event: &Event) -> Option<JobState> {
    match event {
        Event::Status(state) => Some(*state),
        _ => None,
    }
}

/// The events of a life come in QEMU's order: of one that ends by itself, one that waits for each verb, and
/// one that is paused.
///
/// # Panics
/// If not.
pub fn check_event_order(kind: &dyn Kind) {
    let features = kind.features();
    let ends = if features.ready { &[Verb::Complete, Verb::Cancel][..] } else { &[] };
    let mut begin = vec!["created", "running"];
    begin.extend(features.ready.then_some(["ready", "READY"]).iter().flatten());

    let mut whole = begin.clone();
    whole.extend(["waiting", "pending", "COMPLETED", "concluded"]);
    whole.extend(features.dismisses_itself.then_some("null"));
    if ends.is_empty() {
        assert_eq!(Life::start(kind, PLAIN).until_over().names(), whole, "ends by itself");
    }
    for end in ends {
        let life = Life::start(kind, PLAIN).until(&Event::Ready).asked(*end).until_over();
        assert_eq!(life.names(), whole, "{end} when ready");
    }

    if features.finalizes {
        let setup = Setup { auto_finalize: false, auto_dismiss: false, ..PLAIN };
        let life = Life::start(kind, setup).complete(kind).until(&Event::Pending).asked(Verb::Finalize);
        let life = life.until_over().asked(Verb::Dismiss).drained();
        let mut asked = begin;
        asked.extend(["waiting", "pending", "PENDING", "COMPLETED", "concluded", "null"]);
        assert_eq!(life.names(), asked, "waits for each verb");
    }

    if features.interruptible {
        let life =
            Life::at(kind, Stage::PausedByUser).asked(Verb::Resume).unblocked().complete(kind).until_over();
        whole.splice(2..2, ["paused", "running"]);
        assert_eq!(life.names(), whole, "is paused and resumed");
    }
}

/// From each state that allows it, a cancel by force ends the job: aborting, cancelled, concluded. Before the
/// job is ready one without force does the same, unless the job is paused.
///
/// # Panics
/// If not.
pub fn check_cancel(kind: &dyn Kind) {
    for stage in Stage::of(kind.features()).filter(|stage| stage.state().allows(Verb::ForceCancel)) {
        let soft = stage == Stage::Running || (stage == Stage::Pending && !kind.features().ready);
        for verb in [Verb::ForceCancel].into_iter().chain(soft.then_some(Verb::Cancel)) {
            let life = Life::at(kind, stage).drained();
            let before = life.events().len();
            let life = life.asked(verb).unblocked().until_over();
            let mut wanted = vec!["aborting", "CANCELLED", "concluded"];
            wanted.extend(kind.features().dismisses_itself.then_some("null"));
            assert_eq!(life.names()[before..], wanted, "{stage:?}, {verb}");
            assert!(life.failure().is_some(), "{stage:?}, {verb}: the result is a failure");
        }
    }
}

/// A disk that fails ends the job in aborting, with the disk's error. Under the policy `stop` the job pauses
/// instead, and does its work once it is resumed on a disk that is sound again.
///
/// # Panics
/// If not.
pub fn check_failed_disk(kind: &dyn Kind) {
    let features = kind.features();
    let end = features.dismisses_itself.then_some("null");
    let life = Life::start(kind, Setup { disk: Disk::Fails, ..PLAIN }).until_over();
    let mut wanted = vec!["created", "running"];
    wanted.extend(features.on_error.then_some("ERROR report"));
    wanted.extend(["aborting", "FAILED", "concluded"]);
    wanted.extend(end);
    assert_eq!(life.names(), wanted);
    let errors = life.events().iter().filter_map(|event| match event {
        Event::Completed { error } => Some(error.clone()),
        _ => None,
    });
    assert_eq!(errors.collect::<Vec<_>>(), [life.failure()], "the event's error is the result's");

    if features.on_error {
        let setup = Setup { disk: Disk::Fails, on_error: OnError::Stop, ..PLAIN };
        let life = Life::start(kind, setup).until(&Event::Status(JobState::Paused)).unblocked();
        let life = life.asked(Verb::Resume).complete(kind).until_over();
        let mut wanted = vec!["created", "running", "ERROR stop", "paused", "running"];
        wanted.extend(features.ready.then_some(["ready", "READY"]).iter().flatten());
        wanted.extend(["waiting", "pending", "COMPLETED", "concluded"]);
        wanted.extend(end);
        assert_eq!(life.names(), wanted);
    }
}
