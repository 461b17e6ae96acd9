//! Watch on writes to a node: what a log of a live mirror needs of the nodes that its disks consist of.
//!
//! [`NodeDevice`](super::NodeDevice) calls it. Must hold: the hook has returned before the first write begins
//! after it was set.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use blockmirror_block::sync::Mutex;

/// What is called before the first write.
pub(crate) type OnWrite = Box<dyn FnOnce() + Send>;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct WriteWatch {
    armed: AtomicBool,
    /// *Guards* the hook, and the name of the log that it is of. *Order*: leaf. *Not under it*: anything but
    /// the hook, for which the first write waits.
    hook: Mutex<Option<(String, OnWrite)>>,
    /// It was written by means that are not counted.
    rewritten: AtomicBool,
    /// Logs whose rules need its flushes.
    logs: AtomicUsize,
}

impl fmt::Debug for WriteWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteWatch").field("armed", &self.armed).finish_non_exhaustive()
    }
}

impl WriteWatch {
    /// A write is about to begin.
    pub(super) fn before_write(&self) {
        if self.armed.load(Ordering::Acquire) {
            self.fire();
        }
    }

    fn fire(&self) {
        let mut hook = self.hook.lock();
        if let Some((_, hook)) = hook.take() {
            hook();
        }
        self.armed.store(false, Ordering::Release);
    }

    /// It is, or was, written by means that are not counted.
    pub(crate) fn note_rewritten(&self) {
        self.rewritten.store(true, Ordering::Release);
        self.fire();
    }

    /// Whether [`note_rewritten`](Self::note_rewritten) was called.
    pub(crate) fn was_rewritten(&self) -> bool {
        self.rewritten.load(Ordering::Acquire)
    }

    /// `hook` is called before the next write, for the log `name`.
    pub(crate) fn arm(&self, name: &str, hook: OnWrite) {
        *self.hook.lock() = Some((name.to_owned(), hook));
        self.armed.store(true, Ordering::Release);
    }

    /// No hook is called any more.
    pub(crate) fn disarm(&self) {
        self.hook.lock().take();
    }

    /// The log for which a hook waits: nothing has been written since it was set.
    pub(crate) fn armed_for(&self) -> Option<String> {
        self.hook.lock().as_ref().map(|(name, _)| name.clone())
    }

    /// A log needs its flushes, from now on or no longer.
    pub(crate) fn log_comes(&self, comes: bool) {
        match comes {
            true => self.logs.fetch_add(1, Ordering::AcqRel),
            false => self.logs.fetch_sub(1, Ordering::AcqRel),
        };
    }

    /// Whether a log needs its flushes.
    pub(crate) fn has_log(&self) -> bool {
        self.logs.load(Ordering::Acquire) > 0
    }
}
