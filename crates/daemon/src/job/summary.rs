//! What a process that runs the daemon shows of its jobs: to a service manager, for example.

use super::{Jobs, newest_first};

/// A job in short.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobSummary {
    /// Its name.
    pub id: String,
    /// QEMU's name of its type: `mirror`, `stream`, ...
    pub kind: &'static str,
    /// QEMU's name of its state: `running`, `ready`, ...
    pub state: &'static str,
    /// What is done.
    pub done: u64,
    /// What there is to do.
    pub total: u64,
}

impl Jobs {
    /// The jobs in short, the newest first.
    pub(crate) fn summaries(&self) -> Vec<JobSummary> {
        let table = self.table.lock();
        let summaries = newest_first(&table).map(|job| {
            let figures = job.handle.figures();
            JobSummary {
                id: job.id.clone(),
                kind: job.kind,
                state: job.reported.lock().state.name(),
                done: figures.offset,
                total: figures.len,
            }
        });
        summaries.collect()
    }
}
