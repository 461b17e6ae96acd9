//! The tap: a disk that can be mirrored while it is written.
//!
//! A tap is made when the disk is opened and stays in front of it: a job attaches ([`MirrorJob::attach`]),
//! observes every write and detaches; after a pivot the tap forwards to the target and can be mirrored again.
//! While it has no observer (job or enabled bitmap) a request takes no lock and writes to no memory that all
//! threads share: it loads where to forward to, and a write is counted in a [shard](in_flight).
//!
//! Must hold:
//! - Observers are notified of a write after it has finished, whether or not it succeeded: those of *that*
//!   moment, so that an observer which came while the write was under way does not miss it.
//! - Writes under way are counted, those included that began before there was an observer, so that a job that
//!   quiesces the guest knows when none is left.
//! - The device below changes only while no write is under way: at a pivot, or under a [`Drained`]. Reads go
//!   on; after a pivot the job is over when those that began before have [ended](below).
//!
//! [`MirrorJob::attach`]: crate::MirrorJob::attach

mod below;
mod bitmaps;
pub(crate) mod discard;
mod drain;
mod enter;
mod in_flight;
mod log;
mod observer;
mod queue;
mod read_ticket;
mod ticket;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{
    self as block, BlockDevice, ByteRange, Error as DiskError, Extent, Geometry, Visit, WriteFlags, ZeroFlags,
};

use crate::error::Error;
use crate::machine::{Admission, Ending};
use crate::region_log::WriteLog;
use crate::wakers::Wakers;
use below::Below;
pub(crate) use below::LastUse;
use bitmaps::Named;
pub use bitmaps::{BitmapInfo, BitmapUse, MAX_BITMAPS};
pub use drain::Drained;
use drain::given_up;
use in_flight::InFlightCounters;
pub(crate) use observer::WriteObserver;
pub use queue::GuestQueue;
pub use read_ticket::ReadTicket;
pub use ticket::{Begin, Change, WriteTicket};

/// A disk in front of another that lets jobs and bitmaps see what is written.
///
/// It is a [`BlockDevice`] itself. A caller that moves data in another way announces each write with
/// [`begin_write`](Self::begin_write), or [`try_begin_change`](Self::try_begin_change), and each read with
/// [`begin_read`](Self::begin_read).
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, WriteFlags, testing::MemoryDisk};
/// use blockmirror_mirror::{Event, MirrorJob, MirrorOptions, Tap};
///
/// let tap = Tap::new(Arc::new(MemoryDisk::new(1 << 20)));
/// let target = Arc::new(MemoryDisk::new(1 << 20));
/// let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new())?;
/// tap.write_at(b"while it runs", 4096, WriteFlags::NONE)?;
/// while job.control().next_event(None) != Some(Event::Ready) {}
/// job.control().complete()?;
/// job.wait()?;
/// // The tap forwards to the target now.
/// tap.write_at(b"after", 0, WriteFlags::NONE)?;
/// assert_eq!(&target.contents()?[..5], b"after");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Tap {
    /// Itself: tickets own it.
    this: Weak<Self>,
    name: Arc<str>,
    /// The name was given to the tap; otherwise messages use that of the disk below.
    has_own_name: bool,
    /// Changes under the lock of `state`, while no write is under way.
    below: ArcSwap<Below>,
    in_flight: InFlightCounters,
    /// *Guards* observers, drains and the writes under way that they count. *Order*: before the core of the
    /// attached job. *Not under it*: device I/O, but that of a resize; waiting, but on the two below.
    state: Mutex<State>,
    /// The last write under way has finished while the tap is drained.
    landed: Condvar,
    /// The drain has ended.
    resumed: Condvar,
    /// Those of callers that never wait.
    wakers: Arc<Wakers>,
}

#[derive(Debug)]
struct State {
    session: Option<Session>,
    next_session: u64,
    /// Writes under way, or waiting for admission by a job, that began while there was an observer.
    writes: usize,
    /// Drains that have begun and not ended.
    drains: usize,
    bitmaps: BTreeMap<String, Named>,
    /// What writes are marked in before they begin.
    log: Option<Arc<WriteLog>>,
}

/// A job on the tap.
#[derive(Debug)]
struct Session {
    id: u64,
    observer: Arc<dyn WriteObserver>,
    /// The bitmap that says what it copies.
    bitmap: Option<String>,
}

