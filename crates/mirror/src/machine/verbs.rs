//! What users and a group's coordinator ask of a job.

use std::time::Duration;

use super::{Core, MemberFailure, MemberStage, MemberView};
use crate::error::Error;
use crate::options::CopyMode;
use crate::state::{Refused, Verb};

impl Core {
    /// Starts nothing new until [`resume`](Self::resume). The guest is not quiesced meanwhile.
    pub(crate) fn pause(&mut self) -> Result<(), Refused> {
        self.lifecycle.pause(&mut self.outbox)
    }

    /// Goes on, also after an error policy stopped the job; its errors are forgotten. A job that waits to be
    /// finalized cannot be paused, but an error can stop it, and then this is the way on.
    pub(crate) fn resume(&mut self) -> Result<(), Refused> {
        self.lifecycle.resume(&mut self.outbox)
    }

    /// Changes the speed; waiting threads must ask again.
    pub(crate) fn set_speed(&mut self, now: Duration, bytes_per_second: u64) -> Result<(), Refused> {
        self.lifecycle.allow(Verb::SetSpeed)?;
        self.pacing.set_speed(now, bytes_per_second);
        Ok(())
    }

    /// Changes when the target gets what the guest writes. Writes under way end as they began.
    pub(crate) fn change(&mut self, mode: CopyMode) -> Result<(), Refused> {
        self.lifecycle.allow(Verb::Change)?;
        self.pacing.mode_asked(self.config.copy_mode, self.clock);
        self.config.copy_mode = mode;
        Ok(())
    }

    /// Asks for the end with the pivot.
    pub(crate) fn complete(&mut self) -> Result<(), Refused> {
        self.lifecycle.complete()
    }

    /// Asks for the end without the pivot if the job has been ready, and aborts it otherwise.
    pub(crate) fn cancel(&mut self) -> Result<(), Refused> {
        if self.lifecycle.cancel()? {
            self.abort(Error::Cancelled);
        }
        Ok(())
    }

    /// Aborts the job.
    pub(crate) fn force_cancel(&mut self) -> Result<(), Refused> {
        self.lifecycle.allow(Verb::ForceCancel)?;
        self.abort(Error::Cancelled);
        Ok(())
    }

    /// Ends now what waits to be ended.
    pub(crate) fn finalize(&mut self) -> Result<(), Refused> {
        self.lifecycle.finalize()
    }

    /// Forgets the job.
    pub(crate) fn dismiss(&mut self) -> Result<(), Refused> {
        self.lifecycle.dismiss(&mut self.outbox)
    }

    /// Whether `verb` would be refused now.
    pub(crate) fn would_refuse(&self, verb: Verb) -> Result<(), Refused> {
        self.lifecycle.allow(verb)?;
        match verb {
            Verb::Cancel | Verb::Finalize if self.lifecycle.is_paused() => Err(Refused::Paused { verb }),
            _ => Ok(()),
        }
    }
}

/// The coordinator's part: see [`lifecycle::membership`](super::lifecycle).
impl Core {
    /// From now on the job is a member of a group.
    pub(crate) fn join_group(&mut self) {
        self.lifecycle.join_group();
    }

    /// Its stage, and what else the coordinator decides by.
    pub(crate) fn view(&self) -> MemberView {
        let settled = self.guests.are_drained() && self.work.left() == 0 && self.work.operations().is_empty();
        self.lifecycle.view(&self.config, self.is_near(), settled)
    }

    /// Quiesces the guest for the group; false if the member is not near any more.
    pub(crate) fn quiesce_for_group(&mut self) -> bool {
        if self.view().stage == MemberStage::Near {
            self.lifecycle.quiesce(self.clock);
        }
        matches!(self.view().stage, MemberStage::Quiesced | MemberStage::Settled)
    }

    /// The group's attempt has failed: the guest is resumed. What was prepared is not any more.
    pub(crate) fn resume_for_group(&mut self) {
        if let Some(error) = self.lifecycle.roll_back(self.clock) {
            self.abort(error);
        }
    }

    /// First phase of the commit; false if the member is not settled any more.
    pub(crate) fn prepare(&mut self) -> bool {
        let settled = self.view().stage == MemberStage::Settled;
        if settled {
            self.lifecycle.prepare();
        }
        settled
    }

    /// Moves to `pending`, where every member waits for the end.
    pub(crate) fn enter_pending(&mut self) {
        self.lifecycle.enter_pending(!self.config.auto_finalize, &mut self.outbox);
    }

    /// Second phase of the commit: every member is prepared, the last step may be taken.
    pub(crate) fn commit(&mut self) {
        self.lifecycle.commit();
    }

    /// Why it ends without the others, if it does.
    pub(crate) fn member_failure(&self) -> Option<MemberFailure> {
        self.lifecycle.member_failure().cloned()
    }
}
