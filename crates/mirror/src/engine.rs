//! The engine: the worker threads of a job, and what they share with its handles.
//!
//! One mutex guards the core. Handles outlive the job; the disks are closed when it is over. A thread that is
//! given an action wakes one more waiting thread, or starts another (`workers`), so that as many are awake as
//! there is work for.

mod guests;
mod log;
mod observer;
mod region_log;
mod workers;

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockmirror_block::cancel::CancelSource;
use blockmirror_block::sync::{Condvar, Instant, Mutex, MutexGuard};
use blockmirror_block::{BlockDevice, Geometry};

use crate::batch::Batch;
use crate::checkpoint::CheckpointSink;
use crate::cow_target::CowTarget;
use crate::error::Error;
use crate::machine::{AdmissionView, MemberView};
use crate::machine::{Core, Done, Ending, Next, Work};
use crate::mover::{CopyPolicy, Mover};
use crate::notify::Notify;
use crate::options::MirrorOptions;
use crate::progress::Event;
use crate::reflink::Clones;
use crate::region_log::WriteLog;
use crate::scan::TargetContent;
use crate::tap::{LastUse, Tap};
use crate::wakers::Wakers;
use workers::Workers;
pub(crate) use workers::most_by_default;

/// How long an aborting job waits before it cancels blocked calls once more.
pub(crate) const CANCEL_AGAIN: Duration = Duration::from_millis(10);
/// How long an aborting job waits for its own calls, which are cancelled one by one, before it cancels all
/// that its devices have in flight: a target over a dead peer may be in a step that cannot be cancelled.
const DEVICE_GRACE: Duration = Duration::from_millis(500);

/// What the threads and the controls of a job share.
#[derive(Debug)]
pub(crate) struct Engine {
    /// *Guards* the disks, `None` once the job is over. *Order*: leaf. *Not under it*: anything.
    disks: Mutex<Option<JobDisks>>,
    policy: CopyPolicy,
    clones: Option<Clones>,
    started: Instant,
    /// *Guards* the core and who waits for it. *Order*: after the tap's state; before a group's wake-up, a
    /// leaf. *Not under it*: device calls, the tap's state, `disks`.
    state: Mutex<State>,
    /// There may be something to do.
    work: Condvar,
    /// The job is over, or on its way there.
    concluded: Condvar,
    /// There is an event to take.
    events: Condvar,
    /// A write of the guest may be admitted: its thread waits here, in `observer::wait_for_admission`.
    guests: Condvar,
    attachment: Option<TapAttachment>,
    /// The log of the tap outlives the job.
    keeps_log: AtomicBool,
    /// Called after each periodic flush.
    checkpoints: Option<Arc<dyn CheckpointSink>>,
    /// Cancels the calls of devices that were made for the job.
    calls: CancelSource,
    workers: Workers,
}

/// The two ends of a job.
#[derive(Clone, Debug)]
pub(crate) struct JobDisks {
    source: Arc<dyn BlockDevice>,
    target: Arc<dyn BlockDevice>,
    /// In front of a target that has to be completed.
    cow: Option<Arc<CowTarget>>,
    /// The source stands on the target, so that the guest reads it.
    target_is_below: bool,
}

/// The tap that a job is attached to.
#[derive(Debug)]
pub(crate) struct TapAttachment {
    pub(crate) tap: Weak<Tap>,
    pub(crate) session: u64,
    /// The bitmap that says what to copy starts anew if the job succeeds.
    pub(crate) renews_bitmap: bool,
    /// The group that the job ends with.
    pub(crate) notify: Option<Arc<Notify>>,
    /// The log that guest writes are marked in and the job clears; the tap's own.
    pub(crate) log: Weak<WriteLog>,
    /// Those of callers of the tap that never wait.
    pub(crate) wakers: Arc<Wakers>,
}

impl JobDisks {
    /// For a job with these `options`, in a granularity of `granularity` bytes.
    pub(crate) fn new(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: &MirrorOptions,
        granularity: u64,
    ) -> Self {
        let cow = CowTarget::in_front_of(&target, &source, options, granularity);
        Self { source, target, cow, target_is_below: options.target_is_below }
    }

    /// How the target is written: itself, or [`CowTarget`] in front of it.
    pub(crate) fn through(&self) -> Arc<dyn BlockDevice> {
        match &self.cow {
            Some(cow) => Arc::clone(cow) as Arc<dyn BlockDevice>,
            None => Arc::clone(&self.target),
        }
    }

