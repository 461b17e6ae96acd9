//! What brings the members of a group to one end: decisions only.
//!
//! The thread of the group asks it to look again whenever a member has changed; tests do the same with bare
//! cores. It touches one member at a time and holds no lock over two, so no order of locks among members
//! exists that a guest could get wrong.
//!
//! An attempt: every member is near, so each quiesces its guest. One by one they settle: no write under way,
//! nothing left, flushed. When all have, each is *sealed*, which fails if anything has happened to it since
//! it was seen; when all are, the end is certain: at this instant every guest is held and every target equal.
//! Only then is any member ended. If one resumes its guest before that, for whatever reason, all do, and a
//! later attempt follows. Should one be given up, all are.

use std::collections::VecDeque;
use std::time::Duration;

use super::GroupEvent;
use crate::error::Error;
use crate::machine::Core;
use crate::machine::group::{Loss, Stage, View};

/// The members, to be touched one at a time.
pub(crate) trait Members {
    /// How many there are.
    fn count(&self) -> usize;
    /// What the disk of a member is called.
    fn name(&self, index: usize) -> String;
    /// Looks at the core of a member, or changes it.
    fn with<R>(&self, index: usize, f: impl FnOnce(&mut Core, Duration) -> R) -> R;
}

/// Where a group stands, and what it has to tell.
#[derive(Debug, Default)]
pub(crate) struct Coordinator {
    phase: Phase,
    was_ready: bool,
    pends: bool,
    attempts: u64,
    events: VecDeque<GroupEvent>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// Every guest is held, or was when the attempt began.
    Holding,
    /// Every member was sealed and is to end.
    Committed,
    /// Every member was given up.
    Failed,
    Over,
}

impl Coordinator {
    /// How often the guests were held.
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

    /// Whether the members are being given up.
    pub(crate) fn is_failing(&self) -> bool {
        self.phase == Phase::Failed
    }

    /// A member may have changed: does what follows from that.
    pub(crate) fn look(&mut self, members: &impl Members) {
        while self.step(members) {}
    }

    fn step(&mut self, members: &impl Members) -> bool {
        let all = 0..members.count();
        let views: Vec<View> = all.clone().map(|index| members.with(index, |core, _| core.view())).collect();
        let every = |is: fn(&View) -> bool| views.iter().all(is);
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
                    self.tell_end(members);
                }
                over
            }
            Phase::Open | Phase::Holding if views.iter().any(|view| view.stage == Stage::Lost) => {
                self.fail(members);
                true
            }
            Phase::Open => every(|view| view.stage == Stage::Near) && self.begin(members, &views),
            Phase::Holding if every(|view| view.stage == Stage::Settled) => {
                self.commit(members);
                true
            }
            Phase::Holding if every(|view| matches!(view.stage, Stage::Held | Stage::Settled)) => false,
            Phase::Holding => {
                self.let_go(members);
                true
            }
        }
    }

    /// Every member is near: holds every guest, if the group is not to wait for its word first.
    fn begin(&mut self, members: &impl Members, views: &[View]) -> bool {
        let waits = views.iter().any(|view| !view.auto_finalize) && !views.iter().any(|view| view.finalizing);
        if waits && views.iter().all(|view| view.pending) {
            if !self.pends {
                self.pends = true;
                self.events.push_back(GroupEvent::Pending);
            }
            return false;
        }
        if waits {
            each(members, Core::pend);
            return true;
        }
        self.attempts += 1;
        self.phase = Phase::Holding;
        for index in 0..members.count() {
            if !members.with(index, |core, _| core.quiesce_for_group()) {
                self.let_go(members);
                break;
            }
        }
        true
    }

    fn let_go(&mut self, members: &impl Members) {
        self.phase = Phase::Open;
        each(members, Core::resume_for_group);
    }

    /// Every member has settled: all end, or none.
    fn commit(&mut self, members: &impl Members) {
        for index in 0..members.count() {
            if !members.with(index, |core, _| core.seal()) {
                return self.let_go(members);
            }
        }
        self.phase = Phase::Committed;
        each(members, Core::pend);
        each(members, Core::grant);
    }

    fn fail(&mut self, members: &impl Members) {
        self.phase = Phase::Failed;
        let Some((lost, loss)) = first_loss(members) else { return };
        let member = members.name(lost);
        for index in 0..members.count() {
            members.with(index, |core, _| {
                core.resume_for_group();
                core.abort(Error::Group { member: member.clone(), cause: loss.message.clone() });
            });
        }
    }

    fn tell_end(&mut self, members: &impl Members) {
        self.events.push_back(match first_loss(members) {
            None => GroupEvent::Completed,
            Some((_, loss)) if loss.cancelled => GroupEvent::Cancelled,
            Some((member, loss)) => GroupEvent::Failed { member, error: loss.message },
        });
    }
}

fn each(members: &impl Members, change: fn(&mut Core)) {
    for index in 0..members.count() {
        members.with(index, |core, _| change(core));
    }
}

/// The member that is lost by itself, not because others are.
fn first_loss(members: &impl Members) -> Option<(usize, Loss)> {
    (0..members.count()).find_map(|index| {
        let loss = members.with(index, |core, _| core.loss())?;
        (!loss.follows).then_some((index, loss))
    })
}
