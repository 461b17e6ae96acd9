//! Jobs on several disks that end at one instant: all of them or none.
//!
//! A machine with its data on one disk and its log on another needs copies of both of the same instant, or a
//! pivot of both between two of its writes. Each member is a [`MirrorJob`] of its own; a thread of the group
//! runs the coordinator.
//!
//! Must hold: no lock is held over two members; whatever happens to one before all are
//! [prepared](crate::machine::MemberStage::Prepared), none has ended.

mod coordinator;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::BlockDevice;
use blockmirror_block::sync::{Condvar, Instant, Mutex, thread};
use tracing::Span;

use crate::distinct::check_distinct;
use crate::engine::{CANCEL_AGAIN, Engine, Wake};
use crate::error::Error;
use crate::job::{MirrorControl, MirrorJob, PreparedJob};
use crate::machine::Core;
use crate::notify::Notify;
use crate::options::MirrorOptions;
use crate::progress::Outcome;
use crate::state::{JobState, Refused, Verb};
use crate::tap::Tap;
pub(crate) use coordinator::{Coordinator, Members};

/// What a member of a group is to copy where.
#[derive(Clone, Debug)]
pub struct GroupMember {
    tap: Arc<Tap>,
    target: Arc<dyn BlockDevice>,
    options: MirrorOptions,
    /// The caller's span: what the threads of the job log belongs to it.
    span: Span,
}

impl GroupMember {
    /// The disk behind `tap` to `target`, as [`MirrorJob::attach`] does it with these `options`.
    pub fn new(tap: &Arc<Tap>, target: Arc<dyn BlockDevice>, options: MirrorOptions) -> Self {
        Self { tap: Arc::clone(tap), target, options, span: Span::current() }
    }
}

/// Something that happened to a group as a whole. What happens to a member is in the member's own events.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupEvent {
    /// Every member has been ready.
    Ready,
    /// Every member waits for [`GroupControl::finalize`].
    Pending,
    /// Every member has ended as it was asked to, all at one instant.
    Completed,
    /// A member has failed, so none has ended as it was asked to.
    Failed {
        /// Which, counted from 0 in the order they were given.
        member: usize,
        /// Why, in one line.
        error: String,
    },
    /// A member was cancelled, and all others with it.
    Cancelled,
}

/// Jobs on several disks that end at one instant, or not at all.
///
/// Each member runs by itself until its end was asked for: by the verbs of the [`GroupControl`], or one by
/// one by those of their own [`MirrorControl`]s. When the end of every member was asked for and little is
/// left anywhere, all guests are quiesced; what is left is copied and flushed; and when every member is clean
/// and flushed while all guests are quiesced, all pivot, or keep their copies, and the guests go on. If a
/// member turns out to be dirty, its flush fails, or writers have waited too long (a second at first; twice
/// as long each next time), all guests go on and it is tried again.
///
/// A member that fails, or is cancelled by force, before that instant ends the whole group: no member pivots,
/// the other members end with [`Error::Group`] and the event [`Cancelled`](crate::Event::Cancelled).
///
/// What the verbs of a member's own control do in a group:
///
/// | verb | |
/// |---|---|
/// | `complete`, `keep_copy` | say how *this* member is to end; the group ends when every member's end was asked for. `keep_copy` of a member that was not ready aborts the group |
/// | `force_cancel`, `cancel`, dropping the job | abort the group; too late once every member is prepared |
/// | `pause`, `resume` | of this member; while one is paused, by its user or by an error, the group does not end |
/// | `set_speed`, `change` | of this member |
/// | `finalize` | of the whole group. If one member has `auto_finalize` off, all wait as soon as they could end, and emit [`Pending`](crate::Event::Pending) if it is off for them |
/// | `dismiss` | of this member |
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, WriteFlags, testing::MemoryDisk};
/// use blockmirror_mirror::{GroupEvent, GroupMember, MirrorGroup, MirrorOptions, Tap};
///
/// let disk = || Arc::new(MemoryDisk::new(1 << 20));
/// let (data, log) = (Tap::new(disk()), Tap::new(disk()));
/// let (data_copy, log_copy) = (disk(), disk());
/// let group = MirrorGroup::attach(vec![
///     GroupMember::new(&data, Arc::clone(&data_copy) as _, MirrorOptions::new()),
///     GroupMember::new(&log, Arc::clone(&log_copy) as _, MirrorOptions::new()),
/// ])?;
/// log.write_at(b"about to write 1", 0, WriteFlags::NONE)?;
/// data.write_at(b"1", 0, WriteFlags::NONE)?;
/// while group.control().next_event(None) != Some(GroupEvent::Ready) {}
/// group.control().keep_copy()?;
/// group.wait()?;
/// // The two copies are of one instant.
/// assert_eq!(data_copy.contents()?[0], b'1');
/// assert_eq!(&log_copy.contents()?[..5], b"about");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MirrorGroup {
    control: GroupControl,
    jobs: Vec<MirrorJob>,
}

