//! The fifth thread: steers one job from its start to its end, at random.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockmirror_block::ErrorKind;
use blockmirror_block::testing::{Done, Fault, Faults, OpKind, Rng};
use blockmirror_mirror::{CopyMode, Event, IoStatus, JobState, MirrorControl, Progress};

use super::cut::Window;
use super::images::Disk;
use super::plan::{Aim, MODES, Plan, SPEEDS, Trouble};
use super::world::World;
use blockmirror_testing::Outcome;

/// After so long a guest that the job cannot follow is made to rest.
const PATIENCE: Duration = Duration::from_millis(1500);
/// After so long with the guest at rest a job that has not moved on is stuck.
const STUCK: Duration = Duration::from_secs(30);
/// So many stops by errors are resumed.
const MOST_STOPS: u32 = 12;

/// How a job was ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    /// The only end that was asked for, if it was one.
    pub(super) asked: Option<Aim>,
    pub(super) window: Window,
    pub(super) was_ready: bool,
    /// The guest was made to rest.
    pub(super) rested: bool,
}

/// A job under way.
pub(super) struct Control<'a> {
    pub(super) world: &'a World,
    pub(super) job: MirrorControl,
    pub(super) plan: &'a Plan,
    pub(super) source: &'a Disk,
    pub(super) target: &'a Disk,
    pub(super) rng: Rng,
    pub(super) seen: Seen,
}

/// What was seen of a job.
#[derive(Debug, Default)]
pub(super) struct Seen {
    state: Option<JobState>,
    ready: bool,
    pending: bool,
    ended: bool,
    offset: u64,
    stops: u32,
}

impl Seen {
    /// Takes an event in; the error says what it must not follow.
    fn event(&mut self, event: &Event) -> Outcome {
        if self.state == Some(JobState::Null) {
            return Err(format!("{event:?} after the end").into());
        }
        match event {
            Event::Status(state) => self.state = Some(*state),
            Event::Ready if self.ready || self.state != Some(JobState::Ready) => {
                return Err(format!("ready in state {:?}, ready before: {}", self.state, self.ready).into());
            }
            Event::Ready => self.ready = true,
            Event::Pending => self.pending = true,
            Event::Completed { .. } | Event::Cancelled if self.ended => {
                return Err(format!("{event:?}, but it had ended").into());
            }
            Event::Completed { .. } | Event::Cancelled => self.ended = true,
            _ => {}
        }
        Ok(())
    }

    fn progress(&mut self, progress: &Progress) -> Outcome {
        if progress.offset < self.offset || progress.len < progress.offset {
            return Err(format!("offset was {} and is: {progress:?}", self.offset).into());
        }
        self.offset = progress.offset;
        Ok(())
    }

    fn is_over(&self) -> bool {
        matches!(self.state, Some(JobState::Concluded | JobState::Null))
    }
}

