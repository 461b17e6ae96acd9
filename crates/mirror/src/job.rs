//! A job as its user sees it: start, observe, control, wait.

mod detached;

use std::num::NonZeroUsize;
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockmirror_block::{BlockDevice, ByteRange};
use tracing::error_span;

use crate::checkpoint::Checkpoints;
use crate::cow_target::check_tail;
use crate::distinct::{check_distinct, check_no_tap};
use crate::engine::{Engine, JobDisks, TapAttachment, Wake, most_by_default};
use crate::error::{Error, ErrorKind};
use crate::granularity::GranularityChoice;
use crate::machine::Core;
use crate::machine::config::Config;
use crate::mover::CopyPolicy;
use crate::notify::Notify;
use crate::options::{BitmapMode, CopyMode, MirrorOptions, SyncMode};
use crate::plan::check_lengths;
use crate::progress::{Event, Outcome, Progress};
use crate::reflink::Clones;
use crate::region_log::WriteLog;
use crate::state::Refused;
use crate::tap::{AttachContext, Tap};

/// Controls and observes a job from any thread. Cheap to clone; harmless once the job is over.
#[derive(Clone, Debug)]
pub struct MirrorControl {
    engine: Arc<Engine>,
}

impl MirrorControl {
    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The figures at this moment.
    pub fn progress(&self) -> Progress {
        self.engine.with_core(Wake::None, |core, now| core.progress(now))
    }

    /// Why the job fails or has failed: its kind, and in one line for people. There from
    /// [`Aborting`](crate::JobState::Aborting) on, until [`MirrorJob::wait`] returns it.
    pub fn failure(&self) -> Option<(ErrorKind, String)> {
        self.engine.with_core(Wake::None, |core, _| {
            let error = core.failure()?;
            Some((error.kind(), error.to_string()))
        })
    }

    /// What kind of error of a device the job fails with, if it is one; as long as [`failure`](Self::failure)
    /// tells.
    pub fn device_failure(&self) -> Option<blockmirror_block::ErrorKind> {
        self.engine.with_core(Wake::None, |core, _| match core.failure() {
            Some(Error::Source(error) | Error::Target(error)) => Some(error.kind()),
            _ => None,
        })
    }

    /// Takes the events since the last call, oldest first. If they are not taken, only the latest are kept.
    pub fn events(&self) -> Vec<Event> {
        self.engine.with_core(Wake::None, |core, _| core.take_events())
    }

    /// The next event; waits for one for at most `timeout`, for ever if that is `None`. `None` if there was
    /// none, or the job is over (and dismissed) so that there will be none.
    pub fn next_event(&self, timeout: Option<Duration>) -> Option<Event> {
        self.engine.next_event(timeout)
    }

    /// Aborts the job: [`MirrorJob::wait`] returns [`Error::Cancelled`] as soon as nothing is in flight.
    /// The target is incomplete then. Does nothing to a job that is over.
    pub fn cancel(&self) {
        self.engine.cancel();
    }

