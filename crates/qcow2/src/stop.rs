//! Ending long work on metadata early.
//!
//! [`cancel_in_flight`](blockmirror_block::BlockDevice::cancel_in_flight) counts up; an operation that began
//! before fails where it next asks, and so does one whose caller is cancelled. Each operation whose length an
//! image decides asks between the pieces of it, with no lock held.

use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::{Error, ErrorKind, Result, cancel};

use crate::context::ImageContext;

/// How often operations in flight were cancelled.
#[derive(Debug, Default)]
pub(crate) struct Cancellations(AtomicU64);

impl Cancellations {
    /// Cancels what is under way.
    pub(crate) fn cancel(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// One operation, from when it began.
#[derive(Debug)]
pub(crate) struct StopCheck<'a> {
    now: &'a Cancellations,
    ctx: &'a ImageContext,
    operation: &'static str,
    began_at: u64,
}

impl<'a> StopCheck<'a> {
    /// Begins an operation of the image `ctx`, whose cancellations `now` counts.
    pub(crate) fn new(now: &'a Cancellations, ctx: &'a ImageContext, operation: &'static str) -> Self {
        Self { now, ctx, operation, began_at: now.count() }
    }

    /// Fails if the operation was cancelled since it began.
    pub(crate) fn check(&self) -> Result<()> {
        if self.now.count() == self.began_at && !cancel::is_cancelled() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Cancelled, self.operation).in_file(self.ctx.name.clone()))
    }
}
