//! Membership in a group: a core that ends together with others (two-phase commit).
//!
//! Such a core never quiesces the guest and never ends by itself: it reports its stage ([`MemberView`]), and the
//! [coordinator](crate::group) of its group decides when it quiesces and resumes the guest, and, once it is
//! *prepared*, when it ends.
//!
//! Must hold: while it is prepared, nothing makes it resume the guest or fail. So a coordinator that has prepared
//! every member has every guest quiesced at that instant, and may end them one after another.

use super::{Core, Ending, Phase};
use crate::error::Error;
use crate::progress::Event;
use crate::state::{JobState, Refused, Verb};

/// The state of a member in its group's commit.
#[derive(Debug, Default)]
pub(super) struct Membership {
    prepared: bool,
    /// The coordinator has committed: the last step may be taken.
    committed: bool,
    /// It was aborted while it was prepared.
    deferred_abort: Option<Error>,
    failure: Option<MemberFailure>,
}

/// Why a member ends without its group's commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemberFailure {
    /// Another member failed first.
    pub(crate) follows: bool,
    pub(crate) cancelled: bool,
    pub(crate) message: String,
}

/// How near a member is to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberStage {
    /// It copies, or is paused.
    Busy,
    /// Its end was asked for and little is left: the guest may be quiesced.
    Near,
    /// The guest is quiesced; writes land, or what is left is copied and flushed.
    Quiesced,
    /// The guest is quiesced, nothing is under way, the target is equal and durable.
    Settled,
    /// It can neither fail nor resume its guest.
    Prepared,
    /// It has ended well.
    Ended,
    /// It is being aborted, or has been.
    Failed,
}

/// What a coordinator sees of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemberView {
    pub(crate) stage: MemberStage,
    pub(crate) over: bool,
    pub(crate) has_been_ready: bool,
    pub(crate) is_paused: bool,
    pub(crate) auto_finalize: bool,
    pub(crate) finalizing: bool,
    pub(crate) pending: bool,
}

impl Core {
    /// From now on it is a member of a group.
    pub(crate) fn join_group(&mut self) {
        self.membership = Some(Membership::default());
    }

    pub(super) fn is_grouped(&self) -> bool {
        self.membership.is_some()
    }

    pub(super) fn is_prepared(&self) -> bool {
        self.membership.as_ref().is_some_and(|membership| membership.prepared)
    }

    /// Its stage, and what else the coordinator decides by.
    pub(crate) fn view(&self) -> MemberView {
        MemberView {
            stage: self.stage(),
            over: self.is_concluded(),
            has_been_ready: self.has_been_ready(),
            is_paused: self.is_paused(),
            auto_finalize: self.config.auto_finalize,
            finalizing: self.finalizing,
            pending: self.state == JobState::Pending,
        }
    }

    fn stage(&self) -> MemberStage {
        let failure = self.membership.as_ref().is_some_and(|membership| membership.failure.is_some());
        match self.phase {
            _ if failure => MemberStage::Failed,
            Phase::Aborting(_) => MemberStage::Failed,
            Phase::Concluded(_) => MemberStage::Ended,
            Phase::Running if self.is_prepared() => MemberStage::Prepared,
            Phase::Running if self.is_settled() => MemberStage::Settled,
            Phase::Running if self.quiesced => MemberStage::Quiesced,
            Phase::Running if self.ending.is_some() && !self.is_paused() && self.is_near() => {
                MemberStage::Near
            }
            Phase::Running => MemberStage::Busy,
        }
    }

    fn is_settled(&self) -> bool {
        self.is_flushed() && self.guests.are_drained() && self.left() == 0 && self.in_flight.is_empty()
    }

    /// Quiesces the guest for the group; false if the member is not near any more.
    pub(crate) fn quiesce_for_group(&mut self) -> bool {
        if self.stage() == MemberStage::Near {
            self.quiesce();
        }
        matches!(self.stage(), MemberStage::Quiesced | MemberStage::Settled)
    }

    /// The group's attempt has failed: the guest is resumed. What was prepared is not any more.
    pub(crate) fn resume_for_group(&mut self) {
        let Some(membership) = &mut self.membership else { return };
        membership.prepared = false;
        if let Some(error) = membership.deferred_abort.take() {
            return self.abort(error);
        }
        if self.quiesced {
            self.resume_with_backoff();
        }
    }

    /// First phase of the commit; false if the member is not settled any more.
    pub(crate) fn prepare(&mut self) -> bool {
        let settled = self.stage() == MemberStage::Settled;
        if let Some(membership) = self.membership.as_mut().filter(|_| settled) {
            membership.prepared = true;
        }
        settled
    }

    /// Moves to `pending`, where every member waits for the end.
    pub(crate) fn enter_pending(&mut self) {
        for next in [JobState::Waiting, JobState::Pending] {
            if self.state.can_transition_to(next) {
                self.transition_to(next);
                if next == JobState::Pending && !self.config.auto_finalize {
                    self.outbox.push(Event::Pending);
                }
            }
        }
    }

    /// Second phase of the commit: every member is prepared, the last step may be taken.
    pub(crate) fn commit(&mut self) {
        if let Some(membership) = &mut self.membership {
            membership.committed = membership.prepared;
        }
    }

    /// The last step, if it may be taken and was not yet.
    pub(super) fn take_commit(&mut self) -> Option<Ending> {
        let ending = self.ending?;
        let membership = self.membership.as_mut()?;
        std::mem::take(&mut membership.committed).then_some(ending)
    }

    /// Keeps `error` while the member is prepared; hands it back if it is not.
    pub(super) fn defer_abort_while_prepared(&mut self, error: Error) -> Option<Error> {
        match &mut self.membership {
            Some(membership) if membership.prepared => {
                membership.deferred_abort.get_or_insert(error);
                None
            }
            _ => Some(error),
        }
    }

    /// It ends with `error`.
    pub(super) fn note_member_failure(&mut self, error: &Error) {
        if let Some(membership) = &mut self.membership {
            let (follows, cancelled) =
                (matches!(error, Error::Group { .. }), matches!(error, Error::Cancelled));
            membership.failure.get_or_insert_with(|| MemberFailure {
                follows,
                cancelled,
                message: error.to_string(),
            });
        }
    }

    /// Why it ends without the others, if it does.
    pub(crate) fn member_failure(&self) -> Option<MemberFailure> {
        self.membership.as_ref()?.failure.clone()
    }

    /// Whether `verb` would be refused now.
    pub(crate) fn would_refuse(&self, verb: Verb) -> Result<(), Refused> {
        self.allow(verb)?;
        match verb {
            Verb::Cancel | Verb::Finalize if self.is_paused() => Err(Refused::Paused { verb }),
            _ => Ok(()),
        }
    }
}
