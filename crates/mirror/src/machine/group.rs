//! A core that ends together with others.
//!
//! By itself such a core never holds the guest and never ends: it shows where it stands ([`View`]), and the
//! [coordinator](crate::group) of its group decides when it quiesces and resumes the guest, and, once it is
//! *sealed*, when it ends.
//!
//! What must hold: from the seal to the end, or until the seal is broken, nothing makes it resume the guest
//! or fail. So a coordinator that has sealed every member has every guest held at that instant, and may end
//! them one after another.

use super::{Core, Ending, Phase};
use crate::error::Error;
use crate::progress::Event;
use crate::state::{JobState, Refused, Verb};

/// What a core knows of its group.
#[derive(Debug, Default)]
pub(super) struct Membership {
    sealed: bool,
    /// The last step may be taken.
    granted: bool,
    /// It was given up while it was sealed.
    given_up: Option<Error>,
    lost: Option<Loss>,
}

/// Why a member ends without its group's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// Another member was lost first.
    pub(crate) follows: bool,
    pub(crate) cancelled: bool,
    pub(crate) message: String,
}

/// How near a member is to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It copies, or is paused.
    Busy,
    /// Its end was asked for and little is left: the guest may be held.
    Near,
    /// The guest is held; writes land, or what is left is copied and flushed.
    Held,
    /// The guest is held, nothing is under way, the target is equal and durable.
    Settled,
    /// It will end well, whatever happens.
    Sealed,
    /// It has ended well.
    Ended,
    /// It is being given up, or has been.
    Lost,
}

/// What a coordinator sees of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) stage: Stage,
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

    pub(super) fn is_sealed(&self) -> bool {
        self.membership.as_ref().is_some_and(|membership| membership.sealed)
    }

    /// Where it stands.
    pub(crate) fn view(&self) -> View {
        View {
            stage: self.stage(),
            over: self.is_concluded(),
            has_been_ready: self.has_been_ready(),
            is_paused: self.is_paused(),
            auto_finalize: self.config.auto_finalize,
            finalizing: self.finalizing,
            pending: self.state == JobState::Pending,
        }
    }

    fn stage(&self) -> Stage {
        let lost = self.membership.as_ref().is_some_and(|membership| membership.lost.is_some());
        match self.phase {
            _ if lost => Stage::Lost,
            Phase::Aborting(_) => Stage::Lost,
            Phase::Concluded(_) => Stage::Ended,
            Phase::Running if self.is_sealed() => Stage::Sealed,
            Phase::Running if self.is_settled() => Stage::Settled,
            Phase::Running if self.quiesced => Stage::Held,
            Phase::Running if self.ending.is_some() && !self.is_paused() && self.is_near() => Stage::Near,
            Phase::Running => Stage::Busy,
        }
    }

    fn is_settled(&self) -> bool {
        self.is_flushed() && self.is_drained() && self.left() == 0 && self.in_flight.is_empty()
    }

    /// Holds the guest for the group; false if the member is not as near as it was seen to be.
    pub(crate) fn quiesce_for_group(&mut self) -> bool {
        if self.stage() == Stage::Near {
            self.quiesce();
        }
        matches!(self.stage(), Stage::Held | Stage::Settled)
    }

    /// The group's attempt has failed: the guest goes on. What was sealed is not any more.
    pub(crate) fn resume_for_group(&mut self) {
        let Some(membership) = &mut self.membership else { return };
        membership.sealed = false;
        if let Some(error) = membership.given_up.take() {
            return self.abort(error);
        }
        if self.quiesced {
            self.resume_with_backoff();
        }
    }

    /// Sees to it that nothing can stop it any more; false if something has.
    pub(crate) fn seal(&mut self) -> bool {
        let settled = self.stage() == Stage::Settled;
        if let Some(membership) = self.membership.as_mut().filter(|_| settled) {
            membership.sealed = true;
        }
        settled
    }

    /// Every member waits for its end, and none holds its guest.
    pub(crate) fn pend(&mut self) {
        for next in [JobState::Waiting, JobState::Pending] {
            if self.state.can_transition_to(next) {
                self.transition_to(next);
                if next == JobState::Pending && !self.config.auto_finalize {
                    self.push_event(Event::Pending);
                }
            }
        }
    }

    /// Every member is sealed: the last step may be taken.
    pub(crate) fn grant(&mut self) {
        if let Some(membership) = &mut self.membership {
            membership.granted = membership.sealed;
        }
    }

    /// The last step, if it may be taken and was not yet.
    pub(super) fn take_grant(&mut self) -> Option<Ending> {
        let ending = self.ending?;
        let membership = self.membership.as_mut()?;
        std::mem::take(&mut membership.granted).then_some(ending)
    }

    /// Remembers `error` for when the seal is broken; hands it back if there is none.
    pub(super) fn give_up_unless_sealed(&mut self, error: Error) -> Option<Error> {
        match &mut self.membership {
            Some(membership) if membership.sealed => {
                membership.given_up.get_or_insert(error);
                None
            }
            _ => Some(error),
        }
    }

    /// It ends with `error`.
    pub(super) fn note_loss(&mut self, error: &Error) {
        if let Some(membership) = &mut self.membership {
            let (follows, cancelled) =
                (matches!(error, Error::Group { .. }), matches!(error, Error::Cancelled));
            membership.lost.get_or_insert_with(|| Loss { follows, cancelled, message: error.to_string() });
        }
    }

    /// Why it ends without the others, if it does.
    pub(crate) fn loss(&self) -> Option<Loss> {
        self.membership.as_ref()?.lost.clone()
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