    /// The geometry that counts for operations on the target.
    pub(crate) fn target_geometry(&self) -> Geometry {
        self.through().geometry()
    }

    /// What is known of the target.
    pub(crate) fn content(&self, options: &MirrorOptions) -> TargetContent {
        TargetContent::of(self.source.geometry().backing, self.target.geometry().backing, options)
    }
}

#[derive(Debug)]
struct State {
    core: Core,
    /// What guest writes go to at the target; `None` once the job is over.
    target: Option<Arc<dyn BlockDevice>>,
    /// Threads waiting at `work`.
    idle: usize,
    /// When the one of them wakes that keeps the deadline for all.
    next_deadline: Option<Duration>,
    /// Writes of the guest waiting at `guests`.
    guests_waiting: usize,
    ended: Option<Duration>,
    /// Since when the job is aborting.
    aborting_since: Option<Duration>,
    /// The state last reported to the group.
    reported_view: Option<MemberView>,
    /// What guest writes were woken for last.
    reported_admission: Option<AdmissionView>,
}

/// The workers waiting at `work` that a change concerns. Guest writes are woken after each change.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wake {
    /// None: nothing changed for workers.
    None,
    /// One, which wakes another if it finds something to do.
    One,
    /// All: what they wait for may have moved.
    All,
}

impl Engine {
    pub(crate) fn new(
        disks: JobDisks,
        policy: CopyPolicy,
        core: Core,
        attachment: Option<TapAttachment>,
        checkpoints: Option<Arc<dyn CheckpointSink>>,
        clones: Option<Clones>,
    ) -> Self {
        let target = Some(disks.through());
        Self {
            disks: Mutex::new(Some(disks)),
            policy,
            clones,
            started: Instant::now(),
            state: Mutex::new(State {
                core,
                target,
                idle: 0,
                next_deadline: None,
                guests_waiting: 0,
                ended: None,
                aborting_since: None,
                reported_view: None,
                reported_admission: None,
            }),
            work: Condvar::new(),
            concluded: Condvar::new(),
            events: Condvar::new(),
            guests: Condvar::new(),
            attachment,
            keeps_log: AtomicBool::new(false),
            checkpoints,
            calls: CancelSource::new(),
            workers: Workers::default(),
        }
    }

    /// Reads or changes the core, and wakes the threads and callers that this concerns. Under no lock.
    pub(crate) fn with_core<R>(&self, wake: Wake, f: impl FnOnce(&mut Core, Duration) -> R) -> R {
        let answer = self.with_core_locked(wake, f);
        self.deliver();
        answer
    }

    /// The same for a thread that has a lock of the tap or the group: it [delivers](Self::deliver) when it
    /// has released that.
    pub(crate) fn with_core_locked<R>(&self, wake: Wake, f: impl FnOnce(&mut Core, Duration) -> R) -> R {
        self.change(&mut self.state.lock(), wake, f)
    }

    /// Time has come to `now`: wakes the threads that this concerns.
    fn advance_clock(&self, state: &mut State, now: Duration) {
        if state.core.on_timer(now) {
            self.work.notify_all();
            self.wake_waiters(state);
        }
    }

    fn change<R>(&self, state: &mut State, wake: Wake, f: impl FnOnce(&mut Core, Duration) -> R) -> R {
        let now = state.ended.unwrap_or_else(|| self.started.elapsed());
        self.advance_clock(state, now);
        let answer = f(&mut state.core, now);
        self.wake_waiters(state);
        match wake {
            Wake::None => {}
            Wake::One if state.idle > 0 && !state.core.guest_makes_no_work() => self.work.notify_one(),
            Wake::One => {}
            Wake::All => self.work.notify_all(),
        }
        answer
    }

    /// Cancels the job, and calls that may never return.
    pub(crate) fn cancel(&self) {
        self.with_core(Wake::All, |core, _| core.abort(Error::Cancelled));
        self.cancel_calls();
    }

    /// The target may have lost what no flush has covered. Nothing is in flight.
    pub(crate) fn writes_lost(&self) {
        if let Some(JobDisks { cow: Some(cow), .. }) = self.disks() {
            cow.writes_lost();
        }
        self.with_core(Wake::All, |core, _| core.writes_lost());
    }

    /// Ends a job that has no threads.
    pub(crate) fn abandon(&self) {
        self.with_core(Wake::None, |core, _| core.abandon());
        if let Some(tap) = self.write_log().and_then(|_| self.attachment.as_ref()?.tap.upgrade()) {
            // What could not be done is in the trace: there is no job that could say it.
            let _ = tap.close_log();
        }
        self.detach();
    }

