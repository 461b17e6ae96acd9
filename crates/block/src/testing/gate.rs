//! Holds operations of a double until the test lets them go on.

use std::sync::Arc;

use crate::cancel;
use crate::sync::{Condvar, Mutex};

/// The test's end of a hold: operations that reach it wait until it is opened.
///
/// Opens when dropped, so that a failing test does not hang.
#[must_use = "a gate opens as soon as it is dropped"]
#[derive(Debug)]
pub struct Gate(pub(crate) Arc<Latch>);

impl Gate {
    /// Lets all callers through, now and later.
    pub fn open(&self) {
        self.0.change(|state| state.open = true);
    }

    /// Operations that wait at present.
    pub fn held(&self) -> usize {
        self.0.state.lock().held
    }

    /// Waits until `n` operations or more wait at the gate.
    pub fn wait_held(&self, n: usize) {
        let mut state = self.0.state.lock();
        while state.held < n {
            state = self.0.changed.wait(state);
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

/// The operations' end of a gate.
#[derive(Debug, Default)]
pub(crate) struct Latch {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    held: usize,
    /// Rises with every cancellation; calls that began before it fail.
    cancelled: u64,
}

impl Latch {
    /// Waits until the gate is open; false if cancelled meanwhile.
    pub(crate) fn pass(&self) -> bool {
        let mut state = self.state.lock();
        if state.open {
            return true;
        }
        let came = state.cancelled;
        state.held += 1;
        self.changed.notify_all();
        while !state.open && state.cancelled == came && !cancel::is_cancelled() {
            state = cancel::wait(&self.changed, state, None);
        }
        state.held -= 1;
        state.cancelled == came && !cancel::is_cancelled()
    }

    /// Sends away who waits now.
    pub(crate) fn cancel(&self) {
        self.change(|state| state.cancelled += 1);
    }

    fn change(&self, edit: impl FnOnce(&mut State)) {
        edit(&mut self.state.lock());
        self.changed.notify_all();
    }
}