impl MirrorGroup {
    /// Checks everything that can be checked, then starts a job for each member.
    ///
    /// # Errors
    /// As [`MirrorJob::attach`] for each member, and: no member at all, a target that two share. No job was
    /// started then, or those that were have been aborted.
    pub fn attach(members: Vec<GroupMember>) -> Result<Self, Error> {
        if members.is_empty() {
            return Err(Error::InvalidOption { option: "members", value: 0, expected: "at least one" });
        }
        for (index, member) in members.iter().enumerate() {
            if members[..index].iter().any(|other| check_distinct(&other.target, &member.target).is_err()) {
                return Err(Error::SharedTarget { name: member.target.name().to_owned() });
            }
        }
        let notify = Arc::new(Notify::default());
        let mut prepared: Vec<PreparedJob> = Vec::new();
        for GroupMember { tap, target, options, .. } in &members {
            match PreparedJob::new(tap, target, options, Some(&notify)) {
                Ok(member) => prepared.push(member),
                Err(error) => {
                    prepared.into_iter().for_each(PreparedJob::abandon);
                    return Err(error);
                }
            }
        }
        let name = |member: &GroupMember| member.tap.title();
        let names: Vec<String> = members.iter().map(name).collect();
        let spans = members.into_iter().map(|member| member.span);
        let mut jobs = Vec::new();
        let mut rest = prepared.into_iter().zip(spans);
        while let Some((member, span)) = rest.next() {
            match span.in_scope(|| member.run()) {
                Ok(job) => jobs.push(job),
                Err(error) => {
                    rest.for_each(|(member, _)| member.abandon());
                    return Err(error);
                }
            }
        }
        let controls: Vec<MirrorControl> = jobs.iter().map(|job| job.control().clone()).collect();
        let shared =
            Arc::new(Shared { names, controls, notify, state: Mutex::default(), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        // It ends by itself when the last member has.
        thread::Builder::new().name("mirror-group".into()).spawn(move || own.run()).map_err(Error::Thread)?;
        Ok(Self { control: GroupControl { shared }, jobs })
    }

    /// A handle to steer and watch the whole with.
    pub fn control(&self) -> &GroupControl {
        &self.control
    }

    /// The members, in the order they were given.
    pub fn jobs(&self) -> &[MirrorJob] {
        &self.jobs
    }

    /// Takes the group apart: the members stay tied to each other, but each can be waited for, or dropped, by
    /// itself.
    pub fn into_jobs(self) -> (GroupControl, Vec<MirrorJob>) {
        (self.control, self.jobs)
    }

    /// Waits for the end of all; the outcomes are in the order of the members.
    ///
    /// # Errors
    /// Why a member failed or was cancelled; then none has ended as it was asked to.
    pub fn wait(self) -> Result<Vec<Outcome>, Error> {
        let results: Vec<_> = self.jobs.into_iter().map(MirrorJob::wait).collect();
        self.control.wait(None);
        let mut outcomes = Vec::new();
        let mut followed = None;
        for result in results {
            match result {
                Ok(outcome) => outcomes.push(outcome),
                Err(error @ Error::Group { .. }) => followed = Some(error),
                Err(error) => return Err(error),
            }
        }
        followed.map_or(Ok(outcomes), Err)
    }
}

/// Controls and observes a group from any thread. Cheap to clone; harmless once the group is over.
#[derive(Clone)]
pub struct GroupControl {
    shared: Arc<Shared>,
}

struct Shared {
    names: Vec<String>,
    controls: Vec<MirrorControl>,
    notify: Arc<Notify>,
    /// *Guards* the coordinator. *Order*: before a member's core, one member at a time. *Not under it*: any
    /// device I/O, waiting for a job.
    state: Mutex<Coordinator>,
    /// There is an event, or the group is over.
    changed: Condvar,
}

impl Members for Shared {
    fn count(&self) -> usize {
        self.controls.len()
    }

    fn name(&self, index: usize) -> String {
        self.names[index].clone()
    }

    fn with<R>(&self, index: usize, f: impl FnOnce(&mut Core, Duration) -> R) -> R {
        self.controls[index].engine().with_core_locked(Wake::All, f)
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let (failing, is_over) = {
                let mut state = self.state.lock();
                state.poll(self);
                if state.has_events() || state.is_over() {
                    self.changed.notify_all();
                }
                (state.is_failing(), state.is_over())
            };
            // The members were changed under the lock of the group.
            self.engines().for_each(Engine::deliver);
            if is_over {
                return;
            }
            if failing {
                // Calls that are blocked on a dead peer must come back, and more may be on their way to it.
                self.engines().for_each(Engine::cancel_calls_if_aborting);
            }
            self.notify.wait(failing.then_some(CANCEL_AGAIN));
        }
    }

    fn engines(&self) -> impl Iterator<Item = &Engine> {
        self.controls.iter().map(|control| &**control.engine())
    }
}

impl GroupControl {
    /// The members' own handles, in the order they were given. Progress and events of each are there.
    pub fn members(&self) -> &[MirrorControl] {
        &self.shared.controls
    }

