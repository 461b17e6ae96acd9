//! What the log says of a job. Called by the job's event pump, under no lock, in the job's span.

use blockmirror_mirror::Event;
use tracing::{Span, debug, error_span, info, warn};

/// The span of a job. The command that starts the job ends long before it, so it is not the span's parent.
pub(crate) fn job_span(id: &str, kind: &str) -> Span {
    error_span!(parent: None, "job", id, kind)
}

/// Logs what clients are about to be sent.
pub(super) fn event(event: &Event) {
    match event {
        Event::Status(state) => debug!(state = state.name(), "state"),
        Event::Ready => info!("ready"),
        Event::Pending => info!("waits to be finalized"),
        Event::Completed { error: None } => info!("completed"),
        Event::Completed { error: Some(error) } => warn!(error, "failed"),
        Event::Cancelled => info!("cancelled"),
        Event::Error { operation, action, range, message } => {
            warn!(%operation, %range, ?action, error = message, "error");
        }
        Event::CopyMode { mode, reason, .. } => info!(mode = mode.name(), %reason, "copy mode changed"),
        other => debug!(event = ?other, "event"),
    }
}
