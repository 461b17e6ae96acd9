//! A job on one thread: what its worker asks the machine, and the thread.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockmirror_block::{self as block, ByteRange};
use tracing::{debug, error_span, info};

use crate::error::JobError;
use crate::event::Operation;
use crate::handle::{JobControl, Outcome, Shared, wait_for};
use crate::machine::{Failed, Machine, Step};
use crate::options::JobOptions;
use crate::state::JobState;

/// The worker's side of a job.
#[derive(Debug)]
pub struct Worker<E> {
    shared: Arc<Shared<E>>,
    left_out: Option<block::Error>,
}

impl<E: JobError> Worker<E> {
    /// Waits until the next piece may be begun; the most bytes it should have, at least `unit`.
    ///
    /// # Errors
    /// [`JobError::cancelled`].
    pub fn next_step(&self, unit: u64, most: u64) -> Result<u64, E> {
        self.wait(|machine, now| machine.next_step(now))?;
        let quota = self.shared.with_machine(|machine, _| machine.limiter.quota());
        let units = quota.min(most) / unit.max(1) * unit.max(1);
        Ok(units.max(unit))
    }

    /// A piece of `bytes` is done, of which `moved` had to be moved.
    pub fn done(&self, bytes: u64, moved: u64) {
        self.shared.with_machine(|machine, now| machine.done(now, bytes, moved));
    }

    /// A piece failed: whether it is to be tried again (true) or left out (false).
    ///
    /// # Errors
    /// The job fails.
    pub fn failed(&mut self, operation: Operation, range: ByteRange, error: block::Error) -> Result<bool, E> {
        let failed = self.shared.with_machine(|machine, _| machine.failed(operation, range, &error));
        debug!(%operation, %range, %error, then = ?failed, "a piece failed");
        match failed {
            Failed::Again => Ok(true),
            Failed::LeaveOut => {
                self.left_out.get_or_insert(error);
                Ok(false)
            }
            Failed::Abort => Err(E::failed(operation, error)),
        }
    }

    /// All pieces are done: waits until the last step may be taken.
    ///
    /// # Errors
    /// [`JobError::cancelled`], or [`JobError::left_out`] if something was.
    pub fn last_step(&mut self) -> Result<(), E> {
        if let Some(error) = self.left_out.take() {
            return Err(E::left_out(error));
        }
        self.wait(|machine, _| machine.last_step())
    }

    /// The commit point: what the work does from here on changes what others see, and is not taken back. The
    /// job cannot be cancelled any more, and its result is what the work returns.
    ///
    /// # Errors
    /// [`JobError::cancelled`].
    pub fn pass_commit_point(&self) -> Result<(), E> {
        self.wait(|machine, _| machine.pass_commit_point())
    }

    fn wait(&self, ask: impl Fn(&mut Machine<E>, Duration) -> Step) -> Result<(), E> {
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        loop {
            let now = shared.now(&state);
            let step = ask(&mut state.machine, now);
            shared.events.notify_all();
            match step {
                Step::Go => return Ok(()),
                Step::Stop => return Err(E::cancelled()),
                Step::Wait(timeout) => state = wait_for(&shared.changed, state, timeout),
            }
        }
    }
}

/// A running job. Dropping it cancels it and waits for its thread.
#[derive(Debug)]
pub struct Job<E: JobError> {
    control: JobControl<E>,
    thread: Option<JoinHandle<()>>,
}

impl<E: JobError> Job<E> {
    /// Starts `work` on a disk of `len` bytes. When the job is cancelled the calls of devices that `work` has
    /// made are cancelled, and no others.
    ///
    /// # Errors
    /// [`JobError::thread`].
    pub fn start(
        name: &str,
        len: u64,
        options: JobOptions,
        work: impl FnOnce(&mut Worker<E>) -> Result<(), E> + Send + 'static,
    ) -> Result<Self, E> {
        let shared = Arc::new(Shared::new(Machine::new(len, options)));
        let control = JobControl { shared: Arc::clone(&shared) };
        let span = error_span!("work", kind = name);
        let run = move || {
            let _span = span.entered();
            info!(len, "begins");
            let mut worker = Worker { shared: Arc::clone(&shared), left_out: None };
            // A device that panics must end the job, not hang its waiters. What `work` holds goes with it,
            // before the end of the job is reported.
            let result = panic::catch_unwind(AssertUnwindSafe(|| {
                let _calls = shared.enter_calls();
                work(&mut worker)
            }));
            let result = result.unwrap_or(Err(E::panicked()));
            let mut state = shared.state.lock();
            // Whatever error a call that was ended returns, the reason is that the job was cancelled.
            let cancelled = state.machine.state == JobState::Aborting;
            let result = if cancelled { Err(E::cancelled()) } else { result };
            let (error, moved) = (result.as_ref().err().map(ToString::to_string), state.machine.moved);
            let elapsed = shared.started.elapsed();
            state.machine.conclude(result);
            state.ended = Some(elapsed);
            drop(state);
            shared.changed.notify_all();
            shared.events.notify_all();
            info!(moved, seconds = elapsed.as_secs_f64(), error, "ended");
        };
        let thread = thread::Builder::new().name(name.into()).spawn(run).map_err(E::thread)?;
        Ok(Self { control, thread: Some(thread) })
    }

