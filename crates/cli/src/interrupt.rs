//! Ctrl-C and its relatives, as a flag to look at.
//!
//! The first signal asks for an orderly end: the job is cancelled and its partial target removed. A second one ends
//! the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

use crate::failure::{Exit, Failure, Outcome};

/// Watches for signals as long as it lives.
pub(crate) struct Interrupt {
    requested: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Interrupt {
    /// Starts watching.
    pub(crate) fn watch() -> Outcome<Self> {
        let requested = Arc::new(AtomicBool::new(false));
        let mut watching = Self { requested, handlers: Vec::new() };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // In this order: the second signal finds the flag that the first one set.
            let code = i32::from(Exit::Interrupted.code());
            let second = flag::register_conditional_shutdown(signal, code, Arc::clone(&watching.requested));
            watching.handlers.push(second.map_err(cannot)?);
            let first = flag::register(signal, Arc::clone(&watching.requested));
            watching.handlers.push(first.map_err(cannot)?);
        }
        Ok(watching)
    }

    /// Whether a signal came.
    pub(crate) fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }
}

fn cannot(error: std::io::Error) -> Failure {
    Failure::failed(format_args!("watch signals: {error}"))
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            low_level::unregister(handler);
        }
    }
}
