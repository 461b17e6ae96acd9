//! Waking guest writes: the threads that wait in `observer::wait_for_admission`, and the callers that never
//! wait (`crate::wakers`). [`wake_guests`](Engine::wake_guests) is the one place that does either.
//!
//! Must hold: after each change of the core `wake_guests` is called under its lock, and
//! [`deliver`](Engine::deliver) when the thread holds no lock any more, and before it sleeps.

use blockmirror_block::sync::MutexGuard;

use super::{Engine, State};
use crate::wakers::Wakers;

impl Engine {
    /// The wakers of the tap that the job is attached to.
    fn wakers(&self) -> Option<&Wakers> {
        self.attachment.as_ref().map(|attachment| &*attachment.wakers)
    }

    /// The core has changed: wakes the writes that may be admitted now.
    pub(super) fn wake_guests(&self, state: &mut State) {
        if state.guests_waiting > 0 {
            self.guests.notify_all();
        }
        let Some(wakers) = self.wakers() else { return };
        let view = state.core.admission_view();
        if state.reported_admission.replace(view) != Some(view) {
            wakers.raise();
        }
    }

    /// Calls the wakers of those whose writes may be admitted now. Under no lock.
    pub(crate) fn deliver(&self) {
        if let Some(wakers) = self.wakers() {
            wakers.deliver();
        }
    }

    /// The same for a thread that is about to sleep, or to hand its lock on; whether it had to release it, so
    /// that what it has seen may not hold any more.
    pub(super) fn deliver_unlocked<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
    ) -> (MutexGuard<'a, State>, bool) {
        if !self.wakers().is_some_and(Wakers::is_raised) {
            return (state, false);
        }
        drop(state);
        self.deliver();
        (self.state.lock(), true)
    }
}
