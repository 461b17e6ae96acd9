//! How many connections a server has, and room for one more.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the connections of a server against its limit, from accepting to closing.
pub(crate) struct Slots {
    taken: AtomicUsize,
    limit: usize,
    /// Called when one is given back.
    freed: Box<dyn Fn() + Send + Sync>,
}

impl Slots {
    /// `limit` of them; 0 is no limit.
    pub(crate) fn new(limit: usize, freed: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        Arc::new(Self { taken: AtomicUsize::new(0), limit, freed })
    }

    /// Whether one more may come.
    pub(crate) fn has_room(&self) -> bool {
        self.taken() < self.limit
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }

    pub(crate) fn take(self: &Arc<Self>) -> Slot {
        self.taken.fetch_add(1, Ordering::SeqCst);
        Slot(Arc::clone(self))
    }
}

/// One connection's place; given back when dropped.
pub(crate) struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
        (self.0.freed)();
    }
}
