//! A guest write between its beginning and its end: one owned ticket.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::Guard;
use blockmirror_block::cancel::CancelScope;
use blockmirror_block::{self as block, BlockDevice, ByteRange, ZeroFlags};

use super::below::Below;
use super::{Tap, WriteObserver, discard};
use crate::machine::TargetWriter;
use crate::region_log::LogPin;

/// An announced guest write. It borrows nothing, so that a VMM can keep it with the request that it belongs
/// to. Dropping it counts as a failed write.
///
/// A job that ends well, or a drain, waits for every ticket without limit. A job that is cancelled or fails
/// waits only for tickets whose [`target`](Self::target) was asked for, and for at most 5 s; then it leaves
/// their ranges out of the target. A write that its caller has begun there may still land on it later.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, testing::MemoryDisk};
/// use blockmirror_mirror::Tap;
///
/// let tap = Tap::new(Arc::new(MemoryDisk::new(1 << 20)));
/// let ticket = tap.begin_write(ByteRange::at(4096, 5))?;
/// let write = |disk: &dyn BlockDevice| disk.write_at(b"bytes", 4096, WriteFlags::NONE);
/// let source = write(&**ticket.source());
/// // A job that mirrors writes at once says where to.
/// let target = source.is_ok().then(|| ticket.target()).flatten().map(|target| write(&*target));
/// ticket.complete(source, target)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "a write that is not completed counts as failed"]
pub struct WriteTicket {
    change: Change,
    write: OpenWrite<Arc<Tap>>,
}

/// What a guest write does to its range, and what its target is to get if a job mirrors writes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Change {
    /// Writes data. The target gets the same bytes.
    Data,
    /// Makes it zeros. The target gets zeros.
    Zeroes,
    /// Discards it. What it reads as then is the source's choice, so the target gets what the source reads
    /// there afterwards, not a discard.
    Discard,
}

impl Change {
    /// What errors call it.
    pub(super) fn operation(self) -> &'static str {
        match self {
            Self::Data | Self::Zeroes => "write",
            Self::Discard => "discard",
        }
    }
}

/// The answer to [`Tap::try_begin_write`] and to a [`GuestQueue`](super::GuestQueue).
#[derive(Debug)]
#[must_use = "a write that is not completed counts as failed"]
pub enum Begin {
    /// The write may go on.
    Go(WriteTicket),
    /// It would have to wait, for a drain or for the job on the tap. It is forgotten: ask again later, for
    /// the same range. Refusals in a row, less than a second apart, count as one wait for the latency budget.
    Wait {
        /// Ask again after this time, if no waker was called before: a latency budget or the limit of the
        /// guest's quiescing is reached then, or the log is to be asked anew. Without it only a change that
        /// calls the waker admits the write.
        within: Option<Duration>,
    },
}

/// Who counts a write, and who is notified of its end.
pub(super) enum Route {
    /// A shard: there was no observer when it began.
    Unobserved(usize),
    /// It is observed by bitmaps, but no job.
    Observed,
    /// A job admitted it.
    Admitted {
        session: u64,
        id: u64,
        /// The job, if its target gets the write at once.
        both: Option<Arc<dyn WriteObserver>>,
    },
}

/// A write that may begin.
pub(super) struct EnteredWrite {
    pub(super) below: Guard<Arc<Below>>,
    pub(super) route: Route,
    /// Its place in the log.
    pub(super) pin: Option<LogPin>,
}

/// A write under way, by way of a tap that is borrowed or owned. Dropping it counts as a failed write.
#[must_use = "a write that is not completed counts as failed"]
pub(super) struct OpenWrite<T: Deref<Target = Tap>> {
    tap: T,
    range: ByteRange,
    below: Guard<Arc<Below>>,
    /// `None` once it is completed.
    route: Option<Route>,
    /// Its place in the log: given up when the job and the bitmaps know that it has ended.
    pin: Option<LogPin>,
}

impl WriteTicket {
    pub(super) fn new(change: Change, write: OpenWrite<Arc<Tap>>) -> Self {
        Self { change, write }
    }

    /// What was announced.
    pub fn change(&self) -> Change {
        self.change
    }

    /// The disk to write to.
    pub fn source(&self) -> &Arc<dyn BlockDevice> {
        self.write.source()
    }

