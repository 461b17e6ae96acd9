//! Group commit: flushes that arrive together share one run of the work that makes them durable.
//!
//! The write-back of a qcow2 image and the `fdatasync` of a file are shared so. Must hold: a flush is
//! answered by a run that *began after* it arrived, and by one that succeeded; the mutex is not held during
//! the work. The work may wait for a peer that never answers: a caller that is [cancelled](crate::cancel)
//! leaves its wait for another's run.

use crate::sync::{Condvar, Mutex};
use crate::{Error, ErrorKind, Result, cancel};

/// Joins flushes that arrive together.
///
/// ```
/// use blockmirror_block::{Error, ErrorKind, GroupCommit};
///
/// let group = GroupCommit::default();
/// assert!(group.join(|| Ok(())).is_ok());
/// let failed = group.join(|| Err(Error::new(ErrorKind::NoSpace, "flush")));
/// assert_eq!(failed.unwrap_err().kind(), ErrorKind::NoSpace);
/// ```
#[derive(Debug, Default)]
pub struct GroupCommit {
    /// *Guards* the counts. *Order*: leaf. *Not under it*: the work.
    state: Mutex<Counts>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    running: bool,
    begun: u64,
    /// The newest run that has succeeded; it answers what the older ones were to answer, too.
    succeeded: u64,
}

impl GroupCommit {
    /// Returns once a run of `work` has succeeded that began after this call did: another caller's, or its
    /// own. Runs follow one another.
    ///
    /// # Errors
    /// Those of the caller's own run: a run that fails or panics answers no other caller.
    /// [`ErrorKind::Cancelled`] if the caller is cancelled while it waits for another's.
    pub fn join(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let needed = state.begun + 1;
        while state.succeeded < needed && state.running {
            if cancel::is_cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "flush"));
            }
            state = cancel::wait(&self.ended, state, None);
        }
        if state.succeeded >= needed {
            return Ok(());
        }
        state.running = true;
        state.begun += 1;
        let mut run = Run { group: self, number: state.begun, succeeded: false };
        drop(state);
        let result = work();
        run.succeeded = result.is_ok();
        result
    }
}

/// A run of the work. It ends when this is dropped, also by a panic.
struct Run<'a> {
    group: &'a GroupCommit,
    number: u64,
    succeeded: bool,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let mut state = self.group.state.lock();
        state.running = false;
        if self.succeeded {
            state.succeeded = self.number;
        }
        drop(state);
        self.group.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use std::thread;

    use super::*;
    use crate::cancel::CancelSource;

    #[test]
    fn a_flush_is_answered_by_work_that_began_after_it() {
        let group = GroupCommit::default();
        let runs = AtomicU32::new(0);
        let run = || {
            runs.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        thread::scope(|s| {
            let first = group.join(|| {
                // These arrive while it runs: it does not answer them, but they may share a later run.
                for _ in 0..3 {
                    s.spawn(|| group.join(run));
                }
                run()
            });
            first.unwrap();
        });
        let runs = runs.load(Ordering::SeqCst);
        assert!((2..=4).contains(&runs), "{runs} runs");
        assert_eq!(group.state.lock().succeeded, u64::from(runs));
    }

    #[test]
    fn every_flush_sees_work_that_began_after_it() {
        let group = GroupCommit::default();
        let (clock, last_begin) = (AtomicU64::new(0), AtomicU64::new(0));
        let work = || {
            last_begin.store(clock.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
            Ok(())
        };
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let arrived = clock.fetch_add(1, Ordering::SeqCst);
                        group.join(work).unwrap();
                        assert!(last_begin.load(Ordering::SeqCst) > arrived);
                    }
                });
            }
        });
    }

    #[test]
    fn a_failed_run_is_not_taken_for_a_success() {
        let group = GroupCommit::default();
        let failed = group.join(|| Err(Error::new(ErrorKind::NoSpace, "flush")));
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(group.state.lock().succeeded, 0);
        group.join(|| Ok(())).unwrap();
    }

    /// All later flushes waited for ever for the end of the run.
    #[test]
    fn a_run_that_panics_answers_no_flush_and_blocks_none() {
        let group = GroupCommit::default();
        let runs = AtomicU32::new(0);
        let work = || {
            runs.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        thread::scope(|s| {
            let mut waiting = None;
            let run = || {
                group.join(|| {
                    waiting = Some(s.spawn(|| group.join(work)));
                    panic!("the work panics")
                })
            };
            catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            waiting.unwrap().join().unwrap().unwrap();
        });
        group.join(work).unwrap();
        let counts = group.state.lock();
        assert_eq!((counts.begun, counts.succeeded, runs.into_inner()), (3, 3, 2));
        assert!(!counts.running);
    }

    /// A job that was cancelled waited for a guest's flush of a disk whose server does not answer.
    #[test]
    fn a_cancelled_caller_leaves_its_wait_for_the_run_of_another() {
        let group = GroupCommit::default();
        let source = CancelSource::new();
        let result = group.join(|| {
            let _calls = source.enter();
            source.cancel();
            let other = group.join(|| panic!("it must not run beside this one"));
            assert_eq!(other.unwrap_err().kind(), ErrorKind::Cancelled);
            let _shield = cancel::shield();
            Ok(())
        });
        result.unwrap();
        // What is not waited for is performed.
        let _calls = source.enter();
        source.cancel();
        group.join(|| Ok(())).unwrap();
        assert_eq!(group.state.lock().succeeded, 2);
    }
}
