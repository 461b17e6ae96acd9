//! Membership in a group: a job that ends together with others (two-phase commit).
//!
//! Such a core never quiesces the guest and never ends by itself: it reports its stage ([`MemberView`]), and
//! the [coordinator](crate::group) of its group decides when it quiesces and resumes the guest, and, once it
//! is *prepared*, when it ends.
//!
//! Must hold: while it is prepared, nothing makes it resume the guest or fail. So a coordinator that has
//! prepared every member has every guest quiesced at that instant, and may end them one after another.

use crate::error::Error;

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

impl Membership {
    pub(super) fn is_prepared(&self) -> bool {
        self.prepared
    }

    /// First phase of the commit.
    pub(super) fn prepare(&mut self) {
        self.prepared = true;
    }

    /// Second phase, if the first was not rolled back.
    pub(super) fn commit(&mut self) {
        self.committed = self.prepared;
    }

    /// Whether the last step may be taken and was not yet.
    pub(super) fn take_commit(&mut self) -> bool {
        std::mem::take(&mut self.committed)
    }

    /// The attempt has failed; an abort that came while the member was prepared.
    pub(super) fn roll_back(&mut self) -> Option<Error> {
        self.prepared = false;
        self.deferred_abort.take()
    }

    /// Keeps `error` while the member is prepared; hands it back if it is not.
    pub(super) fn defer_abort(&mut self, error: Error) -> Option<Error> {
        if !self.prepared {
            return Some(error);
        }
        self.deferred_abort.get_or_insert(error);
        None
    }

    /// The member ends with `error`.
    pub(super) fn fail(&mut self, error: &Error) {
        let (follows, cancelled) = (matches!(error, Error::Group { .. }), matches!(error, Error::Cancelled));
        self.failure.get_or_insert_with(|| MemberFailure { follows, cancelled, message: error.to_string() });
    }

    pub(super) fn failure(&self) -> Option<&MemberFailure> {
        self.failure.as_ref()
    }
}
