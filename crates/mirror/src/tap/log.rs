//! The log of a tap: guest writes are marked in it before they begin, whether or not a job is attached.
//!
//! A job brings it ([`LiveLog`]), and it has ended before the job is over. Only where the process is about to
//! end ([`MirrorControl::keep_log`](crate::MirrorControl::keep_log)) it stays, and goes with the tap: what is
//! written meanwhile is in the source alone.
//!
//! Must hold: a write that begins while there is a log is inside of marked regions from before that until the
//! job and the bitmaps know that it has ended.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{self as block, BlockDevice, ByteRange};

use super::drain::given_up;
use super::{State, Tap, WriteObserver};
use crate::error::Error;
use crate::machine::Ending;
use crate::region_log::{Entry, LiveLog, LogPin, WriteLog};

/// How long a log that is attached waits for the writes under way.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether a write has got its place in the log.
pub(super) enum Entered {
    /// It may go on, and drops this when it has ended.
    Go(Option<LogPin>),
    /// It would have to wait, and asks again after this time if nothing wakes its caller before.
    Wait(Option<Duration>),
}

impl Tap {
    /// Attaches the log of `live`. Whether the target holds what an earlier job has written.
    ///
    /// # Errors
    /// There is a log, this one refuses, or a write under way does not end.
    pub(crate) fn attach_log(self: &Arc<Self>, live: &LiveLog) -> Result<(Arc<WriteLog>, bool), Error> {
        if let Some(present) = self.write_log() {
            return Err(self.has_log(&present));
        }
        let Some(drained) = self.drain_for(ATTACH_TIMEOUT) else {
            return Err(Error::WriteHangs { disk: self.title() });
        };
        let start = live.log.attach().map_err(|error| Error::Log(Arc::new(error)))?;
        let log = WriteLog::new(live, self.len(), &start, Arc::clone(&self.wakers));
        let present = {
            let mut state = self.state.lock();
            let present = state.log.clone().filter(|log| log.is_on());
            if present.is_none() {
                state.log = Some(Arc::clone(&log));
                self.update_observed(&state);
            }
            present
        };
        drop(drained);
        match present {
            // Another caller was first.
            Some(present) => Err(self.has_log(&present)),
            None => Ok((log, start.resumed)),
        }
    }

    fn has_log(&self, present: &WriteLog) -> Error {
        Error::LogAttached { disk: self.title(), log: present.log().name().to_owned() }
    }

    /// The log that guest writes are marked in, if there is one.
    fn write_log(&self) -> Option<Arc<WriteLog>> {
        self.state.lock().log.clone().filter(|log| log.is_on())
    }

    /// The disk below is about to be written past the tap: a log that it has is invalidated, and removed from
    /// it; a job that has it fails. Does I/O if there is one.
    pub fn give_up_log(&self) {
        if let Some(log) = self.write_log() {
            log.give_up();
        }
    }

    /// A job is about to end: a log that the tap has ends, durably, and is off.
    ///
    /// # Errors
    /// Before a pivot: the log does not say so. Else: it is believed yet, or has failed before.
    pub(crate) fn end_log(&self, ending: Ending) -> Result<(), Arc<block::Error>> {
        let Some(log) = self.state.lock().log.clone() else { return Ok(()) };
        match ending {
            Ending::Pivot => log.end(),
            Ending::Keep | Ending::Fail => log.close(),
        }
    }

    /// No job has the log any more that the tap may have: it ends, and is closed.
    ///
    /// # Errors
    /// As for [`end_log`](Self::end_log).
    pub(crate) fn close_log(&self) -> Result<(), Arc<block::Error>> {
        let ended = self.end_log(Ending::Fail);
        self.log_name();
        ended
    }

    /// The name of the tap's log, if there is one. One that has ended or failed is closed.
    pub fn log_name(&self) -> Option<String> {
        let present = self.state.lock().log.clone()?;
        if present.is_on() {
            return Some(present.log().name().to_owned());
        }
        self.drop_log(&present);
        None
    }

    /// Waits until a write to `range` may begin, if it `may_wait`. The `job` is asked for what that takes.
    ///
    /// # Errors
    /// The caller is cancelled.
    pub(super) fn enter_log(
        &self,
        log: Option<Arc<WriteLog>>,
        (operation, range): (&'static str, ByteRange),
        may_wait: bool,
        job: Option<&dyn WriteObserver>,
    ) -> block::Result<Entered> {
        let Some(log) = log else { return Ok(Entered::Go(None)) };
        let flush_soon = || {
            if let Some(job) = job {
                job.flush_soon();
            }
        };
        let entry = if may_wait { log.enter(range, flush_soon) } else { log.try_enter(range, flush_soon) };
        match entry {
            Entry::Logged(pin) => Ok(Entered::Go(Some(pin))),
            Entry::Wait(_) if may_wait => Err(given_up(operation, range)),
            Entry::Wait(within) => Ok(Entered::Wait(within)),
            Entry::Off(why) => {
                match (job, why) {
                    // Its last step has to find the log.
                    (Some(job), Some(why)) => job.log_failed(why),
                    (Some(_), None) => {}
                    (None, _) => self.drop_log(&log),
                }
                Ok(Entered::Go(None))
            }
        }
    }

    /// Forgets a log that is off.
    fn drop_log(&self, log: &Arc<WriteLog>) {
        let mut state = self.state.lock();
        let dropped = state.log.take_if(|present| Arc::ptr_eq(present, log));
        if dropped.is_some() {
            self.update_observed(&state);
        }
        // Its file is closed without the lock.
        drop(state);
    }
}

impl State {
    /// Refuses to give the disk named `disk` another length while it has a log, which is for this one.
    pub(super) fn check_no_log(&self, disk: impl FnOnce() -> String) -> Result<(), Error> {
        match self.log.as_ref().filter(|log| log.is_on()) {
            Some(log) => Err(Error::LogAttached { disk: disk(), log: log.log().name().to_owned() }),
            None => Ok(()),
        }
    }
}
