//! A caller of a tap that never waits: a queue of a virtual device on a thread that serves many requests.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::{self as block, ByteRange};

use super::{Begin, Change, Tap};
use crate::wakers::Waker;

/// A caller of a tap that never waits, and is woken instead.
///
/// It has one waker, however many of its writes are refused. The waker is called once after a refusal,
/// when asking again may succeed; all that was refused is asked for again then, and what is refused again
/// has the waker called again. It may be called without cause, also once while the queue is dropped.
///
/// The waker runs on the thread that has made the change: one of the job, or that of another caller. It is
/// called under no lock of this crate and must not block. It is to wake a thread (write to an `eventfd`,
/// unpark, send to a channel), not to do its work. One that panics is logged.
///
/// ```
/// use std::sync::{Arc, mpsc};
/// use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, testing::MemoryDisk};
/// use blockmirror_mirror::{Begin, Tap};
///
/// let tap = Tap::new(Arc::new(MemoryDisk::new(1 << 20)));
/// let (wake, woken) = mpsc::channel();
/// let queue = tap.queue(move || drop(wake.send(())));
/// let drained = tap.drain();
/// let Begin::Wait { within: None } = queue.try_begin_write(ByteRange::at(0, 5))? else { panic!() };
/// drop(drained);
/// woken.recv()?;
/// let Begin::Go(ticket) = queue.try_begin_write(ByteRange::at(0, 5))? else { panic!() };
/// let written = ticket.source().write_at(b"bytes", 0, WriteFlags::NONE);
/// ticket.complete(written, None)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GuestQueue {
    tap: Arc<Tap>,
    waker: Arc<Waker>,
}

impl Tap {
    /// A caller that never waits; `wake` is its waker.
    pub fn queue(self: &Arc<Self>, wake: impl Fn() + Send + Sync + 'static) -> GuestQueue {
        GuestQueue { tap: Arc::clone(self), waker: self.wakers.register(Box::new(wake)) }
    }
}

impl GuestQueue {
    /// The tap.
    pub fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// [`Tap::try_begin_write`]; after [`Begin::Wait`] the waker is called when asking again may succeed.
    ///
    /// # Errors
    /// As for that.
    pub fn try_begin_write(&self, range: ByteRange) -> block::Result<Begin> {
        self.try_begin_change(Change::Data, range)
    }

    /// The same for any change of the range.
    ///
    /// # Errors
    /// As for that.
    pub fn try_begin_change(&self, change: Change, range: ByteRange) -> block::Result<Begin> {
        let first = self.tap.try_begin_change(change, range)?;
        let Begin::Wait { .. } = first else { return Ok(first) };
        // What has changed since the first answer would not be noticed.
        self.tap.wakers.arm(&self.waker);
        self.tap.try_begin_change(change, range)
    }
}

impl Drop for GuestQueue {
    fn drop(&mut self) {
        self.tap.wakers.unregister(&self.waker);
    }
}

impl fmt::Debug for GuestQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestQueue").field("tap", &self.tap.name).finish_non_exhaustive()
    }
}
