//! Cancelling the calls of one caller, on devices that others use too.
//!
//! A job, or an export, has a [`CancelSource`]. Its threads enter it around their calls of devices; a device
//! that may block asks [`is_cancelled`] of the calling thread and gives that call up, and no other. So who
//! cancels needs to know nothing of who else uses the device. A step that others depend on, such as a
//! write-back of metadata, is performed under a [`shield`]: it comes to its end.
//!
//! The scope belongs to the thread. A device that passes a call on to another thread cannot be cancelled
//! there.

use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::sync::{Condvar, MutexGuard};

/// How often a call that waits asks whether it is cancelled.
pub const POLL_INTERVAL: Duration = Duration::from_millis(20);

#[cfg(not(shuttle))]
thread_local!(static CURRENT: RefCell<Option<Entered>> = const { RefCell::new(None) });
#[cfg(shuttle)]
shuttle::thread_local!(static CURRENT: RefCell<Option<Entered>> = RefCell::new(None));

/// The scope of the calling thread.
fn current_scope<R>(f: impl FnOnce(&mut Option<Entered>) -> R) -> R {
    CURRENT.with(|current| f(&mut current.borrow_mut()))
}

/// Cancels calls of devices: those made in its scopes, on any thread.
#[derive(Clone, Default)]
pub struct CancelSource(Arc<AtomicU64>);

impl CancelSource {
    /// A source whose calls are not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels the calls in all scopes that were entered before.
    pub fn cancel(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    /// Calls that the thread makes from now on are cancelled by this source, and by no outer one, until the
    /// scope is dropped.
    pub fn enter(&self) -> CancelScope {
        let cancelled = self.0.load(Ordering::Acquire);
        CancelScope::replace(Some(Entered { source: self.clone(), cancelled, shielded: false }))
    }
}

impl fmt::Debug for CancelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CancelSource").field(&self.0.load(Ordering::Relaxed)).finish()
    }
}

/// The source of a thread's scope, and how often it had cancelled when the scope was entered.
#[derive(Clone)]
struct Entered {
    source: CancelSource,
    cancelled: u64,
    shielded: bool,
}

impl Entered {
    fn is_cancelled(&self) -> bool {
        self.source.0.load(Ordering::Acquire) != self.cancelled
    }
}

/// Until it is dropped, the calls of this thread are cancelled by the source that it was entered with, or by
/// none.
#[must_use = "the scope ends as soon as it is dropped"]
pub struct CancelScope {
    outer: Option<Entered>,
    /// It belongs to its thread.
    not_send: PhantomData<*const ()>,
}

impl CancelScope {
    fn replace(with: Option<Entered>) -> Self {
        let outer = current_scope(|current| std::mem::replace(current, with));
        Self { outer, not_send: PhantomData }
    }
}

impl Drop for CancelScope {
    fn drop(&mut self) {
        let outer = self.outer.take();
        let _inner = current_scope(|current| std::mem::replace(current, outer));
    }
}

impl fmt::Debug for CancelScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelScope").finish_non_exhaustive()
    }
}

/// Calls that the thread makes until the scope is dropped are not cancelled: others depend on their outcome.
pub fn shield() -> CancelScope {
    let inner = current_scope(|current| current.clone());
    CancelScope::replace(inner.map(|inner| Entered { shielded: true, ..inner }))
}

/// Whether the calls of this thread are cancelled now.
pub fn is_cancelled() -> bool {
    current_scope(|current| current.as_ref().is_some_and(|now| !now.shielded && now.is_cancelled()))
}

/// Whether the caller of this thread is cancelled, under a [`shield`] or not: what delays calls without
/// failing them (throttling) does not delay these.
pub fn is_hurried() -> bool {
    current_scope(|current| current.as_ref().is_some_and(Entered::is_cancelled))
}

/// Waits on `condition` for at most `timeout`, if there is one, and no longer than until it is time to ask
/// [`is_cancelled`] again. May wake without cause.
pub fn wait<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Option<Duration>,
) -> MutexGuard<'a, T> {
    let poll = current_scope(|current| current.is_some()).then_some(POLL_INTERVAL);
    match timeout.into_iter().chain(poll).min() {
        None => condition.wait(guard),
        Some(timeout) => condition.wait_timeout(guard, timeout).0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_cancels_its_scopes_and_no_others() {
        let (job, other) = (CancelSource::new(), CancelSource::new());
        assert!(!is_cancelled());
        let outer = other.enter();
        {
            let _scope = job.enter();
            job.cancel();
            assert!(is_cancelled());
            std::thread::scope(|s| s.spawn(|| assert!(!is_cancelled(), "another thread")).join()).unwrap();
            let _shield = shield();
            assert!(!is_cancelled() && is_hurried());
        }
        assert!(!is_cancelled());
        {
            let _later = job.enter();
            assert!(!is_cancelled(), "it was cancelled before");
        }
        other.cancel();
        assert!(is_cancelled());
        drop(outer);
        assert!(!is_cancelled());
    }

    #[test]
    fn a_wait_comes_back_to_ask() {
        let (lock, condition) = (crate::sync::Mutex::new(()), Condvar::new());
        let source = CancelSource::new();
        let _scope = source.enter();
        source.cancel();
        let mut guard = lock.lock();
        while !is_cancelled() {
            guard = wait(&condition, guard, None);
        }
        // Nothing notifies: it would wait for ever.
        drop(wait(&condition, guard, None));
    }
}