impl State {
    fn is_idle(&self) -> bool {
        self.session.is_none()
            && self.drains == 0
            && self.log.is_none()
            && !self.bitmaps.values().any(Named::is_enabled)
    }

    /// The job on the tap that is not over.
    fn live_session(&self) -> Option<&Session> {
        self.session.as_ref().filter(|session| !session.observer.is_over())
    }
}

/// What a job is attached with.
pub(crate) struct AttachContext<'a> {
    pub(crate) session: u64,
    pub(crate) source: Arc<dyn BlockDevice>,
    /// The bitmap that says what to copy.
    pub(crate) bitmap: Option<&'a DirtyBitmap>,
    /// Those of callers of the tap that never wait.
    pub(crate) wakers: Arc<Wakers>,
}

impl Tap {
    /// A tap in front of `device`.
    pub fn new(device: Arc<dyn BlockDevice>) -> Arc<Self> {
        let name = Arc::from(device.name());
        Self::build(device, name, false)
    }

    /// A tap in front of `device` that messages call `name`, whatever device is below it later.
    pub fn named(device: Arc<dyn BlockDevice>, name: &str) -> Arc<Self> {
        Self::build(device, Arc::from(name), true)
    }

    fn build(device: Arc<dyn BlockDevice>, name: Arc<str>, has_own_name: bool) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            name,
            has_own_name,
            below: ArcSwap::from_pointee(Below::new(device)),
            in_flight: InFlightCounters::new(),
            state: Mutex::new(State {
                session: None,
                next_session: 0,
                writes: 0,
                drains: 0,
                bitmaps: BTreeMap::new(),
                log: None,
            }),
            landed: Condvar::new(),
            resumed: Condvar::new(),
            wakers: Arc::default(),
        })
    }

    /// The disk that the tap forwards to at present.
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.below.load().device)
    }

    /// Whether a job is attached that is not over.
    pub fn is_mirrored(&self) -> bool {
        self.state.lock().live_session().is_some()
    }

    /// Writes that have begun and not finished, those included that wait for admission by a job.
    pub fn writes_under_way(&self) -> usize {
        self.under_way(&self.state.lock())
    }

    fn under_way(&self, state: &State) -> usize {
        state.writes + self.in_flight.writes()
    }

    /// What messages call the disk.
    pub(crate) fn title(&self) -> String {
        if self.has_own_name { self.name.to_string() } else { self.device().name().to_owned() }
    }

    /// Sets in the shards whether there is an observer; returns the writes under way in them.
    fn update_observed(&self, state: &State) -> usize {
        self.in_flight.set_observed(!state.is_idle())
    }

    /// Attaches the job that `make` sets up. From then on it is notified of every write that finishes.
    pub(crate) fn attach<J: WriteObserver + 'static>(
        &self,
        bitmap: Option<&str>,
        make: impl FnOnce(AttachContext<'_>) -> Result<Arc<J>, Error>,
    ) -> Result<Arc<J>, Error> {
        let _deliver = self.wakers.deliver_at_end();
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.live_session().is_some() {
            return Err(Error::Busy { disk: self.title() });
        }
        let seed = match bitmap {
            None => None,
            Some(name) => Some(&self.free_bitmap(state, name)?.map),
        };
        let session = state.next_session;
        let (source, wakers) = (self.device(), Arc::clone(&self.wakers));
        let job = make(AttachContext { session, source, bitmap: seed, wakers })?;
        state.next_session += 1;
        let observer = Arc::clone(&job) as Arc<dyn WriteObserver>;
        state.session = Some(Session { id: session, observer, bitmap: bitmap.map(str::to_owned) });
        let pre_attach_writes = state.writes + self.update_observed(state);
        job.expect_pre_attach_writes(pre_attach_writes);
        Ok(job)
    }

    /// Performs the last step of the job `session`: with [`Ending::Pivot`], the pivot. The guest is quiesced,
    /// or the job has failed. Does no I/O, and cannot fail. After a pivot: when the old disk is used no
    /// longer.
    pub(crate) fn end(
        &self,
        session: u64,
        ending: Ending,
        target: &Arc<dyn BlockDevice>,
    ) -> Option<Arc<LastUse>> {
        // Dropped without the lock.
        let _log_that_is_off;
        let old;
        let _deliver = self.wakers.deliver_at_end();
        let mut state = self.state.lock();
        let state = &mut *state;
        let current = state.session.take_if(|current| current.id == session)?;
        _log_that_is_off = state.log.take_if(|log| !log.is_on());
        let bitmap = current.bitmap.and_then(|name| state.bitmaps.get_mut(&name));
        match ending {
            Ending::Fail => {
                if let Some(bitmap) = bitmap {
                    bitmap.cut_to(&current.observer.missing());
                }
            }
            Ending::Pivot | Ending::Keep => {
                if let Some(bitmap) = bitmap.filter(|_| current.observer.renews_bitmap()) {
                    bitmap.map.clear_all();
                }
            }
        }
        old = (ending == Ending::Pivot).then(|| self.below.swap(Arc::new(Below::new(Arc::clone(target)))));
        self.update_observed(state);
        old.as_ref().map(|old| old.last_use())
    }

    /// The job `session` is over: it is not notified any more.
    pub(crate) fn detach(&self, session: u64) {
        let mut state = self.state.lock();
        if state.session.take_if(|current| current.id == session).is_some() {
            self.update_observed(&state);
        }
    }

    /// Performs a write that is counted in shard `index`: the same as [`begin`](Self::begin) and a
    /// ticket's end, without a ticket.
    fn write_unobserved(
        &self,
        index: usize,
        operation: &'static str,
        range: ByteRange,
        write: impl FnOnce(&dyn BlockDevice) -> block::Result<()>,
    ) -> block::Result<()> {
        let mut inside = UnobservedIo { tap: self, index, range: ByteRange::default() };
        let below = self.below.load();
        below.check_bounds(operation, range)?;
        inside.range = range;
        write(&*below.device)
    }

    /// A write that is counted in shard `index` has finished.
    fn end_unobserved(&self, index: usize, range: ByteRange) {
        if self.in_flight.end(index) {
            return;
        }
        // An observer came meanwhile. Counting and notifying are one step for it.
        let _deliver = self.wakers.deliver_at_end();
        let mut state = self.state.lock();
        self.in_flight.end_observed(index);
        state.notify(range, None, |_| {});
        self.notify_landed(&state);
    }

    /// A write that began while there was an observer has finished; `own` notifies the job that admitted it,
    /// if that is still attached.
    fn end_write(&self, range: ByteRange, session: Option<u64>, own: impl FnOnce(&dyn WriteObserver)) {
        let _deliver = self.wakers.deliver_at_end();
        let mut state = self.state.lock();
        state.writes -= 1;
        state.notify(range, session, own);
        self.notify_landed(&state);
    }

    fn notify_landed(&self, state: &State) {
        if state.drains > 0 && self.under_way(state) == 0 {
            self.landed.notify_all();
        }
    }
}

