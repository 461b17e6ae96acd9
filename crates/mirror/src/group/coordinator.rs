//! The coordinator of a group: two-phase commit over its members. Decisions only.
//!
//! The thread of the group polls it whenever a member has changed; tests do the same with bare cores. It
//! visits one member at a time and holds no lock over two, so there is no lock order among members.
//!
//! An attempt: every member is near, so each quiesces its guest. One by one they settle: no write under way,
//! nothing left, flushed. When all have, each is *prepared*, which fails if anything has happened to it since
//! it was seen. When all are prepared the end is certain: at this instant every guest is quiesced and every
//! target equal. Only then is any member ended (commit). If one resumes its guest before that, all do, and a
//! later attempt follows. If one is aborted, all are.

use std::collections::VecDeque;
use std::time::Duration;

use super::GroupEvent;
use crate::error::Error;
use crate::machine::Core;
use crate::machine::{MemberFailure, MemberStage, MemberView};

/// The members, visited one at a time.
pub(crate) trait Members {
    /// How many there are.
    fn count(&self) -> usize;
    /// What the disk of a member is called.
    fn name(&self, index: usize) -> String;
    /// Reads or changes the core of a member.
    fn with<R>(&self, index: usize, f: impl FnOnce(&mut Core, Duration) -> R) -> R;
}

/// The state of a group, and its events that were not taken.
#[derive(Debug, Default)]
pub(crate) struct Coordinator {
    phase: Phase,
    was_ready: bool,
    pending_emitted: bool,
    attempts: u64,
    events: VecDeque<GroupEvent>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// An attempt: every guest is quiesced, or was when it began.
    Preparing,
    /// Every member was prepared and is to end.
    Committed,
    /// Every member was aborted.
    Failed,
    Over,
}

impl Coordinator {
    /// How often the guests were quiesced.
    pub(crate) fn attempts(&self) -> u64 {
        self.attempts
    }

    /// The oldest event that has not been taken.
    pub(crate) fn take_event(&mut self) -> Option<GroupEvent> {
        self.events.pop_front()
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Whether every member has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Whether the members are being aborted.
    pub(crate) fn is_failing(&self) -> bool {
        self.phase == Phase::Failed
    }

    /// A member may have changed: makes every move that follows.
    pub(crate) fn poll(&mut self, members: &impl Members) {
        while self.step(members) {}
    }

    fn step(&mut self, members: &impl Members) -> bool {
        let all = 0..members.count();
        let views: Vec<MemberView> =
            all.clone().map(|index| members.with(index, |core, _| core.view())).collect();
        let every = |is: fn(&MemberView) -> bool| views.iter().all(is);
        if !self.was_ready && every(|view| view.has_been_ready) {
            self.was_ready = true;
            self.events.push_back(GroupEvent::Ready);
        }
        match self.phase {
            Phase::Over => false,
            Phase::Committed | Phase::Failed => {
                let over = every(|view| view.over);
                if over {
                    self.phase = Phase::Over;
                    self.emit_end(members);
                }
                over
            }
            Phase::Idle | Phase::Preparing if views.iter().any(|view| view.stage == MemberStage::Failed) => {
                self.fail(members);
                true
            }
            Phase::Idle => every(|view| view.stage == MemberStage::Near) && self.begin(members, &views),
            Phase::Preparing if every(|view| view.stage == MemberStage::Settled) => {
                self.commit(members);
                true
            }
            Phase::Preparing
                if every(|view| matches!(view.stage, MemberStage::Quiesced | MemberStage::Settled)) =>
            {
                false
            }
            Phase::Preparing => {
                self.resume_all(members);
                true
            }
        }
    }

    /// Every member is near: quiesces every guest, unless the group has to wait for `finalize` first.
    fn begin(&mut self, members: &impl Members, views: &[MemberView]) -> bool {
        let waits = views.iter().any(|view| !view.auto_finalize) && !views.iter().any(|view| view.finalizing);
        if waits && views.iter().all(|view| view.pending) {
            if !self.pending_emitted {
                self.pending_emitted = true;
                self.events.push_back(GroupEvent::Pending);
            }
            return false;
        }
        if waits {
            each(members, Core::enter_pending);
            return true;
        }
        self.attempts += 1;
        self.phase = Phase::Preparing;
        for index in 0..members.count() {
            if !members.with(index, |core, _| core.quiesce_for_group()) {
                self.resume_all(members);
                break;
            }
        }
        true
    }

    fn resume_all(&mut self, members: &impl Members) {
        self.phase = Phase::Idle;
        each(members, Core::resume_for_group);
    }

    /// Every member has settled: all end, or none.
    fn commit(&mut self, members: &impl Members) {
        for index in 0..members.count() {
            if !members.with(index, |core, _| core.prepare()) {
                return self.resume_all(members);
            }
        }
        self.phase = Phase::Committed;
        each(members, Core::enter_pending);
        each(members, Core::commit);
    }

    fn fail(&mut self, members: &impl Members) {
        self.phase = Phase::Failed;
        let Some((failed, member_failure)) = first_failure(members) else { return };
        let member = members.name(failed);
        for index in 0..members.count() {
            members.with(index, |core, _| {
                core.resume_for_group();
                core.abort(Error::Group { member: member.clone(), cause: member_failure.message.clone() });
            });
        }
    }

    fn emit_end(&mut self, members: &impl Members) {
        self.events.push_back(match first_failure(members) {
            None => GroupEvent::Completed,
            Some((_, member_failure)) if member_failure.cancelled => GroupEvent::Cancelled,
            Some((member, member_failure)) => GroupEvent::Failed { member, error: member_failure.message },
        });
    }
}

fn each(members: &impl Members, change: fn(&mut Core)) {
    for index in 0..members.count() {
        members.with(index, |core, _| change(core));
    }
}

/// The member that failed first, not because another did.
fn first_failure(members: &impl Members) -> Option<(usize, MemberFailure)> {
    (0..members.count()).find_map(|index| {
        let member_failure = members.with(index, |core, _| core.member_failure())?;
        (!member_failure.follows).then_some((index, member_failure))
    })
}
