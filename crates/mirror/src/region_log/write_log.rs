//! Write log: a region log on a tap. Guest writes wait here until their regions are marked.
//!
//! The thread of a waiting write writes the log itself, for all that wait (group commit); the others wait for
//! it. Called by the tap before a write asks the job for admission and after it has ended, and by the job's
//! engine around its flushes.
//!
//! Must hold: no write begins before its regions are marked durably, unless the log was invalidated before.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmirror_block::sync::{Condvar, Instant, Mutex, MutexGuard, thread};
use blockmirror_block::{self as block, ByteRange, cancel};
use tracing::error;

use super::active::{ActiveRegions, Moment, Update};
use super::{LiveLog, LogStart, RegionLog};
use crate::wakers::Wakers;

/// If writes wait for room, and none is made for so long, they go beyond the limit: the target may be slow,
/// or not there.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a write that waits for room asks for another flush: the last one may have come too early for
/// any region.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct WriteLog {
    log: Arc<dyn RegionLog>,
    /// *Guards* which regions are marked, and whether the log is on. *Order*: leaf. *Not under it*: the log's
    /// I/O.
    state: Mutex<State>,
    /// An update has ended, a flush has made room, or the limit has changed.
    changed: Condvar,
    /// What the limit was set to last, so that no lock is taken to set it again.
    limited: AtomicBool,
    /// Those of callers that never wait: what `changed` is to the others.
    wakers: Arc<Wakers>,
}

#[derive(Debug)]
struct State {
    regions: ActiveRegions,
    power: Power,
    /// Since when a write has waited for room, and none was made.
    short_since: Option<Instant>,
}

/// Whether writes are logged.
#[derive(Debug)]
enum Power {
    On,
    /// The last operation of the log is in flight.
    Ending,
    /// The log has ended, or has failed and is invalidated: this is why.
    Off(Option<Arc<block::Error>>),
}

/// The answer to a write that asks for its regions.
#[derive(Debug)]
pub(crate) enum Entry {
    /// It may begin; its regions stay marked until the pin is dropped.
    Logged(LogPin),
    /// It may begin: there is no log any more, for this reason if it has failed.
    Off(Option<Arc<block::Error>>),
    /// It would have to wait, and asks again after this time if nothing wakes its caller before; or its
    /// caller is cancelled.
    Wait(Option<Duration>),
}

/// A write that is inside of its regions. Dropped when the job and the bitmaps know that it has ended.
#[derive(Debug)]
#[must_use = "the write has ended when this is dropped"]
pub(crate) struct LogPin {
    log: Arc<WriteLog>,
    range: ByteRange,
}

impl Drop for LogPin {
    fn drop(&mut self) {
        self.log.state.lock().regions.end_write(self.range);
    }
}

impl WriteLog {
    /// The log of a disk of `len` bytes that says `start`. The `wakers` are those of the disk's tap.
    pub(crate) fn new(live: &LiveLog, len: u64, start: &LogStart, wakers: Arc<Wakers>) -> Arc<Self> {
        let log = Arc::clone(&live.log);
        let regions = ActiveRegions::new(len, log.region_size(), &start.marked, live.active);
        Arc::new(Self {
            log,
            wakers,
            state: Mutex::new(State { regions, power: Power::On, short_since: None }),
            changed: Condvar::new(),
            limited: AtomicBool::new(false),
        })
    }

    pub(crate) fn log(&self) -> &Arc<dyn RegionLog> {
        &self.log
    }

    /// Whether writes are logged.
    pub(crate) fn is_on(&self) -> bool {
        matches!(self.state.lock().power, Power::On)
    }

    /// Whether a write to `range` would have to wait now.
    pub(crate) fn would_wait(&self, range: ByteRange) -> bool {
        let state = self.state.lock();
        matches!(state.power, Power::On) && state.regions.would_wait(range)
    }

    /// Waits until the regions of a write to `range` are marked; until the caller is cancelled
    /// ([`Entry::Wait`]). `flush_soon` asks the job for a flush.
    pub(crate) fn enter(self: &Arc<Self>, range: ByteRange, flush_soon: impl Fn()) -> Entry {
        let mut request = None;
        let mut asked = false;
        let mut state = self.state.lock();
        loop {
            if let Power::Off(why) = &state.power {
                return Entry::Off(why.clone());
            }
            if state.begin_write(range, &mut request) {
                let short = state.regions.is_short_of_room();
                drop(state);
                if short && !asked {
                    flush_soon();
                }
                return Entry::Logged(LogPin { log: Arc::clone(self), range });
            }
            if let Some(update) = state.next_update() {
                state = self.perform(state, update);
                continue;
            }
            if cancel::is_cancelled() {
                state.regions.forget(request);
                return Entry::Wait(None);
            }
            let for_room = !state.is_busy();
            if for_room && !asked {
                asked = true;
                drop(state);
                flush_soon();
                state = self.state.lock();
                continue;
            }
            state = cancel::wait(&self.changed, state, for_room.then_some(ASK_AGAIN));
            asked = false;
        }
    }