impl State {
    fn notify(&mut self, range: ByteRange, session: Option<u64>, own: impl FnOnce(&dyn WriteObserver)) {
        for bitmap in self.bitmaps.values_mut() {
            bitmap.record(range);
        }
        match &self.session {
            Some(current) if Some(current.id) == session => own(&*current.observer),
            Some(current) => current.observer.pre_attach_write_finished(range),
            None => {}
        }
    }
}

/// A copy-up that is counted as a write under way and changes nothing that is read; also should the device
/// panic.
struct ObservedCopyUp<'a> {
    tap: &'a Tap,
    /// The job that admitted it.
    session: Option<u64>,
}

impl Drop for ObservedCopyUp<'_> {
    fn drop(&mut self) {
        self.tap.end_write(ByteRange::default(), self.session, |observer| observer.end_copy_up());
    }
}

/// An operation that is counted in a shard; also should the device panic.
struct UnobservedIo<'a> {
    tap: &'a Tap,
    index: usize,
    range: ByteRange,
}

impl Drop for UnobservedIo<'_> {
    fn drop(&mut self) {
        self.tap.end_unobserved(self.index, self.range);
    }
}

impl BlockDevice for Tap {
    /// That of the disk below. Changes only under a [`Drained`].
    fn len(&self) -> u64 {
        self.below.load().len
    }

    /// The name given to the tap, or that of the first disk below it: a handle of the guest, which a pivot
    /// does not change. The disk that the tap forwards to now has its own at [`device`](Tap::device).
    fn name(&self) -> &str {
        &self.name
    }

