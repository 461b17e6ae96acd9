//! A write of the guest between its beginning and its end.

use std::fmt;
use std::sync::Arc;

use arc_swap::Guard;
use blockmirror_block::{self as block, BlockDevice, ByteRange};

use super::{Below, Tap, WriteObserver};

/// An announced write. Dropping it unfinished counts as a failed write.
#[must_use = "a write that is not finished counts as failed"]
pub struct WriteGuard<'a> {
    tap: &'a Tap,
    range: ByteRange,
    below: Guard<Arc<Below>>,
    /// `None` once it has finished.
    route: Option<Route>,
}

enum Route {
    /// There was no observer when it began.
    Unobserved(usize),
    /// It is observed by bitmaps, but no job.
    Observed,
    /// A job admitted it.
    Admitted {
        session: u64,
        ticket: u64,
        /// The job, if its target is to get it at once.
        both: Option<Arc<dyn WriteObserver>>,
    },
}

impl<'a> WriteGuard<'a> {
    pub(super) fn unobserved(tap: &'a Tap, range: ByteRange, below: Guard<Arc<Below>>, shard: usize) -> Self {
        Self { tap, range, below, route: Some(Route::Unobserved(shard)) }
    }

    pub(super) fn observed(tap: &'a Tap, range: ByteRange, below: Guard<Arc<Below>>) -> Self {
        Self { tap, range, below, route: Some(Route::Observed) }
    }

    pub(super) fn admitted(
        tap: &'a Tap,
        range: ByteRange,
        below: Guard<Arc<Below>>,
        session: u64,
        ticket: u64,
        both: Option<Arc<dyn WriteObserver>>,
    ) -> Self {
        Self { tap, range, below, route: Some(Route::Admitted { session, ticket, both }) }
    }

    /// The disk to write to.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.below.device
    }

    /// The bytes that were announced.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The write has ended with `result`, which is handed back. If the target was to get it at once, it gets
    /// it later.
    ///
    /// # Errors
    /// That of `result`.
    pub fn finish(mut self, result: block::Result<()>) -> block::Result<()> {
        self.end(result.is_ok(), None);
        result
    }

    /// The write has ended with `result`, which is handed back. If that is a success and the target is to get
    /// it at once, `repeat` writes the same there; its failure is the job's affair.
    ///
    /// # Errors
    /// That of `result`.
    pub fn finish_with(
        self,
        result: block::Result<()>,
        repeat: impl FnOnce(&dyn BlockDevice) -> block::Result<()>,
    ) -> block::Result<()> {
        self.finish_if(result, |target| Some(repeat(target)))
    }

    /// The same where `repeat` may leave it to the job.
    pub(super) fn finish_if(
        mut self,
        result: block::Result<()>,
        repeat: impl FnOnce(&dyn BlockDevice) -> Option<block::Result<()>>,
    ) -> block::Result<()> {
        let target = match &self.route {
            Some(Route::Admitted { ticket, both: Some(observer), .. }) if result.is_ok() => {
                observer.write_reaches_target(*ticket)
            }
            _ => None,
        };
        let repeated = target.and_then(|target| repeat(&*target));
        self.end(result.is_ok(), repeated);
        result
    }

    fn end(&mut self, source_ok: bool, target: Option<block::Result<()>>) {
        match self.route.take() {
            None => {}
            Some(Route::Unobserved(index)) => self.tap.end_unobserved(index, self.range),
            Some(Route::Observed) => self.tap.end_write(self.range, None, |_| {}),
            Some(Route::Admitted { session, ticket, .. }) => {
                self.tap.end_write(self.range, Some(session), |observer| {
                    observer.end_write(ticket, source_ok, target);
                })
            }
        }
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        self.end(false, None);
    }
}

impl fmt::Debug for WriteGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteGuard").field("range", &self.range).finish_non_exhaustive()
    }
}