    fn disks(&self) -> Option<JobDisks> {
        self.disks.lock().clone()
    }

    /// The next event; waits for one for at most `timeout`, or until there can be none any more.
    pub(crate) fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        loop {
            if let Some(event) = state.core.take_event() {
                return Some(event);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if state.core.is_null() || left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            state = self.wait_cancelling(&self.events, state, left);
        }
    }

    /// The last step. The guest stays on the source if the tap has a log that cannot be ended.
    fn end(self: &Arc<Self>, id: u64, ending: Ending, target: &Arc<dyn BlockDevice>) -> Done {
        let Some(attachment) = &self.attachment else { return Done::Ended };
        let Some(tap) = attachment.tap.upgrade() else { return Done::Ended };
        let keeps_log = ending != Ending::Pivot && self.keeps_log.load(Ordering::Acquire);
        let ended = if keeps_log { Ok(()) } else { tap.end_log(ending) };
        let ending = if ended.is_ok() { ending } else { Ending::Fail };
        if let Some(old) = tap.end(attachment.session, ending, target)
            && self.reads_go_on(id, &old)
        {
            return Done::StillRead;
        }
        ended.map_or_else(Done::LogNotEnded, |()| Done::Ended)
    }

    /// The tap has moved, by the action `id`. Whether reads are under way at the old disk: the end is
    /// reported when the last of them has ended, by its thread.
    fn reads_go_on(self: &Arc<Self>, id: u64, old: &LastUse) -> bool {
        // They may be those of threads that wait to write.
        self.with_core(Wake::All, |core, _| core.guest_has_moved());
        let own = Arc::clone(self);
        let ended =
            move || own.with_core(Wake::All, |core, now| core.on_completion(now, id, Ok(Done::Ended)));
        old.then(ended)
    }

    /// The process is about to end: a log of the job is to stay valid, unless the tap moves to the target.
    pub(crate) fn keep_log(&self) {
        self.keeps_log.store(true, Ordering::Release);
    }

    /// The job is over. Whether this is the first thread to say so.
    fn detach(&self) -> bool {
        let first = self.disks.lock().take().is_some();
        // Dropped without the lock.
        let _target = self.state.lock().target.take();
        if let Some(attachment) = &self.attachment
            && let Some(tap) = attachment.tap.upgrade()
        {
            tap.detach(attachment.session);
        }
        first
    }

    /// Cancels calls that may never return if the job is aborting.
    pub(crate) fn cancel_calls_if_aborting(&self) {
        if self.with_core(Wake::None, |core, _| core.is_aborting()) {
            self.cancel_calls();
        }
    }

    /// Cancels the calls that the job has made, and after a while what its own devices have in flight. What
    /// others do with the source, or with what the target stands on, goes on.
    fn cancel_calls(&self) {
        let Some(disks) = self.disks() else { return };
        let waited = {
            let state = self.state.lock();
            let now = self.started.elapsed();
            if !state.core.may_cancel_calls(now) {
                return;
            }
            state.aborting_since.map(|since| now.saturating_sub(since))
        };
        self.calls.cancel();
        // All that a device has in flight is the job's to cancel only where no other uses the device: a
        // target that the guest does not read, a source without a guest.
        if waited.is_some_and(|waited| waited >= DEVICE_GRACE) {
            if !disks.target_is_below {
                disks.target.cancel_in_flight();
            }
            if self.attachment.is_none() {
                disks.source.cancel_in_flight();
            }
        }
    }