    /// A handle to control and watch it with.
    pub fn control(&self) -> &JobControl<E> {
        &self.control
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why the job failed, or [`JobError::cancelled`].
    pub fn wait(mut self) -> Result<Outcome, E> {
        self.join();
        self.control.shared.with_machine(|machine, elapsed| {
            machine.result.take().unwrap_or(Err(E::panicked()))?;
            Ok(Outcome { moved: machine.moved, elapsed })
        })
    }

    fn join(&mut self) {
        self.control.wait(None);
        if let Some(thread) = self.thread.take() {
            // A panic was caught, and is the result.
            let _ = thread.join();
        }
    }
}

impl<E: JobError> Drop for Job<E> {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // Refused if it is over, which is as good.
            let _ = self.control.force_cancel();
            self.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use blockmirror_block::cancel;

    use super::*;
    use crate::error::testing::TestError;
    use crate::event::Event;

    type TestJob = Job<TestError>;

    fn start(
        options: JobOptions,
        work: impl FnOnce(&mut Worker<TestError>) -> Result<(), TestError> + Send + 'static,
    ) -> TestJob {
        TestJob::start("test", 4096, options, work).unwrap()
    }

    fn states(job: &TestJob) -> Vec<JobState> {
        let status = |event| match event {
            Event::Status(state) => Some(state),
            _ => None,
        };
        job.control().events().into_iter().filter_map(status).collect()
    }

    #[test]
    fn a_job_does_its_work_and_ends() {
        let job = start(JobOptions::default(), |worker| {
            assert_eq!(worker.next_step(512, 4096)?, 4096);
            worker.done(4096, 1024);
            worker.last_step()
        });
        let control = job.control().clone();
        let outcome = job.wait().unwrap();
        let progress = control.progress();
        assert_eq!((outcome.moved, progress.offset, progress.state), (1024, 4096, JobState::Null));
    }

    #[test]
    fn a_job_that_is_dropped_is_cancelled() {
        let (ended, end) = mpsc::channel();
        let job = start(JobOptions::default(), move |worker| {
            let error = loop {
                if let Err(error) = worker.next_step(1, 1) {
                    break error;
                }
            };
            ended.send(error.is_cancelled()).unwrap();
            Err(error)
        });
        drop(job);
        assert_eq!(end.recv(), Ok(true));
    }

    /// The thread that the system gives a job may begin after the job was cancelled.
    #[test]
    fn a_job_that_is_cancelled_before_its_thread_begins_has_its_calls_cancelled() {
        let shared = Arc::new(Shared::new(Machine::<TestError>::new(4096, JobOptions::default())));
        JobControl { shared: Arc::clone(&shared) }.cancel().unwrap();
        let _calls = shared.enter_calls();
        assert!(cancel::is_cancelled());
    }

    #[test]
    fn a_panic_of_the_work_ends_the_job() {
        let job = start(JobOptions::default().auto_dismiss(false), |_| panic!("as a device might"));
        assert!(job.control().wait_timeout(Duration::from_secs(60)));
        assert_eq!(states(&job).last(), Some(&JobState::Concluded));
        assert!(matches!(job.wait(), Err(TestError::Panicked)));
    }

    #[test]
    fn what_is_left_out_fails_the_job_in_the_end() {
        let job = start(JobOptions::default().on_error(crate::OnError::Ignore), |worker| {
            let failure = || block::Error::new(block::ErrorKind::Io, "read");
            while worker.failed(Operation::Read, ByteRange::at(0, 512), failure())? {}
            worker.done(512, 0);
            worker.last_step()
        });
        assert!(matches!(job.wait(), Err(TestError::LeftOut(_))));
    }
}
