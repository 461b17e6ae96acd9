//! The job as its user sees it: start, watch, steer, wait.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockmirror_block::{BlockDevice, ByteRange};

use crate::core::Core;
use crate::core::config::Config;
use crate::engine::{Engine, Wake};
use crate::error::Error;
use crate::granularity::GranularityChoice;
use crate::mover::Manner;
use crate::options::MirrorOptions;
use crate::plan::check_lengths;
use crate::progress::{Event, Outcome, Progress};

/// Steers and watches a job from any thread. Cheap to clone; harmless once the job is over.
#[derive(Clone, Debug)]
pub struct MirrorControl {
    engine: Arc<Engine>,
}

impl MirrorControl {
    /// The figures at this moment.
    pub fn progress(&self) -> Progress {
        self.engine.with_core(Wake::None, |core, now| core.progress(now))
    }

    /// Takes the events since the last call, oldest first. Of events nobody takes only the latest are kept.
    pub fn events(&self) -> Vec<Event> {
        self.engine.with_core(Wake::None, |core, _| core.take_events())
    }

    /// Gives the job up: [`MirrorJob::wait`] returns [`Error::Cancelled`] as soon as nothing is in flight. The target
    /// is incomplete then.
    pub fn cancel(&self) {
        self.engine.cancel();
    }

    /// Starts nothing new until [`resume`](Self::resume). What is in flight is finished.
    pub fn pause(&self) {
        self.engine.with_core(Wake::All, |core, _| core.pause());
    }

    /// Goes on after [`pause`](Self::pause), and after an error policy stopped the job.
    pub fn resume(&self) {
        self.engine.with_core(Wake::All, |core, _| core.resume());
    }

    /// Changes the speed in bytes per second; 0 is as fast as it goes.
    pub fn set_speed(&self, bytes_per_second: u64) {
        self.engine.with_core(Wake::All, |core, now| core.set_speed(now, bytes_per_second));
    }

    /// Says that the source has changed in `range`, so that it is copied again. To be called *after* the write has
    /// finished, whether or not it succeeded; a call before it may be too early. Once the job is over it does nothing.
    pub fn mark_dirty(&self, range: ByteRange) {
        self.engine.with_core(Wake::One, |core, _| core.mark_dirty(range));
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
    threads: Vec<JoinHandle<()>>,
}

impl MirrorJob {
    /// Checks everything that can be checked, then starts to copy `source` to `target`.
    ///
    /// The job ends by itself when the target equals the source and a flush of the target has succeeded. Who
    /// writes to the source meanwhile has to say so with [`mark_dirty`](MirrorControl::mark_dirty).
    ///
    /// # Errors
    /// Invalid options, different lengths, a read-only target: nothing was touched then. [`Error::Thread`] if the
    /// system gives not a single thread.
    pub fn start(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: MirrorOptions,
    ) -> Result<Self, Error> {
        options.check()?;
        check_lengths(&*source, &*target)?;
        let geometry = target.geometry();
        if !geometry.writable {
            return Err(Error::TargetReadOnly { name: target.name().to_owned() });
        }
        let granularity = GranularityChoice::new(options.granularity, geometry.cluster_size)?;
        let core = Core::new(Config::new(&options, granularity.bytes, source.len(), geometry))?;
        let engine = Arc::new(Engine::new(source, target, Manner::new(&options, geometry), core));
        let mut job =
            Self { control: MirrorControl { engine: Arc::clone(&engine) }, granularity, threads: Vec::new() };
        for _ in 0..thread_count(&options) {
            let engine = Arc::clone(&engine);
            match thread::Builder::new().name("mirror".into()).spawn(move || engine.run()) {
                Ok(thread) => job.threads.push(thread),
                // Fewer threads than wished for do the same work.
                Err(_) if !job.threads.is_empty() => break,
                Err(error) => return Err(Error::Thread(error)),
            }
        }
        Ok(job)
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
    pub fn wait(mut self) -> Result<Outcome, Error> {
        self.control.engine.wait(None);
        for thread in self.threads.drain(..) {
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
                given_up: core.given_up(),
                elapsed: progress.elapsed,
            })
        })
    }
}

impl Drop for MirrorJob {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        self.control.cancel();
        self.control.engine.wait(None);
        for thread in self.threads.drain(..) {
            // A panic was the thread's own; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

/// A thread that copies inside the page cache keeps a processor busy and more of them only share it; one that
/// waits for a disk or a network does not. Eight keep a fast disk busy, twice the processors a fast host.
fn thread_count(options: &MirrorOptions) -> usize {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let by_default = processors.saturating_mul(2).max(8);
    options.threads.map_or(by_default, NonZeroUsize::get).min(options.max_in_flight)
}