    /// The same without waiting. The regions of a write that would have to are marked all the same, by
    /// another thread.
    pub(crate) fn try_enter(self: &Arc<Self>, range: ByteRange, flush_soon: impl Fn()) -> Entry {
        let mut request = None;
        let mut state = self.state.lock();
        if let Power::Off(why) = &state.power {
            return Entry::Off(why.clone());
        }
        if state.begin_write(range, &mut request) {
            return Entry::Logged(LogPin { log: Arc::clone(self), range });
        }
        let update = state.next_update();
        // One that is not part of the update asks anew.
        state.regions.forget(request);
        let short = state.regions.is_short_of_room();
        let for_room = update.is_none() && !state.is_busy();
        drop(state);
        if short {
            flush_soon();
        }
        let given_back = update.is_some_and(|update| !self.perform_elsewhere(update));
        Entry::Wait((for_room || given_back).then_some(ASK_AGAIN))
    }

    /// Has another thread perform an update. Whether there is one: if not, the update is given back, because
    /// the caller does not wait.
    fn perform_elsewhere(self: &Arc<Self>, update: Update) -> bool {
        let (own, first) = (Arc::clone(self), update.clone());
        let work = move || own.perform_all(first);
        let started = thread::Builder::new().name("mirror log".into()).spawn(work).is_ok();
        if !started {
            self.state.lock().regions.given_back(update);
            // Those whose regions were in it ask anew.
            self.changed.notify_all();
        }
        started
    }

    /// Performs an update, and others until there is none.
    fn perform_all(&self, first: Update) {
        let mut next = Some(first);
        let mut state = self.state.lock();
        while let Some(update) = next {
            state = self.perform(state, update);
            next = state.next_update();
        }
    }

    /// Performs an update, without the lock, which is released once more at the end.
    fn perform<'a>(&'a self, state: MutexGuard<'a, State>, update: Update) -> MutexGuard<'a, State> {
        drop(state);
        // Others wait for it, too.
        let shield = cancel::shield();
        let result = self.call("write", || self.log.update(&update.mark, &update.clear));
        // No write begins before this: after a crash the log must not say that the two are equal.
        let failed = result.err().map(|error| self.invalidate(error));
        drop(shield);
        let mut state = self.state.lock();
        state.regions.updated(update);
        if let Some(error) = failed {
            state.power = Power::Off(Some(Arc::new(error)));
        }
        self.wake_writes();
        drop(state);
        self.wakers.deliver();
        self.state.lock()
    }

    /// Wakes the writes that wait, and the callers of those that were refused.
    fn wake_writes(&self) {
        self.changed.notify_all();
        self.wakers.raise();
    }

