//! After a flush: the checkpoint of a job without a tap, the cleared regions of one with a log.
//!
//! Must hold: what the target lacks is looked at after the moment of the flush was taken in the log and
//! before the flush begins, all under the lock of the core: a write that ends meanwhile is in one of the two.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use blockmirror_block::ByteRange;

use super::{Engine, Wake};
use crate::batch::Batch;
use crate::error::Error;
use crate::machine::{Core, Done, Work};
use crate::region_log::{Moment, WriteLog};
use crate::scan::Failure;

/// What a flush covers: all that is not missing.
pub(super) struct AtFlush {
    missing: Vec<ByteRange>,
    /// In the job's log.
    moment: Option<Moment>,
}

impl Engine {
    /// The log of the job.
    pub(super) fn write_log(&self) -> Option<Arc<WriteLog>> {
        self.attachment.as_ref()?.log.upgrade()
    }

    /// If `batch` ends with a flush after which anything is recorded: what the target does not have as it
    /// begins.
    pub(super) fn flush_begins(&self, core: &Core, batch: &Batch) -> Option<AtFlush> {
        // Copies that the worker does before it are in progress, and missing.
        let action = batch.actions.last()?;
        let log = self.write_log().filter(|_| action.work.is_flush());
        if log.is_none() && (self.checkpoints.is_none() || action.work != Work::PeriodicFlush) {
            return None;
        }
        let moment = log.map(|log| log.flush_begins());
        Some(AtFlush { missing: core.not_copied(), moment })
    }

    /// After the flush that ends `batch`: what was not missing when it began is durable. Without the lock.
    pub(super) fn flush_ended(&self, at_flush: Option<AtFlush>, batch: &mut Batch) {
        let Some(AtFlush { missing, moment }) = at_flush else { return };
        let Some(result @ Ok(Ok(_))) = batch.results.last_mut() else { return };
        if let Some(sink) = &self.checkpoints {
            let record = AssertUnwindSafe(|| sink.record(&missing));
            *result = panic::catch_unwind(record)
                .map(|recorded| recorded.map(|()| Done::Flushed).map_err(Failure::at_target));
        }
        if let Some((log, moment)) = self.write_log().zip(moment)
            && let Err(why) = log.flush_succeeded(moment, &missing)
        {
            self.fail_for_log(why);
        }
    }

    /// The log is of no use any more: the job fails, whatever the error policies say.
    pub(super) fn fail_for_log(&self, why: Arc<blockmirror_block::Error>) {
        self.with_core(Wake::All, |core, _| core.abort(Error::Log(why)));
        self.cancel_calls_if_aborting();
    }

    /// Guest writes wait for room in the log only while the job makes room.
    pub(super) fn limit_log(&self, core: &Core) {
        if let Some(log) = self.write_log() {
            log.set_limited(core.makes_room_in_log());
        }
    }
}
