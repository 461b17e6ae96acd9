//! Flushes that arrive together share one write-back. Used by the flush of the image only.

use blockmirror_block::Result;
use blockmirror_block::sync::{Condvar, Mutex};

/// Joins flushes that arrive together: each is answered by a write-back that began after it arrived.
#[derive(Debug, Default)]
pub(crate) struct GroupCommit {
    state: Mutex<GroupCommitState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GroupCommitState {
    running: bool,
    started: u64,
    completed: u64,
}

impl GroupCommit {
    /// Returns once a call of `work` has succeeded that began after this call did.
    pub(crate) fn join(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let needed = state.started + 1;
        loop {
            if state.completed >= needed {
                return Ok(());
            }
            if state.running {
                state = self.changed.wait(state);
                continue;
            }
            state.running = true;
            state.started += 1;
            let mine = state.started;
            drop(state);
            let result = work();
            state = self.state.lock();
            state.running = false;
            if result.is_ok() {
                state.completed = mine;
            }
            self.changed.notify_all();
            return result;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use blockmirror_block::{Error, ErrorKind};

    use super::*;

    #[test]
    fn a_flush_is_answered_by_work_that_began_after_it() {
        let group_commit = GroupCommit::default();
        let runs = AtomicU32::new(0);
        let inside = Mutex::new(());
        let work = || {
            runs.fetch_add(1, Ordering::SeqCst);
            drop(inside.lock());
            Ok(())
        };
        std::thread::scope(|s| {
            let hold = inside.lock();
            s.spawn(|| group_commit.join(work));
            while runs.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            // These arrive while the first is at work: it does not answer them, but they may share a later
            // one.
            for _ in 0..3 {
                s.spawn(|| group_commit.join(work));
            }
            drop(hold);
        });
        let runs = runs.load(Ordering::SeqCst);
        assert!((2..=4).contains(&runs), "{runs} runs");
        assert_eq!(group_commit.state.lock().completed, u64::from(runs));
    }

    #[test]
    fn a_failed_run_is_not_taken_for_a_success() {
        let group_commit = GroupCommit::default();
        assert!(group_commit.join(|| Err(Error::new(ErrorKind::Io, "flush"))).is_err());
        assert_eq!(group_commit.state.lock().completed, 0);
        assert!(group_commit.join(|| Ok(())).is_ok());
    }
}