    /// Ends a job that is ready and keeps the target as a copy of one instant: nothing the guest writes later
    /// is in it, and everything it wrote before is. A job that has not been ready yet is aborted.
    ///
    /// # Errors
    /// [`Refused`], as all verbs: the state does not allow it, or the job is paused (then only force ends
    /// it).
    pub fn keep_copy(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.cancel())?;
        self.engine.cancel_calls_if_aborting();
        Ok(())
    }

    /// Aborts the job, as [`cancel`](Self::cancel) does, but fails if it is too late.
    ///
    /// # Errors
    /// [`Refused`] if the job has ended already.
    pub fn force_cancel(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.force_cancel())?;
        self.engine.cancel_calls_if_aborting();
        Ok(())
    }

    /// The process is about to end, and another is to go on where this job ends: its log
    /// ([`MirrorOptions::live_log`]) stays valid, and with the tap, when the job ends without a pivot.
    ///
    /// [`MirrorOptions::live_log`]: crate::MirrorOptions::live_log
    pub fn keep_log(&self) {
        self.engine.keep_log();
    }

    /// Ends a job that is ready with the pivot: the tap moves to the target.
    ///
    /// # Errors
    /// [`Refused`] before the job is ready.
    pub fn complete(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.complete())
    }

    /// Lets a job end that was started with `auto_finalize` off.
    ///
    /// # Errors
    /// [`Refused`] unless it waits for that, or if an error has stopped it meanwhile:
    /// [`resume`](Self::resume) it first.
    pub fn finalize(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.finalize())
    }

    /// Forgets a job that is over and was started with `auto_dismiss` off.
    ///
    /// # Errors
    /// [`Refused`] unless it is over.
    pub fn dismiss(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::None, |core, _| core.dismiss())
    }

    /// Starts nothing new until [`resume`](Self::resume). What is in flight is finished. Meanwhile the target
    /// gets none of the guest's writes, in any mode.
    ///
    /// # Errors
    /// [`Refused`] if it is paused already, or about to end.
    pub fn pause(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.pause())
    }

    /// Goes on after [`pause`](Self::pause), and after an error policy stopped the job, even while it is
    /// [`Pending`](crate::JobState::Pending): there no other verb leads on.
    ///
    /// # Errors
    /// [`Refused`] if it is not paused.
    pub fn resume(&self) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.resume())
    }

    /// Says that the target may have lost what was written to it and not flushed: all of that is copied
    /// again. For a paused job, nothing of which is in flight, whose target was opened anew after a failed
    /// flush. A flush that fails by itself needs no such word.
    pub fn writes_lost(&self) {
        self.engine.writes_lost();
    }

    /// Changes the speed in bytes per second; 0 is as fast as it goes. A job that is ready goes as fast as it
    /// can.
    ///
    /// # Errors
    /// [`Refused`] if the job is about to end.
    pub fn set_speed(&self, bytes_per_second: u64) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, now| core.set_speed(now, bytes_per_second))
    }

    /// Changes when the target gets what the guest writes.
    ///
    /// # Errors
    /// [`Refused`] if the job is about to end.
    pub fn change(&self, mode: CopyMode) -> Result<(), Refused> {
        self.engine.with_core(Wake::All, |core, _| core.change(mode))
    }

    /// Says that the source has changed in `range`, so that it is copied again. To be called *after* the
    /// write has finished, whether or not it succeeded; a call before it may be too early. Once the job is
    /// over it does nothing.
    pub fn mark_dirty(&self, range: ByteRange) {
        self.engine.with_core(Wake::One, |core, _| core.mark_dirty(range));
    }

    /// The ranges that the target does not have, as things are: what a job that has failed or was cancelled
    /// has left, and what it has given up. All others are on stable storage once a flush of the target has
    /// succeeded that begins after this call. In no order; some may overlap.
    pub fn not_copied(&self) -> Vec<ByteRange> {
        self.engine.with_core(Wake::None, |core, _| core.not_copied())
    }

    /// Waits until the job has ended, for at most `timeout`; true if it has.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.engine.wait(Some(timeout))
    }
}

/// A running mirror job. Dropping it cancels it and waits for its threads.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::testing::MemoryDisk;
/// use blockmirror_mirror::{MirrorJob, MirrorOptions};
///
/// let source = Arc::new(MemoryDisk::new(1 << 20));
/// let target = Arc::new(MemoryDisk::new(1 << 20));
/// let job = MirrorJob::start(source, target, MirrorOptions::new())?;
/// println!("granularity: {}", job.granularity());
/// let outcome = job.wait()?;
/// assert!(outcome.given_up.is_empty());
/// # Ok::<(), blockmirror_mirror::Error>(())
/// ```
#[derive(Debug)]
pub struct MirrorJob {
    control: MirrorControl,
    granularity: GranularityChoice,
}

impl MirrorJob {
    /// Checks everything that can be checked, then starts to copy `source` to `target`.
    ///
    /// The job ends by itself when the target equals the source and a flush of the target has succeeded. Who
    /// writes to the source meanwhile has to say so with [`mark_dirty`](MirrorControl::mark_dirty).
    ///
    /// # Errors
    /// Invalid options, different lengths, a read-only target, one disk for both ([`Error::SameDevice`]), a
    /// [`Tap`] as source ([`Error::SourceIsTap`]: [`attach`](Self::attach) to it): nothing was touched then.
    /// [`Error::Thread`] if the system gives not a single thread.
    pub fn start(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: MirrorOptions,
    ) -> Result<Self, Error> {
        Self::start_with_checkpoints(source, target, options, None)
    }

    /// The same; with `checkpoints` a caller is kept informed of what the target has durably, so that another
    /// job can go on from there ([`MirrorOptions::only`]).
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_with_checkpoints(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: MirrorOptions,
        checkpoints: impl Into<Option<Checkpoints>>,
    ) -> Result<Self, Error> {
        if !matches!(options.sync, SyncMode::Full | SyncMode::Top) {
            return Err(Error::NeedsTap);
        }
        check_no_tap(&source)?;
        check_distinct(&source, &target)?;
        let granularity = check(&*source, &*target, &options)?;
        let len = source.len();
        let ends = JobDisks::new(Arc::clone(&source), target, &options, granularity.bytes);
        let clones = Clones::checked(&options, false, &*source, &*ends.through())?;
        let geometry = ends.target_geometry();
        let mut config = Config::new(&options, granularity.bytes, len, geometry);
        let checkpoints = checkpoints.into();
        if let Some(checkpoints) = &checkpoints {
            config = config.with_checkpoints(checkpoints.interval);
        }
        let core = Core::new(config)?;
        let policy = CopyPolicy::new(&options, geometry, ends.content(&options));
        let sink = checkpoints.map(|checkpoints| checkpoints.sink);
        let engine = Engine::new(ends, policy, core, None, sink, clones);
        Self::run(Arc::new(engine), granularity, &options)
    }

