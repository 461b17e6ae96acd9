//! A job that an error has stopped goes on, with its target opened anew if that has failed for good.
//!
//! A failed flush, and a failed write of metadata, end all writing to an image, and a failed flush to a file:
//! what they should have covered may be lost. Then the target gets fresh images over the same files, and what
//! no good flush has covered is written again. Called by the commands that resume jobs.
//!
//! What must hold: nothing of the job is in flight while that happens, and the old images are not used any
//! more.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_file::FileStorage;
use blockmirror_mirror::IoStatus;
use blockmirror_qcow2::Qcow2;
use blockmirror_qmp::QmpError;

use super::{Job, JobCommand, Jobs};
use crate::Reply;
use crate::errors::qmp_error;
use crate::graph::{Node, NodeDevice};

/// How long what is in flight may take to end.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(1);

/// A node of the target.
struct Part {
    name: String,
    filename: String,
    device: Arc<NodeDevice>,
    file: Option<Arc<FileStorage>>,
    image: Option<Arc<Qcow2>>,
}

impl Part {
    fn has_lost_writes(&self) -> bool {
        let file = self.file.as_ref().is_some_and(|file| file.has_lost_writes());
        file || self.image.as_ref().is_some_and(|image| image.is_poisoned())
    }
}

impl Jobs {
    /// Lets `job` go on.
    ///
    /// # Errors
    /// It is not paused, or its target cannot be opened anew: then it stays paused.
    pub(crate) fn resume_job(&self, job: &Job) -> Reply<()> {
        if let Some(target) = job.handle.target()
            && job.handle.figures().io_status != IoStatus::Ok
        {
            self.reopen_target(job, target)?;
        }
        job.request(JobCommand::Resume)
    }

    fn reopen_target(&self, job: &Job, target: &str) -> Reply<()> {
        // Of two clients the second finds it done.
        let _only_one = job.resuming.lock();
        let parts: Vec<_> = {
            let graph = self.context.graph.lock();
            let part = |node: &Node| Part {
                name: node.name.clone(),
                filename: node.filename.clone(),
                device: Arc::clone(&node.device),
                file: node.file.clone(),
                image: node.qcow2.clone(),
            };
            graph.lives_in(target).into_iter().map(part).collect()
        };
        if !parts.iter().any(Part::has_lost_writes) {
            return Ok(());
        }
        let until = Instant::now() + LIMIT;
        wait(until, target, || !job.handle.figures().busy)?;
        // What lies below comes last.
        for part in parts.iter().rev() {
            if let Some(file) = &part.file {
                file.recover().map_err(qmp_error)?;
            }
            if let Some(image) = &part.image {
                // Held by the node, its device, and here.
                wait(until, &part.name, || Arc::strong_count(image) <= 3)?;
                let fresh =
                    image.reopen().map_err(|e| qmp_error(e.in_file(&part.filename.as_str().into())))?;
                self.context.replace_image(&part.name, &part.device, Arc::new(fresh));
            }
        }
        job.handle.writes_lost();
        Ok(())
    }
}

/// Waits until nothing uses the node `name` any more.
fn wait(until: Instant, name: &str, is_over: impl Fn() -> bool) -> Reply<()> {
    while !is_over() {
        if Instant::now() > until {
            return Err(QmpError::generic(format!("A request to node '{name}' does not end")));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}