    /// Calls the log. One that panics has failed: those that wait for it must not hang.
    fn call(&self, operation: &'static str, call: impl FnOnce() -> block::Result<()>) -> block::Result<()> {
        panic::catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            let error = block::Error::new(block::ErrorKind::Poisoned, operation);
            Err(error.because("it panicked").in_file(self.log.name()))
        })
    }

    /// The log has failed with `error`: has it say nothing any more. The error to report.
    fn invalidate(&self, error: block::Error) -> block::Error {
        let name = self.log.name();
        match self.call("invalidate", || self.log.invalidate()) {
            Ok(()) => {
                error!(log = name, %error, "the log of a live job failed; it is invalid");
                error
            }
            Err(second) => self.still_believed(error, &second),
        }
    }

    /// The log says something yet that does not hold, because of `error` and `second`. The error to report.
    fn still_believed(&self, error: block::Error, second: &block::Error) -> block::Error {
        error!(log = self.log.name(), %error, %second, "the log of a live job must be removed");
        error.because(format!("remove the log: it does not hold any more, and says otherwise: {second}"))
    }

    /// A job begins that copies every marked region: the ranges.
    pub(crate) fn begin_job(&self) -> Vec<ByteRange> {
        self.state.lock().regions.begin_job()
    }

    /// Sets whether the number of active regions has a limit.
    pub(crate) fn set_limited(&self, limited: bool) {
        if self.limited.swap(limited, Ordering::Relaxed) != limited {
            self.state.lock().regions.set_limited(limited);
            // The caller has a lock, and delivers.
            self.wake_writes();
        }
    }

    /// A flush of both disks begins.
    pub(crate) fn flush_begins(&self) -> Moment {
        self.state.lock().regions.flush_begins()
    }

    /// The flush that began at `moment`, when the target did not have the ranges in `missing`, has succeeded:
    /// clears regions.
    ///
    /// # Errors
    /// The log has failed, now or before.
    pub(crate) fn flush_succeeded(
        &self,
        moment: Moment,
        missing: &[ByteRange],
    ) -> Result<(), Arc<block::Error>> {
        let mut state = self.state.lock();
        state.regions.flush_succeeded(moment, missing);
        loop {
            if let Power::Off(why) = &state.power {
                return why.clone().map_or(Ok(()), Err);
            }
            if let Some(update) = state.next_update() {
                state = self.perform(state, update);
            } else if state.is_busy() {
                state = self.changed.wait(state);
            } else {
                self.wake_writes();
                drop(state);
                self.wakers.deliver();
                return Ok(());
            }
        }
    }

    /// The target is about to take the source's place: the log says so durably before this returns, and is
    /// off.
    ///
    /// # Errors
    /// It does not say so, now or because it has failed before; it is off and invalid all the same.
    pub(crate) fn end(&self) -> Result<(), Arc<block::Error>> {
        self.turn_off(|| {
            let result = self.call("end", || self.log.end());
            result.map_err(|error| self.invalidate(error))
        })
    }

    /// The job is over, and nothing will be marked any more: the log has ended, or says nothing any more,
    /// durably before this returns, and is off.
    ///
    /// # Errors
    /// It is believed yet, or has failed before.
    pub(crate) fn close(&self) -> Result<(), Arc<block::Error>> {
        self.turn_off(|| {
            let Err(error) = self.call("end", || self.log.end()) else { return Ok(()) };
            let invalid = self.call("invalidate", || self.log.invalidate());
            invalid.map_err(|second| self.still_believed(error, &second))
        })
    }

    /// One of the disks is about to be written past the log: the log says nothing any more, durably, before
    /// this returns, and is off. A job that has it fails.
    pub(crate) fn give_up(&self) {
        let _why = self.turn_off(|| {
            let why = block::Error::new(block::ErrorKind::Poisoned, "use log").in_file(self.log.name());
            Err(match self.call("invalidate", || self.log.invalidate()) {
                Ok(()) => why.because("one of its disks is written without it"),
                Err(second) => self.still_believed(why, &second),
            })
        });
    }

    /// Performs the `last` operation of the log, and turns it off.
    fn turn_off(&self, last: impl FnOnce() -> block::Result<()>) -> Result<(), Arc<block::Error>> {
        let mut state = self.state.lock();
        while state.is_busy() {
            state = self.changed.wait(state);
        }
        if let Power::Off(why) = &state.power {
            return why.clone().map_or(Ok(()), Err);
        }
        state.power = Power::Ending;
        drop(state);
        let result = last().map_err(Arc::new);
        self.state.lock().power = Power::Off(result.as_ref().err().cloned());
        self.wake_writes();
        self.wakers.deliver();
        result
    }
}

impl State {
    /// Whether a write to `range` begins.
    fn begin_write(&mut self, range: ByteRange, request: &mut Option<u64>) -> bool {
        matches!(self.power, Power::On) && self.regions.begin_write(range, request)
    }

    fn next_update(&mut self) -> Option<Update> {
        if self.is_busy() || !matches!(self.power, Power::On) {
            return None;
        }
        let beyond = self.short_since.is_some_and(|since| since.elapsed() >= ROOM_TIMEOUT);
        let update = self.regions.next_update(beyond);
        // Writes that still wait have waited since then.
        let clears = update.as_ref().is_some_and(|update| !update.clear.is_empty());
        if clears && !self.regions.lacks_room() {
            self.short_since = None;
        }
        if self.regions.lacks_room() {
            self.short_since.get_or_insert_with(Instant::now);
        }
        update
    }

    /// Whether the log is being written.
    fn is_busy(&self) -> bool {
        self.regions.is_updating() || matches!(self.power, Power::Ending)
    }
}
