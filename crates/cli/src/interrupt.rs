//! Signals, as flags to look at.
//!
//! The first signal that ends a program asks for an orderly end: the job is cancelled and its partial target removed.
//! A second one ends the process at once. A signal that the process was started with as ignored (`nohup`, a background
//! job of a script) stays ignored.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::SigId;
use signal_hook::consts::{SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGXFSZ};
use signal_hook::{flag, low_level};

use crate::failure::{Exit, Failure, Outcome};

/// The signals that ask for an end. SIGQUIT is not among them: it is how a process that hangs is made to dump core.
const ENDING: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGUSR2, SIGALRM, SIGXCPU];

/// Watches for signals as long as it lives.
pub(crate) struct Interrupt {
    requested: Arc<AtomicBool>,
    /// The last signal that asked for an end; 0 before the first.
    signal: Arc<AtomicUsize>,
    progress_wanted: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Interrupt {
    /// Starts watching.
    pub(crate) fn watch() -> Outcome<Self> {
        let mut watching = Self {
            requested: Arc::new(AtomicBool::new(false)),
            signal: Arc::new(AtomicUsize::new(0)),
            progress_wanted: Arc::new(AtomicBool::new(false)),
            handlers: Vec::new(),
        };
        watching.register().map_err(|e| Failure::failed(format_args!("watch signals: {e}")))?;
        Ok(watching)
    }

    fn register(&mut self) -> std::io::Result<()> {
        for (signal, number) in ending() {
            // In this order: the second signal finds the flag that the first one set.
            let code = i32::from(Exit::Signal(signal).code());
            let ends = flag::register_conditional_shutdown(signal, code, Arc::clone(&self.requested))?;
            self.handlers.push(ends);
            self.handlers.push(flag::register_usize(signal, Arc::clone(&self.signal), number)?);
            self.handlers.push(flag::register(signal, Arc::clone(&self.requested))?);
        }
        if !is_ignored(SIGUSR1) {
            self.handlers.push(flag::register(SIGUSR1, Arc::clone(&self.progress_wanted))?);
        }
        Ok(())
    }

    /// Whether a signal asked for an end.
    pub(crate) fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// The exit code of a command that such a signal has ended.
    pub(crate) fn exit(&self) -> Exit {
        let signal = i32::try_from(self.signal.load(Ordering::SeqCst)).ok().filter(|signal| *signal > 0);
        Exit::Signal(signal.unwrap_or(SIGINT))
    }

    /// Whether SIGUSR1 asked for a line of progress since the last call.
    pub(crate) fn progress_wanted(&self) -> bool {
        self.progress_wanted.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            low_level::unregister(handler);
        }
    }
}

/// The signals that ask for an end and are not ignored, each also as what a flag can hold.
pub(crate) fn ending() -> impl Iterator<Item = (i32, usize)> {
    let numbered = ENDING.into_iter().filter_map(|signal| usize::try_from(signal).ok().map(|n| (signal, n)));
    numbered.filter(|(signal, _)| !is_ignored(*signal))
}

/// Keeps signals that are no reason to end from ending the process: SIGUSR1 asks for a line of progress, which some
/// commands print, and SIGXFSZ accompanies a write beyond the limit for file sizes, which fails by itself.
pub(crate) fn survive() -> std::io::Result<()> {
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGUSR1, SIGXFSZ].into_iter().filter(|signal| !is_ignored(*signal)) {
        flag::register(signal, Arc::clone(&ignored))?;
    }
    Ok(())
}

/// Whether the process ignores `signal`, which here means that it was started so. Without `/proc` there is no telling.
fn is_ignored(signal: i32) -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| names(&status, signal))
}

/// Whether `signal` is in the set of ignored ones that a `/proc/PID/status` shows.
fn names(status: &str, signal: i32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0);
    (1..=64).contains(&signal) && set >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_of_ignored_signals_is_read() {
        let status = "Name:\tsh\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        assert!(names(status, SIGHUP));
        assert!(names(status, signal_hook::consts::SIGPIPE));
        assert!(!names(status, SIGINT));
        assert!(!names("", SIGHUP) && !names("SigIgn:\tx\n", SIGHUP) && !names(status, 0));
    }
}