impl Control<'_> {
    /// Steers the job until it is over.
    pub(super) fn run(mut self) -> Outcome<Ended> {
        let start = Instant::now();
        let abort_at = match self.plan.aim {
            Aim::Abort => Some(start + Duration::from_millis(self.rng.below(600))),
            _ => None,
        };
        let mut ended =
            Ended { asked: None, window: Window { asked: 0, over: 0 }, was_ready: false, rested: false };
        let mut resume_at: Option<Instant> = None;
        let mut ask_at: Option<Instant> = None;
        let mut look = self.plan.trouble == Trouble::None && self.rng.chance(30);
        let mut asked_at: Option<Instant> = None;
        let mut finalize_at: Option<Instant> = None;
        let mut rest_from: Option<Instant> = None;
        while !self.seen.is_over() {
            let nap = Duration::from_micros(self.rng.below(8000));
            if let Some(event) = self.job.next_event(Some(nap)) {
                self.seen.event(&event)?;
            }
            self.world.check_writers()?;
            let progress = self.job.progress();
            self.seen.progress(&progress)?;
            let now = Instant::now();

            if progress.io_status != IoStatus::Ok && self.plan.trouble != Trouble::None {
                self.seen.stops += 1;
                if self.seen.stops > MOST_STOPS {
                    let _ = self.job.force_cancel();
                } else {
                    if self.rng.chance(50) {
                        self.heal();
                    }
                    // In `pending` only this goes on.
                    let _ = self.job.resume().or_else(|_| self.job.finalize());
                }
            }
            self.trouble(asked_at.is_some());
            if resume_at.is_some_and(|at| now >= at) {
                let _ = self.job.resume();
                resume_at = None;
            }
            if resume_at.is_none() && self.rng.chance(6) {
                resume_at = self.verb();
            }
            if self.seen.ready && ask_at.is_none() {
                self.world.recording.store(true, Ordering::SeqCst);
                ended.was_ready = true;
                ask_at = Some(Instant::now() + Duration::from_millis(self.rng.below(250)));
            }
            if look && asked_at.is_none() && ask_at.is_some_and(|at| now >= at) {
                look = false;
                let _ = self.job.resume();
                resume_at = None;
                self.look_while_ready()?;
            }
            if abort_at.is_some_and(|at| now >= at) {
                // Both are the same before READY.
                let done = if self.seen.ready || self.rng.chance(50) {
                    self.job.force_cancel()
                } else {
                    self.job.keep_copy()
                };
                if done.is_ok() && !self.seen.ready {
                    ended.asked = None;
                }
            }
            if asked_at.is_none() && self.plan.aim != Aim::Abort && ask_at.is_some_and(|at| now >= at) {
                self.heal();
                ended.window.asked = self.world.tick();
                let done = match self.plan.aim {
                    Aim::Pivot => self.job.complete(),
                    _ => self.job.keep_copy(),
                };
                if done.is_ok() {
                    asked_at = Some(now);
                    ended.asked = Some(self.plan.aim);
                } else {
                    // Paused: only a resumed job can be asked for a copy.
                    let _ = self.job.resume();
                    resume_at = None;
                }
            }
            if self.seen.pending && finalize_at.is_none() {
                finalize_at = Some(now + Duration::from_millis(self.rng.below(120)));
                if self.rng.chance(25) && self.job.keep_copy().is_ok() {
                    ended.asked = None;
                }
            }
            if finalize_at.is_some_and(|at| now >= at) {
                ended.window.asked = self.world.tick();
                let _ = self.job.finalize();
                finalize_at = Some(now + STUCK);
            }

            let since = asked_at.unwrap_or(start);
            if rest_from.is_none() && now > since + PATIENCE && (asked_at.is_some() || !self.seen.ready) {
                if asked_at.is_none() && self.rng.chance(50) {
                    // Rather follow the guest at once than make it rest; both if that does not help.
                    let _ = self.job.change(CopyMode::WriteBlocking);
                }
                let _ = self.job.set_speed(0);
                let _ = self.job.resume();
                self.heal();
                self.world.quiesce()?;
                (rest_from, ended.rested) = (Some(now), true);
            }
            if let Some(rest) = rest_from {
                if self.seen.ready && asked_at.is_none() {
                    self.world.gate.open();
                    rest_from = None;
                } else if now > rest + STUCK {
                    return Err(format!("stuck: {:?} {progress:?}", self.seen).into());
                } else if now > rest + STUCK / 10 && self.plan.trouble != Trouble::None {
                    // A target that has lost a write or a flush does not come back.
                    let _ = self.job.force_cancel();
                }
            }
        }
        ended.window.over = self.world.tick();
        if !self.plan.auto_dismiss {
            // Refused if one of the verbs at random was the same, a moment ago; the events tell.
            let _ = self.job.dismiss();
        }
        while let Some(event) = self.job.next_event(None) {
            self.seen.event(&event)?;
        }
        if self.seen.state != Some(JobState::Null) || !self.seen.ended {
            return Err(format!("no more events, but: {:?}", self.seen).into());
        }
        self.heal();
        Ok(ended)
    }

    /// Ready, and no guest writes: then the target is equal as soon as nothing is left.
    fn look_while_ready(&mut self) -> Outcome {
        self.world.quiesce()?;
        let _ = self.job.set_speed(0);
        let until = Instant::now() + STUCK;
        loop {
            let progress = self.job.progress();
            if progress.state != JobState::Ready {
                break;
            }
            if progress.offset == progress.len {
                let (source, target) = (self.source.image(), self.target.image());
                self.world.verify("the target of a job that is ready while no guest writes", target)?;
                self.world.verify_same("source and target while no guest writes", source, target)?;
                break;
            }
            if Instant::now() > until {
                return Err(format!("ready, no guest writes, and something is left: {progress:?}").into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.world.gate.open();
        Ok(())
    }

    /// Any verb that does not end the job; when to resume it if it was paused.
    fn verb(&mut self) -> Option<Instant> {
        match self.rng.below(6) {
            5 => {
                // As for a snapshot. A job that quiesces the guest itself may delay it.
                let drained = self.world.tap.drain_for(Duration::from_millis(self.rng.below(100)));
                if drained.is_some() {
                    std::thread::sleep(Duration::from_millis(self.rng.below(3)));
                }
            }
            0 | 1 => {
                let wait = Duration::from_millis(self.rng.below(60));
                return self.job.pause().is_ok().then(|| Instant::now() + wait);
            }
            2 => drop(self.job.set_speed(self.rng.pick(&SPEEDS))),
            3 => drop(self.job.change(self.rng.pick(&MODES))),
            _ => {
                // They are not listened for.
                let _ = self.job.dismiss();
                let _ = self.job.resume();
            }
        }
        None
    }

    fn heal(&self) {
        self.target.heal();
        self.source.heal();
    }

    /// Plans a fault now and then.
    fn trouble(&mut self, ending: bool) {
        let (faults, kinds): (&Faults, &[OpKind]) = match self.plan.trouble {
            // A format that has lost a write of its own is of no use to the guest after a pivot.
            Trouble::Storage if ending => return,
            Trouble::None => return,
            Trouble::Source => (&self.source.faults, &[OpKind::Read, OpKind::Extents]),
            Trouble::Disk => (
                &self.target.faults,
                &[OpKind::Write, OpKind::Write, OpKind::WriteZeroes, OpKind::Flush, OpKind::Extents],
            ),
            Trouble::Storage => (
                &self.target.storage_faults,
                &[
                    OpKind::Write,
                    OpKind::Write,
                    OpKind::WriteZeroes,
                    OpKind::Read,
                    OpKind::Allocate,
                    OpKind::Flush,
                ],
            ),
        };
        if !self.rng.chance(8) || self.world.gate.is_closed() {
            return;
        }
        let fault = Fault::on(self.rng.pick(kinds))
            .after(self.rng.below(60))
            .with(self.rng.pick(&[ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::NoSpace]))
            .having_done(self.rng.pick(&[Done::Nothing, Done::Half, Done::Everything]));
        faults.inject(fault);
    }
}
