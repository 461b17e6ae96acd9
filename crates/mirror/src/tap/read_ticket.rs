//! A guest read between its beginning and its end: one owned ticket.

use std::fmt;
use std::sync::Arc;

use arc_swap::Guard;
use blockmirror_block::BlockDevice;

use super::below::Below;
use super::{GuestQueue, Tap};

/// A guest read that its caller performs by its own means; also a flush, or a query of extents. It borrows
/// nothing, and ends when it is dropped.
///
/// It never waits, and keeps no write from beginning. After a pivot new reads go to the new disk at once; the
/// job is over, and [`MirrorJob::wait`](crate::MirrorJob::wait) returns, when the last read that began before
/// has ended: then nothing of the tap reaches the old disk any more, and it may be closed. So a ticket
/// that is never dropped keeps a job from its end, unless that is cancelled or dropped: then it ends as it
/// was asked to, and the old disk may be in use yet.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, testing::MemoryDisk};
/// use blockmirror_mirror::Tap;
///
/// let tap = Tap::new(Arc::new(MemoryDisk::new(1 << 20)));
/// let ticket = tap.begin_read();
/// let mut buf = [0; 512];
/// ticket.source().read_at(&mut buf, 4096)?;
/// drop(ticket);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "the read has ended when this is dropped"]
pub struct ReadTicket(Guard<Arc<Below>>);

impl ReadTicket {
    /// The disk to read from, until this is dropped.
    pub fn source(&self) -> &Arc<dyn BlockDevice> {
        &self.0.device
    }
}

impl fmt::Debug for ReadTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadTicket").field("source", &self.0.device.name()).finish_non_exhaustive()
    }
}

impl Tap {
    /// Announces a guest read. Never waits, and takes no lock.
    pub fn begin_read(&self) -> ReadTicket {
        ReadTicket(self.below.load())
    }
}

impl GuestQueue {
    /// [`Tap::begin_read`].
    pub fn begin_read(&self) -> ReadTicket {
        self.tap().begin_read()
    }
}