    /// Ends every member with the pivot, all at one instant.
    ///
    /// # Errors
    /// [`Refused`], as all verbs of a group, if a member does not allow it: nothing was asked of any then.
    /// This one before every member is ready.
    pub fn complete(&self) -> Result<(), Refused> {
        self.all(Verb::Complete, Core::complete)
    }

    /// Ends every member and keeps the targets as copies of one instant. If a member has not been ready yet
    /// the group is aborted.
    ///
    /// # Errors
    /// A member is paused, or over.
    pub fn keep_copy(&self) -> Result<(), Refused> {
        let every = |is: fn(&Core) -> bool| {
            self.engines().all(|engine| engine.with_core(Wake::None, |core, _| is(core)))
        };
        if every(|core| core.view().has_been_ready) {
            return self.all(Verb::Cancel, Core::cancel);
        }
        self.force_cancel()
    }

    /// Aborts the group, if it is not over.
    ///
    /// # Errors
    /// Every member has ended already.
    pub fn force_cancel(&self) -> Result<(), Refused> {
        let mut answer = Err(Refused::State { verb: Verb::ForceCancel, state: JobState::Null });
        for control in self.members() {
            answer = answer.or(control.force_cancel());
        }
        answer
    }

    /// Lets a group end that waits for it.
    ///
    /// # Errors
    /// Unless every member waits for it, and none was stopped by an error.
    pub fn finalize(&self) -> Result<(), Refused> {
        self.all(Verb::Finalize, Core::finalize)
    }

    /// Pauses the members that are not paused.
    ///
    /// # Errors
    /// All are paused, or one is about to end.
    pub fn pause(&self) -> Result<(), Refused> {
        self.some(Verb::Pause, Refused::Paused { verb: Verb::Pause }, |core| {
            if core.view().is_paused { None } else { Some(core.pause()) }
        })
    }

    /// Lets the members go on that are paused.
    ///
    /// # Errors
    /// None is paused.
    pub fn resume(&self) -> Result<(), Refused> {
        self.some(Verb::Resume, Refused::NotPaused, |core| {
            if core.view().is_paused { Some(core.resume()) } else { None }
        })
    }

    /// The next event of the group; waits for one for at most `timeout`, or for ever if that is `None`.
    /// `None` if there was none, or the group is over so that there will be none.
    pub fn next_event(&self, timeout: Option<Duration>) -> Option<GroupEvent> {
        self.wait_for(timeout, |state| match state.take_event() {
            Some(event) => Some(Some(event)),
            None => state.is_over().then_some(None),
        })
        .flatten()
    }

    /// Waits until every member has ended, for at most `timeout`; true if they have.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.wait(Some(timeout))
    }

    /// How often the guests were quiesced for a commit: 1 after an end without trouble.
    pub fn attempts(&self) -> u64 {
        self.shared.state.lock().attempts()
    }

    fn wait(&self, timeout: Option<Duration>) -> bool {
        self.wait_for(timeout, |state| state.is_over().then_some(())).is_some()
    }

    fn wait_for<R>(
        &self,
        timeout: Option<Duration>,
        mut poll: impl FnMut(&mut Coordinator) -> Option<R>,
    ) -> Option<R> {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.shared.state.lock();
        loop {
            if let Some(found) = poll(&mut state) {
                return Some(found);
            }
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.shared.changed.wait(state),
                Some(left) if left.is_zero() => return None,
                Some(left) => self.shared.changed.wait_timeout(state, left).0,
            };
        }
    }

    fn engines(&self) -> impl Iterator<Item = &Engine> {
        self.shared.engines()
    }

    /// Asks `verb` of every member, if none would refuse it.
    fn all(&self, verb: Verb, ask: fn(&mut Core) -> Result<(), Refused>) -> Result<(), Refused> {
        for engine in self.engines() {
            engine.with_core(Wake::None, |core, _| core.would_refuse(verb))?;
        }
        for engine in self.engines() {
            // One that has come to refuse it in between is aborting, and all with it.
            engine.with_core(Wake::All, |core, _| ask(core))?;
        }
        Ok(())
    }

    /// Asks those of the members for which `ask` gives an answer; `none` if there is none.
    fn some(
        &self,
        verb: Verb,
        none: Refused,
        ask: impl Fn(&mut Core) -> Option<Result<(), Refused>>,
    ) -> Result<(), Refused> {
        if verb == Verb::Pause {
            for engine in self.engines() {
                engine.with_core(Wake::None, |core, _| core.would_refuse(verb))?;
            }
        }
        let mut answer = Err(none);
        for engine in self.engines() {
            if let Some(own) = engine.with_core(Wake::All, |core, _| ask(core)) {
                own?;
                answer = Ok(());
            }
        }
        answer
    }
}

impl fmt::Debug for GroupControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupControl").field("members", &self.shared.names).finish_non_exhaustive()
    }
}