    /// Starts to copy the disk behind `tap` to `target`, while it is written through the tap.
    ///
    /// The job does not end by itself: it becomes ready, copies what is written from then on, and waits for
    /// [`complete`](MirrorControl::complete) or [`keep_copy`](MirrorControl::keep_copy). Should the target
    /// fail, the guest's writes go on at the source.
    ///
    /// # Errors
    /// As [`start`](Self::start), and: another job runs on the tap, or the bitmap is unknown.
    pub fn attach(
        tap: &Arc<Tap>,
        target: Arc<dyn BlockDevice>,
        options: MirrorOptions,
    ) -> Result<Self, Error> {
        Self::prepare(tap, target, options)?.run()
    }

    /// The first half of [`attach`](Self::attach): whatever can be refused is. For several jobs that start
    /// all or not at all.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn prepare(
        tap: &Arc<Tap>,
        target: Arc<dyn BlockDevice>,
        options: MirrorOptions,
    ) -> Result<PreparedJob, Error> {
        PreparedJob::new(tap, &target, &options, None)
    }

    fn run(
        engine: Arc<Engine>,
        granularity: GranularityChoice,
        options: &MirrorOptions,
    ) -> Result<Self, Error> {
        let started = error_span!("mirror").in_scope(|| {
            engine.log_begin(granularity.bytes, options);
            engine.start_workers(thread_count(options))
        });
        if let Err(error) = started {
            engine.abandon();
            return Err(Error::Thread(error));
        }
        Ok(Self { control: MirrorControl { engine }, granularity })
    }

    /// The granularity in use, and why.
    pub fn granularity(&self) -> GranularityChoice {
        self.granularity
    }

    /// A handle to steer and watch with.
    pub fn control(&self) -> &MirrorControl {
        &self.control
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why the job failed, or [`Error::Cancelled`].
    pub fn wait(self) -> Result<Outcome, Error> {
        self.control.engine.wait(None);
        for thread in self.control.engine.take_workers() {
            if thread.join().is_err() {
                return Err(Error::Panicked);
            }
        }
        self.control.engine.with_core(Wake::None, |core, now| {
            core.take_result().unwrap_or(Err(Error::Panicked))?;
            let progress = core.progress(now);
            Ok(Outcome {
                granularity: self.granularity,
                copied: progress.copied,
                zeroed: progress.zeroed,
                skipped: progress.skipped,
                ending: core.how_it_ended(),
                shared: progress.shared,
                clone_calls: progress.clone_calls,
                given_up: core.given_up(),
                unmapped: core.unmapped(),
                elapsed: progress.elapsed,
            })
        })
    }
}

impl Drop for MirrorJob {
    fn drop(&mut self) {
        if !self.control.engine.has_workers() {
            return;
        }
        self.control.cancel();
        self.control.engine.wait(None);
        for thread in self.control.engine.take_workers() {
            // A panic was the thread's own; there is no caller left to report it to.
            let _ = thread.join();
        }
    }
}

/// A job that is attached to its tap, observes what is written, and copies nothing yet. It is either
/// [run](Self::run) or [abandoned](Self::abandon).
#[derive(Debug)]
#[must_use = "the tap stays occupied"]
pub struct PreparedJob {
    engine: Arc<Engine>,
    granularity: GranularityChoice,
    options: MirrorOptions,
}

