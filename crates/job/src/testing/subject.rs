//! What a kind of job gives to the suite, and the parts that several kinds share.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::{Fault, FaultDisk, Faults, Gate, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ErrorKind};

use crate::{Event, JobControl, JobError, JobOptions, JobState, OnError, Refused, Verb};

/// Length of [`TestDisk`].
const LEN: usize = 256 << 10;

/// What the disk that a job reads does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Each read succeeds.
    Sound,
    /// Reads are held until the job is unblocked.
    Blocks,
    /// Reads fail until the job is unblocked.
    Fails,
}

/// How a job is started.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// See [`JobOptions`](crate::JobOptions).
    pub auto_finalize: bool,
    /// See [`JobOptions`](crate::JobOptions).
    pub auto_dismiss: bool,
    /// For errors of the disk.
    pub on_error: OnError,
    /// What the job reads.
    pub disk: Disk,
}

impl From<Setup> for JobOptions {
    fn from(setup: Setup) -> Self {
        Self::default()
            .on_error(setup.on_error)
            .auto_finalize(setup.auto_finalize)
            .auto_dismiss(setup.auto_dismiss)
    }
}

/// What a kind of job has of what the table offers.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// It becomes ready, and ends when it is asked to.
    pub ready: bool,
    /// It can be stopped between two pieces: a pause and a cancel show in its state at once. Without this
    /// they are noted, and the state changes when the work is done.
    pub interruptible: bool,
    /// `auto_finalize` off makes it wait.
    pub finalizes: bool,
    /// `auto_dismiss` makes it vanish by itself.
    pub dismisses_itself: bool,
    /// Errors of its disk are reported, and follow the policy.
    pub on_error: bool,
    /// Verbs for which its handle has no call.
    pub lacks: &'static [Verb],
}

impl Features {
    /// All of them.
    pub const ALL: Self = Self {
        ready: true,
        interruptible: true,
        finalizes: true,
        dismisses_itself: true,
        on_error: true,
        lacks: &[],
    };
}

/// A kind of job.
pub trait Kind {
    /// What it has.
    fn features(&self) -> Features;

    /// Starts a job. On a disk that blocks it has been seen to block when this returns.
    fn start(&self, setup: Setup) -> Box<dyn Subject>;
}

/// A job under test. Dropping it ends it.
pub trait Subject {
    /// Where it stands.
    fn state(&self) -> JobState;

    /// Asks `verb` of it; never one that the kind [lacks](Features::lacks).
    ///
    /// # Errors
    /// What the job says.
    fn request(&self, verb: Verb) -> Result<(), Refused>;

    /// Its next event; waits for one for at most `timeout`.
    fn next_event(&self, timeout: Duration) -> Option<Event>;

    /// Why it fails, from aborting on.
    fn failure(&self) -> Option<String>;

    /// Its disk works from now on, and what is held there goes on.
    fn unblock(&self);
}

/// A disk in memory for a job to read, as [`Setup`] asks for it.
pub struct TestDisk {
    faults: Faults,
    device: Arc<dyn BlockDevice>,
    gate: Option<Gate>,
}

impl fmt::Debug for TestDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestDisk").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl TestDisk {
    /// A disk full of data.
    pub fn new(disk: Disk) -> Self {
        let faults = Faults::new();
        let inner = Arc::new(MemoryDisk::with_contents(&vec![7; LEN]));
        let device = Arc::new(FaultDisk::new(inner, faults.clone()).ignoring_cancel());
        let gate = (disk == Disk::Blocks).then(|| faults.hold(OpKind::Read, None));
        if disk == Disk::Fails {
            faults.inject(Fault::on(OpKind::Read).forever().with(ErrorKind::Io));
        }
        Self { faults, device, gate }
    }

    /// What the job reads.
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    /// To be called when the job has been started: it is seen to block if the disk does.
    pub fn wait_until_blocked(&self) {
        if let Some(gate) = &self.gate {
            gate.wait_held(1);
        }
    }

    /// See [`Subject::unblock`].
    pub fn unblock(&self) {
        self.faults.heal();
        if let Some(gate) = &self.gate {
            gate.open();
        }
    }
}

/// A job of this crate's kind under test: on one thread, with a [`JobControl`].
pub struct OneThread<E, J> {
    control: JobControl<E>,
    disk: TestDisk,
    // Ends with this. After the disk, whose gate opens when it is dropped.
    _job: J,
}

impl<E, J> fmt::Debug for OneThread<E, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneThread").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl<E: JobError, J> OneThread<E, J> {
    /// What such jobs have.
    pub const FEATURES: Features =
        Features { ready: false, lacks: &[Verb::Change, Verb::Complete], ..Features::ALL };

    /// `job`, which reads `disk`; returns once it blocks, if the disk does.
    pub fn new(control: JobControl<E>, disk: TestDisk, job: J) -> Self {
        disk.wait_until_blocked();
        Self { control, disk, _job: job }
    }
}

impl<E: JobError, J> Subject for OneThread<E, J> {
    fn state(&self) -> JobState {
        self.control.progress().state
    }

    fn request(&self, verb: Verb) -> Result<(), Refused> {
        match verb {
            Verb::Cancel => self.control.cancel(),
            Verb::ForceCancel => self.control.force_cancel(),
            Verb::Pause => self.control.pause(),
            Verb::Resume => self.control.resume(),
            Verb::SetSpeed => self.control.set_speed(1 << 30),
            Verb::Finalize => self.control.finalize(),
            Verb::Dismiss => self.control.dismiss(),
            Verb::Change | Verb::Complete => panic!("no call for {verb}"),
        }
    }

    fn next_event(&self, timeout: Duration) -> Option<Event> {
        self.control.next_event(Some(timeout))
    }

    fn failure(&self) -> Option<String> {
        self.control.failure().map(|(_, message)| message)
    }

    fn unblock(&self) {
        self.disk.unblock();
    }
}