    /// The bytes that were announced.
    pub fn range(&self) -> ByteRange {
        self.write.range
    }

    /// The disk to write to as well, what [`change`](Self::change) says, to be asked for when the write
    /// to the source has succeeded. `None` if there is no job, if the job copies the range later, or if
    /// it aborts.
    pub fn target(&self) -> Option<Arc<dyn BlockDevice>> {
        self.write.target(TargetWriter::TicketHolder)
    }

    /// Does at the target what it is to get, if it gets it at once, and returns its result for
    /// [`complete`](Self::complete): zeroes; after a discard what the source reads then, if that is little.
    /// `None` leaves it to the job, as always for [`Change::Data`], of which the ticket has no bytes. To be
    /// called when the change of the source has succeeded, from a thread that may wait: it calls both disks.
    pub fn repeat_at_target(&self) -> Option<block::Result<()>> {
        if self.change == Change::Data {
            return None;
        }
        let target = self.target()?;
        let _calls = self.write.target_calls();
        match self.change {
            Change::Data => None,
            Change::Zeroes => Some(target.write_zeroes(self.range(), ZeroFlags::MAY_UNMAP)),
            Change::Discard => discard::repeat(&**self.source(), &*target, self.range()),
        }
    }

    /// The write has ended: at the source with `source`, which is handed back, and at the target with
    /// `target`. `None` leaves it to the job, which copies the range later; a failure there is the job's
    /// affair. Calls no disk, and waits for none that others call: it takes three locks at most, under which
    /// there is no I/O while a ticket is open.
    ///
    /// # Errors
    /// That of `source`.
    pub fn complete(
        mut self,
        source: block::Result<()>,
        target: Option<block::Result<()>>,
    ) -> block::Result<()> {
        self.write.end(source.is_ok(), target);
        source
    }
}

impl<T: Deref<Target = Tap>> OpenWrite<T> {
    pub(super) fn new(tap: T, range: ByteRange, entered: EnteredWrite) -> Self {
        let EnteredWrite { below, route, pin } = entered;
        Self { tap, range, below, route: Some(route), pin }
    }

    pub(super) fn source(&self) -> &Arc<dyn BlockDevice> {
        &self.below.device
    }

    fn target(&self, writer: TargetWriter) -> Option<Arc<dyn BlockDevice>> {
        match &self.route {
            Some(Route::Admitted { id, both: Some(observer), .. }) => {
                observer.write_reaches_target(*id, writer)
            }
            _ => None,
        }
    }

    /// Calls of the target are cancelled with the job.
    fn target_calls(&self) -> Option<CancelScope> {
        match &self.route {
            Some(Route::Admitted { both: Some(observer), .. }) => Some(observer.target_calls()),
            _ => None,
        }
    }

    /// Writes the same to the target if it gets the write at once, and completes. `repeat` may leave it to
    /// the job.
    pub(super) fn complete_with(
        mut self,
        source: block::Result<()>,
        repeat: impl FnOnce(&dyn BlockDevice) -> Option<block::Result<()>>,
    ) -> block::Result<()> {
        let target = source.is_ok().then(|| self.target(TargetWriter::Tap)).flatten();
        let target = target.and_then(|target| {
            let _calls = self.target_calls();
            repeat(&*target)
        });
        self.end(source.is_ok(), target);
        source
    }

    fn end(&mut self, source_ok: bool, target: Option<block::Result<()>>) {
        match self.route.take() {
            None => {}
            Some(Route::Unobserved(shard)) => self.tap.end_unobserved(shard, self.range),
            Some(Route::Observed) => self.tap.end_write(self.range, None, |_| {}),
            Some(Route::Admitted { session, id, .. }) => {
                self.tap.end_write(self.range, Some(session), |observer| {
                    observer.end_write(id, source_ok, target);
                });
            }
        }
        self.pin = None;
    }
}

impl<T: Deref<Target = Tap>> Drop for OpenWrite<T> {
    fn drop(&mut self) {
        self.end(false, None);
    }
}

impl<T: Deref<Target = Tap>> fmt::Debug for OpenWrite<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenWrite").field("range", &self.range).finish_non_exhaustive()
    }
}