impl PreparedJob {
    /// Checks everything that can be checked, and attaches to the tap. With a `notify` it is a member of
    /// a group.
    pub(crate) fn new(
        tap: &Arc<Tap>,
        target: &Arc<dyn BlockDevice>,
        options: &MirrorOptions,
        notify: Option<&Arc<Notify>>,
    ) -> Result<Self, Error> {
        check_distinct(&(Arc::clone(tap) as Arc<dyn BlockDevice>), target)?;
        if options.only.is_some() && (options.bitmap.is_some() || options.live_log.is_some()) {
            return Err(Error::SyncBitmap {
                why: "a job that copies only a part takes no other bitmap or log",
            });
        }
        if options.only.is_some() && !matches!(options.sync, SyncMode::Full | SyncMode::Top) {
            return Err(Error::SyncBitmap { why: "this sync mode copies no part of the disk" });
        }
        let granularity = check(&*tap.device(), &**target, options)?;
        let bitmap = options.sync_bitmap()?;
        let name = bitmap.map(|(name, _)| name.as_str());
        if notify.is_some() && (options.live_log.is_some() || tap.log_name().is_some()) {
            return Err(Error::LogInGroup { disk: tap.title() });
        }
        if tap.is_mirrored() {
            return Err(Error::Busy { disk: tap.title() });
        }
        let log = options.live_log.as_ref().map(|live| tap.attach_log(live)).transpose()?;
        let has_log = log.is_some();
        let prepared = Self::attach(tap, target, options, (notify, name), granularity, log);
        match prepared {
            // The next write would not be in it.
            Err(error) if has_log => Err(tap.close_log().map_or_else(Error::Log, |()| error)),
            prepared => prepared,
        }
    }

    /// Attaches to the tap, which has got the `log`.
    fn attach(
        tap: &Arc<Tap>,
        target: &Arc<dyn BlockDevice>,
        options: &MirrorOptions,
        (notify, bitmap): (Option<&Arc<Notify>>, Option<&str>),
        granularity: GranularityChoice,
        log: Option<(Arc<WriteLog>, bool)>,
    ) -> Result<Self, Error> {
        let renews_bitmap = options.sync_bitmap()?.is_some_and(|(_, mode)| *mode != BitmapMode::Never);
        // What was promised of the target was so before an earlier job wrote to it.
        let resumed = log.as_ref().is_some_and(|(_, resumed)| *resumed);
        let options = &match resumed {
            true => options.clone().target_is_zero(false),
            false => options.clone(),
        };
        let through = JobDisks::new(tap.device(), Arc::clone(target), options, granularity.bytes).through();
        let clones = Clones::checked(options, true, &*tap.device(), &*through)?;
        let engine = tap.attach(bitmap, |AttachContext { session, source, bitmap, wakers }| {
            // The first look may have met a disk that is not there any more.
            check_distinct(&source, target)?;
            check_lengths(&*source, &**target, false)?;
            let len = source.len();
            let ends = JobDisks::new(source, Arc::clone(target), options, granularity.bytes);
            let geometry = ends.target_geometry();
            let mut config = Config::new(options, granularity.bytes, len, geometry);
            config.live = true;
            let log = log.map(|(log, _)| log);
            if let Some((log, live)) = log.as_ref().zip(options.live_log.as_ref()) {
                config = config.with_log(&log.begin_job(), live.interval)?;
            }
            let mut core = Core::new(config)?;
            if let Some(bitmap) = bitmap {
                core.seed(bitmap);
            }
            if notify.is_some() {
                core.join_group();
            }
            let (tap, notify) = (Arc::downgrade(tap), notify.cloned());
            let log = log.as_ref().map_or_else(Weak::new, Arc::downgrade);
            let attachment = TapAttachment { tap, session, renews_bitmap, notify, log, wakers };
            let policy = CopyPolicy::new(options, geometry, ends.content(options));
            Ok(Arc::new(Engine::new(ends, policy, core, Some(attachment), None, clones)))
        })?;
        Ok(Self { engine, granularity, options: options.clone() })
    }

    /// Gives it threads.
    ///
    /// # Errors
    /// [`Error::Thread`] if the system gives not a single one; it has left the tap then.
    pub fn run(self) -> Result<MirrorJob, Error> {
        MirrorJob::run(self.engine, self.granularity, &self.options)
    }

    /// Detaches it from the tap, without a trace.
    pub fn abandon(self) {
        self.engine.abandon();
    }
}

fn check(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    options: &MirrorOptions,
) -> Result<GranularityChoice, Error> {
    options.check()?;
    check_lengths(source, target, options.longer_target)?;
    check_tail(source, target, options)?;
    let geometry = target.geometry();
    if !geometry.writable {
        return Err(Error::TargetReadOnly { name: target.name().to_owned() });
    }
    options.choose_granularity(geometry.cluster_size)
}

/// How many threads the job may have.
fn thread_count(options: &MirrorOptions) -> usize {
    let by_default = most_by_default();
    // In auto mode the guest is made to wait until scattered dirt is copied, in pieces so small that only
    // latency counts.
    let by_default = if options.copy_mode == CopyMode::Auto { options.max_in_flight } else { by_default };
    options.threads.map_or(by_default, NonZeroUsize::get).min(options.max_in_flight)
}
