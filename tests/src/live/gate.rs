//! The gate that the writers pass between operations: closed, it holds all of them, so that the judge can
//! look.

use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex};

use super::WRITERS;
use blockmirror_testing::Outcome;

/// A writer that does not come back to the gate for so long is stuck.
const STUCK: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    over: bool,
    parked: usize,
    gone: usize,
}

impl Gate {
    /// Waits while the gate is closed; false if there is nothing more to do.
    pub(super) fn pass(&self) -> bool {
        let mut state = self.state.lock();
        if state.closed && !state.over {
            state.parked += 1;
            self.changed.notify_all();
            while state.closed && !state.over {
                state = self.changed.wait(state);
            }
            state.parked -= 1;
        }
        !state.over
    }

    /// Closes the gate and waits until every writer stands at it.
    pub(super) fn close(&self) -> Outcome {
        let until = Instant::now() + STUCK;
        let mut state = self.state.lock();
        state.closed = true;
        while state.parked + state.gone < WRITERS {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("a guest's request has not come back for {STUCK:?}").into());
            }
            state = self.changed.wait_timeout(state, left).0;
        }
        if state.gone > 0 { Err("a writer has stopped".into()) } else { Ok(()) }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    pub(super) fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }

    /// Sends the writers home.
    pub(super) fn end(&self) {
        self.state.lock().over = true;
        self.changed.notify_all();
    }

    /// A writer does not come again.
    pub(super) fn leave(&self) {
        self.state.lock().gone += 1;
        self.changed.notify_all();
    }
}
