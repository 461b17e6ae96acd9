//! A write of the guest between its beginning and its end.

use std::fmt;
use std::sync::Arc;

use arc_swap::Guard;
use blockmirror_block::{self as block, BlockDevice, ByteRange};

use super::{Below, Tap};
use crate::engine::{Engine, Wake};

/// An announced write. Dropping it without a word counts as a failed write.
#[must_use = "a write that is not finished counts as failed"]
pub struct WriteGuard<'a> {
    tap: &'a Tap,
    range: ByteRange,
    below: Guard<Arc<Below>>,
    /// `None` once it has finished.
    place: Option<Place>,
}

enum Place {
    /// There was no listener when it began.
    Lane(usize),
    /// Bitmaps listened, but no job.
    Seen,
    /// A job let it in.
    LetIn {
        session: u64,
        ticket: u64,
        /// The job, if its target is to get it at once.
        both: Option<Arc<Engine>>,
    },
}

impl<'a> WriteGuard<'a> {
    pub(super) fn in_lane(tap: &'a Tap, range: ByteRange, below: Guard<Arc<Below>>, lane: usize) -> Self {
        Self { tap, range, below, place: Some(Place::Lane(lane)) }
    }

    pub(super) fn seen(tap: &'a Tap, range: ByteRange, below: Guard<Arc<Below>>) -> Self {
        Self { tap, range, below, place: Some(Place::Seen) }
    }

    pub(super) fn let_in(
        tap: &'a Tap,
        range: ByteRange,
        below: Guard<Arc<Below>>,
        session: u64,
        ticket: u64,
        both: Option<Arc<Engine>>,
    ) -> Self {
        Self { tap, range, below, place: Some(Place::LetIn { session, ticket, both }) }
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
        let target = match &self.place {
            Some(Place::LetIn { ticket, both: Some(engine), .. }) if result.is_ok() => {
                engine.with_core(Wake::None, |core, _| core.guest_at_target(*ticket));
                engine.target()
            }
            _ => None,
        };
        let repeated = target.and_then(|target| repeat(&*target));
        self.end(result.is_ok(), repeated);
        result
    }

    fn end(&mut self, source_ok: bool, target: Option<block::Result<()>>) {
        match self.place.take() {
            None => {}
            Some(Place::Lane(index)) => self.tap.leave_lane(index, self.range),
            Some(Place::Seen) => self.tap.leave(self.range, None, |_| {}),
            Some(Place::LetIn { session, ticket, .. }) => {
                self.tap.leave(self.range, Some(session), |engine| {
                    engine.with_core(Wake::One, |core, _| core.guest_finished(ticket, source_ok, target));
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
