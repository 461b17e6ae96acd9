//! What a tap knows of the job that is attached to it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::cancel::CancelScope;
use blockmirror_block::{self as block, BlockDevice, ByteRange};

use crate::machine::{Admission, TargetWriter};

/// A job on a tap, which admits each guest write and is notified of its end.
///
/// Called under the lock of the tap's state where it says so; there no waker is called, which the tap does
/// when it has released the lock. Only `begin_write` and `begin_copy_up` wait.
pub(crate) trait WriteObserver: fmt::Debug + Send + Sync {
    /// Whether the job is over. Under the lock.
    fn is_over(&self) -> bool;

    /// `count` writes are under way that began before the job was attached. Under the lock.
    fn expect_pre_attach_writes(&self, count: usize);

    /// One of them has finished. Under the lock.
    fn pre_attach_write_finished(&self, range: ByteRange);

    /// Waits until a write to `range` is admitted, or the job is over; the write's id. If the caller is
    /// cancelled the write is forgotten ([`Admission::Wait`]).
    fn begin_write(&self, range: ByteRange) -> (u64, Admission, Option<Duration>);

    /// The same without waiting: a write that would have to is forgotten ([`Admission::Wait`]), but what it
    /// has waited counts if the range is asked for again: after the time returned, if nothing changes before.
    fn try_begin_write(&self, range: ByteRange) -> (u64, Admission, Option<Duration>);

    /// Whether a write to `range` would have to wait now.
    fn write_would_wait(&self, range: ByteRange) -> bool;

    /// A write waits for room in the log, or will soon: the job flushes both disks as soon as it can.
    fn flush_soon(&self);

    /// The log has failed, and is invalid: the job fails.
    fn log_failed(&self, why: Arc<block::Error>);

    /// The write has finished at the source, and `writer` writes it to the target now, which is returned
    /// unless the job aborts or is over.
    fn write_reaches_target(&self, id: u64, writer: TargetWriter) -> Option<Arc<dyn BlockDevice>>;

    /// Calls of the target, made for the job by the thread of a guest write, are cancelled with the job from
    /// now on.
    fn target_calls(&self) -> CancelScope;

    /// The write has finished at the source, and at the target if `target` is something. Under the lock.
    fn end_write(&self, id: u64, source_ok: bool, target: Option<block::Result<()>>);

    /// Waits until data may be copied into the source from the layers below, or the job is over;
    /// [`Admission::Wait`] if the caller is cancelled.
    fn begin_copy_up(&self) -> Admission;

    /// A copy-up that the job has admitted has finished. Under the lock.
    fn end_copy_up(&self);

    /// The ranges that the target of an aborted job does not have. Under the lock.
    fn missing(&self) -> Vec<ByteRange>;

    /// Whether the bitmap that says what to copy starts anew if the job succeeds. Under the lock.
    fn renews_bitmap(&self) -> bool;
}
