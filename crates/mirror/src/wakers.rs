//! Wakers: how callers that never wait learn that a write which was refused may be admitted now.
//!
//! A caller registers one waker, however many of its writes are refused ([`GuestQueue`]). It arms the waker
//! and asks once more; if it is refused again it may sleep. The drain of a tap, its log and the engine of its
//! job change what a write may wait for: each calls [`raise`](Wakers::raise) under the lock of what it has
//! changed, and [`deliver`](Wakers::deliver) when its thread holds no lock any more.
//!
//! No wake-up is lost: the second answer and the change are under one lock. If the change came first the
//! answer knows of it; if not, the waker was armed before it, and `raise` sees that.
//!
//! Must hold: a waker is called under no lock of this crate; memory is bounded by the registered callers.
//!
//! [`GuestQueue`]: crate::GuestQueue

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::sync::atomic::{AtomicBool, Ordering};
use tracing::error;

/// The wakers of the callers of one tap.
#[derive(Debug, Default)]
pub(crate) struct Wakers {
    /// *Guards* the wakers. *Order*: leaf. *Not under it*: the wakers' own code.
    registered: Mutex<Vec<Arc<Waker>>>,
    /// One of them may be armed.
    any_armed: AtomicBool,
    /// Those that are armed are to be called.
    raised: AtomicBool,
}

/// The waker of one caller.
pub(crate) struct Waker {
    wake: Box<dyn Fn() + Send + Sync>,
    /// The caller was refused, and not woken since.
    armed: AtomicBool,
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waker").field("armed", &self.armed).finish_non_exhaustive()
    }
}

impl Wakers {
    pub(crate) fn register(&self, wake: Box<dyn Fn() + Send + Sync>) -> Arc<Waker> {
        let waker = Arc::new(Waker { wake, armed: AtomicBool::new(false) });
        self.registered.lock().push(Arc::clone(&waker));
        waker
    }

    /// Forgets the waker. It may be called once more by a thread that is about to.
    pub(crate) fn unregister(&self, waker: &Arc<Waker>) {
        let mut registered = self.registered.lock();
        let own = registered.iter().position(|other| Arc::ptr_eq(other, waker));
        let dropped = own.map(|index| registered.swap_remove(index));
        drop(registered);
        drop(dropped);
    }

    /// The caller of `waker` was refused. It asks once more before it sleeps.
    pub(crate) fn arm(&self, waker: &Waker) {
        waker.armed.store(true, Ordering::SeqCst);
        self.any_armed.store(true, Ordering::SeqCst);
    }

    /// A write that was refused may be admitted now. Under the lock of what has changed.
    pub(crate) fn raise(&self) {
        if self.any_armed.load(Ordering::SeqCst) {
            self.raised.store(true, Ordering::SeqCst);
        }
    }

    /// Whether there is anything to deliver.
    pub(crate) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    /// Calls the wakers that are armed if one of the callers may be admitted. Under no lock of this crate.
    pub(crate) fn deliver(&self) {
        if !self.is_raised() || !self.raised.swap(false, Ordering::SeqCst) {
            return;
        }
        // A caller that is refused from here on arms its waker, and this, anew.
        self.any_armed.store(false, Ordering::SeqCst);
        let armed: Vec<Arc<Waker>> = {
            let registered = self.registered.lock();
            let armed = registered.iter().filter(|waker| waker.armed.swap(false, Ordering::SeqCst));
            armed.cloned().collect()
        };
        for waker in armed {
            // The thread is one of the job, or of another caller: neither ends by this.
            if panic::catch_unwind(AssertUnwindSafe(|| (waker.wake)())).is_err() {
                error!("the waker of a queue panicked");
            }
        }
    }

    /// Delivers when it is dropped. Made before a lock is taken, it is dropped after that is released.
    #[must_use = "it delivers when it is dropped"]
    pub(crate) fn deliver_at_end(&self) -> DeliverAtEnd<'_> {
        DeliverAtEnd(self)
    }
}

/// See [`Wakers::deliver_at_end`].
pub(crate) struct DeliverAtEnd<'a>(&'a Wakers);

impl Drop for DeliverAtEnd<'_> {
    fn drop(&mut self) {
        self.0.deliver();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn counting(wakers: &Wakers) -> (Arc<Waker>, Arc<AtomicUsize>) {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let waker = wakers.register(Box::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        }));
        (waker, calls)
    }

    #[test]
    fn only_who_was_refused_is_woken_and_once() {
        let wakers = Wakers::default();
        let ((first, calls), (_second, others)) = (counting(&wakers), counting(&wakers));
        wakers.raise();
        wakers.deliver();
        assert_eq!(calls.load(Ordering::SeqCst), 0, "it was not refused");
        wakers.arm(&first);
        wakers.deliver();
        assert_eq!(calls.load(Ordering::SeqCst), 0, "nothing has changed");
        for _ in 0..2 {
            wakers.raise();
            wakers.deliver();
        }
        assert_eq!((calls.load(Ordering::SeqCst), others.load(Ordering::SeqCst)), (1, 0));
    }

    #[test]
    fn a_waker_that_panics_or_is_gone_keeps_none_from_the_others() {
        let wakers = Wakers::default();
        let bad = wakers.register(Box::new(|| panic!("a bad waker")));
        let ((gone, of_gone), (last, calls)) = (counting(&wakers), counting(&wakers));
        for waker in [&bad, &gone, &last] {
            wakers.arm(waker);
        }
        wakers.unregister(&gone);
        wakers.raise();
        wakers.deliver();
        assert_eq!((calls.load(Ordering::SeqCst), of_gone.load(Ordering::SeqCst)), (1, 0));
        wakers.unregister(&bad);
        wakers.unregister(&last);
        assert!(wakers.registered.lock().is_empty());
    }

    /// A waker may ask, be refused and arm itself, and may end its queue.
    #[test]
    fn a_waker_may_use_the_wakers() {
        let wakers = Arc::new(Wakers::default());
        let (own, slot) = (Arc::clone(&wakers), Arc::new(Mutex::new(None::<Arc<Waker>>)));
        let taken = Arc::clone(&slot);
        let waker = wakers.register(Box::new(move || {
            if let Some(waker) = taken.lock().take() {
                own.unregister(&waker);
            }
        }));
        *slot.lock() = Some(Arc::clone(&waker));
        wakers.arm(&waker);
        wakers.raise();
        wakers.deliver();
        assert!(wakers.registered.lock().is_empty());
    }
}
