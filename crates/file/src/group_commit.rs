//! Group commit: many flushes, few `fdatasync` calls, and no success after a failure.
//!
//! A flush is answered only by a sync that *began after* it arrived; flushes that arrive while one runs share
//! the next. The kernel reports a lost write to one sync call and forgets it, so after a failure no call
//! reports success any more. The mutex is never held during the system call.

use std::fs::File;
use std::io;

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{Error, ErrorKind, Result};

#[derive(Debug, Default)]
struct State {
    /// Syncs that have begun.
    begun: u64,
    /// The newest sync that has succeeded; every older one counts as done, too.
    done: u64,
    running: bool,
    /// The error number of the first failure.
    failed: Option<i32>,
}

/// Groups the flushes of one open file.
#[derive(Debug, Default)]
pub(crate) struct GroupCommit {
    state: Mutex<State>,
    ended: Condvar,
}

impl GroupCommit {
    /// Makes everything written before the call durable.
    pub(crate) fn flush(&self, file: &File) -> Result<()> {
        self.flush_with(|| file.sync_data())
    }

    /// Whether a flush has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.state.lock().failed.is_some()
    }

    /// Flushes may succeed again: what a failed one should have covered is written once more.
    pub(crate) fn reset(&self) {
        self.state.lock().failed = None;
    }

    fn flush_with(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let wanted = state.begun + 1;
        loop {
            if let Some(errno) = state.failed {
                return Err(Error::new(ErrorKind::Poisoned, "flush")
                    .because("an earlier flush failed; data written before it may be lost")
                    .caused_by(io::Error::from_raw_os_error(errno)));
            }
            if state.done >= wanted {
                return Ok(());
            }
            if !state.running {
                break;
            }
            state = self.ended.wait(state);
        }
        state.begun += 1;
        state.running = true;
        let mine = state.begun;
        drop(state);

        let result = sync();

        let mut state = self.state.lock();
        state.running = false;
        match &result {
            Ok(()) => state.done = mine,
            Err(e) => state.failed = Some(e.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error())),
        }
        drop(state);
        self.ended.notify_all();
        result.map_err(|e| Error::io("flush", e))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn after_a_failure_no_flush_succeeds() {
        let group = GroupCommit::default();
        group.flush_with(|| Ok(())).unwrap();
        let first = group.flush_with(|| Err(io::Error::from_raw_os_error(5))).unwrap_err();
        assert_eq!(first.kind(), ErrorKind::Io);
        let later = group.flush_with(|| panic!("must not sync again")).unwrap_err();
        assert_eq!(later.kind(), ErrorKind::Poisoned);
    }

    #[test]
    fn a_reset_gate_syncs_again() {
        let group = GroupCommit::default();
        group.flush_with(|| Err(io::Error::from_raw_os_error(28))).unwrap_err();
        assert!(group.has_failed());
        group.reset();
        assert!(!group.has_failed());
        let syncs = AtomicU64::new(0);
        group
            .flush_with(|| {
                syncs.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
            .unwrap();
        assert_eq!(syncs.into_inner(), 1);
    }

    #[test]
    fn a_flush_that_arrives_during_a_sync_is_answered_by_a_later_one() {
        let group = GroupCommit::default();
        let syncs = AtomicU64::new(0);
        thread::scope(|s| {
            group
                .flush_with(|| {
                    // Arrives while this sync runs: it may not be answered by it.
                    for _ in 0..4 {
                        s.spawn(|| {
                            group
                                .flush_with(|| {
                                    syncs.fetch_add(1, Ordering::SeqCst);
                                    Ok(())
                                })
                                .unwrap();
                        });
                    }
                    syncs.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
                .unwrap();
        });
        let n = syncs.load(Ordering::SeqCst);
        assert!((2..=5).contains(&n), "{n} syncs");
    }

    #[test]
    fn every_flush_sees_a_sync_that_began_after_it() {
        let group = GroupCommit::default();
        let clock = AtomicU64::new(0);
        let last_begin = AtomicU64::new(0);
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let arrived = clock.fetch_add(1, Ordering::SeqCst);
                        group
                            .flush_with(|| {
                                last_begin.store(clock.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
                                Ok(())
                            })
                            .unwrap();
                        assert!(last_begin.load(Ordering::SeqCst) > arrived);
                    }
                });
            }
        });
    }
}