    /// Waits on `condition` for at most `timeout`, if there is one.
    ///
    /// While the job is aborting this returns soon, having cancelled blocked calls once more: a thread may
    /// have been given its action before the job was aborted, and have called the device only after the last
    /// cancellation.
    fn wait_cancelling<'a>(
        &'a self,
        condition: &Condvar,
        state: MutexGuard<'a, State>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        let aborting = state.core.is_aborting() && !state.core.is_concluded();
        let again = aborting.then_some(CANCEL_AGAIN);
        let state = match timeout.into_iter().chain(again).min() {
            None => condition.wait(state),
            Some(timeout) => condition.wait_timeout(state, timeout).0,
        };
        if !aborting || state.core.is_concluded() {
            return state;
        }
        drop(state);
        self.cancel_calls();
        self.state.lock()
    }

    /// Waits for the end of the job, for at most `timeout` if there is one; whether it has ended.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> bool {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        while !state.core.is_concluded() {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            state = self.wait_cancelling(&self.concluded, state, left);
        }
        true
    }

    /// A worker thread: ask, perform, report, until the job is over.
    fn run(self: &Arc<Self>) {
        let Some(JobDisks { source, target, cow, .. }) = self.disks() else { return };
        let mover = Mover::new(&*source, &*target, cow.as_deref(), self.policy);
        let mut mover = mover.sharing(self.clones.as_ref()).flushing_source(self.write_log().is_some());
        let mut batch = Batch::default();
        let mut state = self.state.lock();
        loop {
            let now = self.started.elapsed();
            let next = state.core.next(now);
            match next {
                Next::Do(action) => {
                    batch.begin(action);
                    while batch.should_extend(state.core.writes_through())
                        && let Next::Do(action) = state.core.next(now)
                    {
                        batch.actions.push(action);
                    }
                    let at_flush = self.flush_begins(&state.core, &batch);
                    self.wake_waiters(&mut state);
                    let (others_wait, left) = (state.idle > 0, state.core.left());
                    drop(state);
                    self.deliver();
                    if others_wait {
                        self.work.notify_one();
                    } else {
                        self.start_another(left);
                    }
                    self.perform(&mut mover, &mut batch, &target);
                    self.flush_ended(at_flush, &mut batch);
                    state = self.state.lock();
                    let ended = self.started.elapsed();
                    batch.record(ended.saturating_sub(now));
                    for (action, result) in batch.actions.drain(..).zip(batch.results.drain(..)) {
                        match result {
                            Ok(result) => state.core.on_completion(ended, action.id, result),
                            Err(_) => state.core.panicked(ended, action.id),
                        }
                    }
                    self.wake_waiters(&mut state);
                }
                Next::Wait(until) => {
                    self.wake_waiters(&mut state);
                    let (unlocked, changed) = self.deliver_unlocked(state);
                    state = if changed { unlocked } else { self.wait_for_work(unlocked, until) };
                }
                Next::Finished => {
                    self.wake_waiters(&mut state);
                    drop(state);
                    self.deliver();
                    if self.detach() {
                        self.log_end();
                    }
                    return;
                }
            }
        }
    }

    /// Performs a batch, without the lock.
    fn perform(self: &Arc<Self>, mover: &mut Mover<'_>, batch: &mut Batch, target: &Arc<dyn BlockDevice>) {
        for action in &batch.actions {
            // A device that panics must end the job, not hang it: its action would never be reported.
            batch.results.push(panic::catch_unwind(AssertUnwindSafe(|| match action.work {
                Work::End(ending) => Ok(self.end(action.id, ending, target)),
                work => {
                    let _calls = self.calls.enter();
                    mover.perform(work).inspect_err(|failure| log::failed(work, failure))
                }
            })));
        }
    }

    /// Waits until there may be work, or this time. One worker that wakes in time is enough: it wakes others
    /// if there is more than it takes.
    fn wait_for_work<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        until: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        state.idle += 1;
        let until = until.filter(|until| state.next_deadline.is_none_or(|next| *until < next));
        state = match until {
            None => self.work.wait(state),
            Some(until) => {
                state.next_deadline = Some(until);
                let left = until.saturating_sub(self.started.elapsed());
                let mut state = self.work.wait_timeout(state, left).0;
                state.next_deadline.take_if(|next| *next == until);
                state
            }
        };
        state.idle -= 1;
        state
    }

    /// Wakes the threads that the core's last change concerns.
    fn wake_waiters(&self, state: &mut State) {
        self.wake_guests(state);
        self.limit_log(&state.core);
        if state.core.has_events() {
            self.events.notify_all();
        }
        if state.core.is_aborting() {
            if state.aborting_since.is_none() {
                state.aborting_since = Some(self.started.elapsed());
                // What they wait for, such as the speed limit, does not delay the end.
                self.work.notify_all();
            }
            // The waiting thread must see to it that blocked calls come back.
            self.concluded.notify_all();
        }
        if state.ended.is_none() && state.core.is_concluded() {
            state.ended = Some(self.started.elapsed());
            self.concluded.notify_all();
            self.work.notify_all();
        }
        if let Some(TapAttachment { notify: Some(notify), .. }) = &self.attachment {
            let view = state.core.view();
            if state.reported_view.replace(view) != Some(view) {
                notify.notify();
            }
        }
    }
}
