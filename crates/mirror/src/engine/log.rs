//! What the log says of a job: its beginning, its end, and operations that failed. Called by the job's
//! threads under no lock, in the span of the caller that started the job; nothing is logged for an operation
//! that succeeds.

use tracing::{debug, info};

use super::{Engine, Wake};
use crate::machine::Work;
use crate::options::MirrorOptions;
use crate::scan::Failure;

impl Engine {
    /// Before the first thread starts.
    pub(crate) fn log_begin(&self, granularity: u64, options: &MirrorOptions) {
        let len = self.with_core(Wake::None, |core, now| core.progress(now).len);
        let (sync, copy_mode) = (options.sync, options.copy_mode.name());
        info!(len, granularity, ?sync, copy_mode, "begins");
    }

    /// By the last thread that had something to do.
    pub(super) fn log_end(&self) {
        let (progress, error) = self
            .with_core(Wake::None, |core, now| (core.progress(now), core.failure().map(ToString::to_string)));
        let (copied, zeroed, skipped) = (progress.copied, progress.zeroed, progress.skipped);
        info!(
            copied,
            shared = progress.shared,
            zeroed,
            skipped,
            seconds = progress.elapsed.as_secs_f64(),
            error,
            "ended"
        );
    }
}

/// What the error policy makes of it is an event of the job.
pub(super) fn failed(work: Work, failure: &Failure) {
    debug!(?work, error = %failure.error, "an operation failed");
}
