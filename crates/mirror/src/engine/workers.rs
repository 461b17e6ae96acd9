//! The worker threads of a job: a job that is not attached to a tap begins with one, and a worker that is
//! given an action starts another while none waits and enough is left for it. So a small copy costs one
//! thread. What a guest's job has to do is not known when it begins: it has all of its threads at once.
//!
//! Must hold: a thread is started only by the job's owner, or by a worker that has an action in hand. The job
//! is not over before that is reported, so its end finds all threads that there will be.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::sync::thread::{self, JoinHandle};
use tracing::Span;

use super::Engine;

/// Bytes that are left for each worker before another is started: what one copies in the time that it takes
/// to start a thread, and some more.
const BYTES_EACH: u64 = 2 << 20;

/// The threads of one job.
#[derive(Debug, Default)]
pub(super) struct Workers(Mutex<Threads>);

/// *Guards* the threads. *Order*: leaf. *Not under it*: anything but the start of a thread.
#[derive(Debug, Default)]
struct Threads {
    started: Vec<JoinHandle<()>>,
    /// How many there may be.
    most: usize,
}

impl Engine {
    /// Starts the workers that a job begins with, and allows `most`. They log in the caller's span.
    ///
    /// # Errors
    /// The system gives not a single thread.
    pub(crate) fn start_workers(self: &Arc<Self>, most: usize) -> io::Result<()> {
        let at_once = if self.attachment.is_some() { most } else { 1 };
        let mut threads = self.workers.0.lock();
        threads.most = most;
        for _ in 0..at_once {
            match self.start_worker() {
                Ok(thread) => threads.started.push(thread),
                // Fewer threads than wished for do the same work.
                Err(_) if !threads.started.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Starts another worker if `left` bytes are work for it. The caller is a worker, with an action that is
    /// not reported.
    pub(super) fn start_another(self: &Arc<Self>, left: u64) {
        let mut threads = self.workers.0.lock();
        let started = threads.started.len();
        if started >= threads.most || left / BYTES_EACH < started as u64 {
            return;
        }
        match self.start_worker() {
            Ok(thread) => threads.started.push(thread),
            // Nor will it give one the next time.
            Err(_) => threads.most = started,
        }
    }

    fn start_worker(self: &Arc<Self>) -> io::Result<JoinHandle<()>> {
        let (own, span) = (Arc::clone(self), Span::current());
        thread::Builder::new().name("mirror".into()).spawn(move || span.in_scope(|| own.run()))
    }

    /// Whether there are threads that were not taken.
    pub(crate) fn has_workers(&self) -> bool {
        !self.workers.0.lock().started.is_empty()
    }

    /// The threads, for their owner to join once the job is over. Empty if they were taken.
    pub(crate) fn take_workers(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.workers.0.lock().started)
    }
}

/// A thread that copies inside the page cache keeps a processor busy and more of them only share it; one that
/// waits for a disk or a network does not. Eight keep a fast disk busy, twice the processors a fast host.
pub(crate) fn most_by_default() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get).saturating_mul(2).max(8)
}
