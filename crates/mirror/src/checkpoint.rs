//! Checkpoints of a job without a tap: what the target has on stable storage, for a caller that keeps a log.
//!
//! The engine calls a [`CheckpointSink`] after each periodic flush, on the worker that has flushed. Must
//! hold: what a sink hears is not missing was written before that flush began.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::{ByteRange, Result};

/// Keeps what the target of a job has durably.
pub trait CheckpointSink: fmt::Debug + Send + Sync {
    /// Everything but `missing` has been copied, and a flush that began after that has succeeded. The ranges
    /// are in no order; some may overlap. Calls come one at a time.
    ///
    /// # Errors
    /// Any: it counts as a failure of the flush, for the policy on errors of the target too.
    fn record(&self, missing: &[ByteRange]) -> Result<()>;
}

/// That a job reports checkpoints, and how often.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    pub(crate) sink: Arc<dyn CheckpointSink>,
    pub(crate) interval: u64,
}

impl Checkpoints {
    /// Flushes the target and calls `sink` whenever `interval` bytes of data were copied, or as many as one
    /// operation copies. Data that no call covers is never more than twice as much: copies wait for the
    /// flush.
    pub fn new(sink: Arc<dyn CheckpointSink>, interval: u64) -> Self {
        Self { sink, interval }
    }
}