    /// That of the disk the tap forwards to now: another one after a pivot.
    fn geometry(&self) -> Geometry {
        self.below.load().device.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> block::Result<()> {
        self.below.load().device.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> block::Result<()> {
        let range = ByteRange::checked(offset, buf.len()).unwrap_or_else(|| ByteRange::at(offset, u64::MAX));
        if let Some(shard) = self.in_flight.begin() {
            return self
                .write_unobserved(shard, "write", range, |device| device.write_at(buf, offset, flags));
        }
        let write = self.begin_open(Change::Data, range)?;
        let result = write.source().write_at(buf, offset, flags);
        // Durable at the source is durable for the guest; the job flushes the target before it takes over.
        write.complete_with(result, |target| Some(target.write_at(buf, offset, WriteFlags::NONE)))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> block::Result<()> {
        if let Some(shard) = self.in_flight.begin() {
            return self.write_unobserved(shard, "write", range, |device| device.write_zeroes(range, flags));
        }
        let write = self.begin_open(Change::Zeroes, range)?;
        let result = write.source().write_zeroes(range, flags);
        let flags = flags.difference(ZeroFlags::FUA | ZeroFlags::NO_FALLBACK);
        write.complete_with(result, |target| Some(target.write_zeroes(range, flags)))
    }

    /// What a discarded range reads as is the disk's choice: the target gets that, not the discard.
    fn discard(&self, range: ByteRange) -> block::Result<()> {
        let write = self.begin_open(Change::Discard, range)?;
        let source = Arc::clone(write.source());
        let result = source.discard(range);
        write.complete_with(result, |target| discard::repeat(&*source, target, range))
    }

    fn flush(&self) -> block::Result<()> {
        self.below.load().device.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> block::Result<()> {
        self.below.load().device.extents(range, visit)
    }

    /// What is read does not change, so observers are not notified; but the device below is not replaced
    /// meanwhile, neither by a drain nor by a pivot.
    fn copy_up(&self, range: ByteRange, max_depth: u32) -> block::Result<u64> {
        const OPERATION: &str = "copy up";
        loop {
            if let Some(index) = self.in_flight.begin() {
                let _inside = UnobservedIo { tap: self, index, range: ByteRange::default() };
                return self.device().copy_up(range, max_depth);
            }
            let session = {
                let state = self.state.lock();
                let mut state = self.wait_for_resume(state, OPERATION, range)?;
                if state.is_idle() {
                    continue;
                }
                state.writes += 1;
                state.session.as_ref().map(|session| (session.id, Arc::clone(&session.observer)))
            };
            let admission = session.as_ref().map(|(session, observer)| (*session, observer.begin_copy_up()));
            if let Some((session, admission @ (Admission::Wait | Admission::JobEnded))) = admission {
                self.end_write(ByteRange::default(), Some(session), |_| {});
                if admission == Admission::Wait {
                    return Err(given_up(OPERATION, range));
                }
                self.detach(session);
                continue;
            }
            let _counted = ObservedCopyUp { tap: self, session: session.map(|(session, _)| session) };
            return self.device().copy_up(range, max_depth);
        }
    }

    /// Quiesces the guest meanwhile, as [`Drained::resize`] does. [`Locked`](block::ErrorKind::Locked) while
    /// a job is attached or a bitmap is in use.
    fn resize(&self, len: u64, may_shrink: bool) -> block::Result<()> {
        self.resize_quiesced(len, may_shrink).map_err(|error| match error {
            Error::Disk(error) => error,
            error => DiskError::new(block::ErrorKind::Locked, "resize").because(error.to_string()),
        })
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(self.device())
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        if !self.in_flight.is_observed() {
            return self.below.load().device.write_would_wait(range);
        }
        let (observer, log) = {
            let state = self.state.lock();
            if state.drains > 0 {
                return true;
            }
            let observer = state.session.as_ref().map(|session| Arc::clone(&session.observer));
            (observer, state.log.clone())
        };
        if log.is_some_and(|log| log.would_wait(range)) {
            return true;
        }
        match observer {
            Some(observer) => observer.write_would_wait(range),
            None => self.device().write_would_wait(range),
        }
    }

    fn cancel_in_flight(&self) {
        self.below.load().device.cancel_in_flight();
    }
}
